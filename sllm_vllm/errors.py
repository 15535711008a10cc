"""Every error of this package: one class for each way a caller can react.

::

    SllmError
    ├── ConfigError              a setting is wrong: the user mends it
    │   └── SourceMissing        a model's weights are not there: they may be downloaded by the load
    ├── CheckpointError          a checkpoint can't be used; every message names the file and the mend
    │   ├── CheckpointMissing    there is none: load the stock way and convert
    │   ├── CheckpointInvalid    its manifest or a header breaks the format: convert again
    │   ├── CheckpointCorrupt    its bytes are not those that were written: remove it, convert again
    │   ├── CheckpointUnreadable the system refuses to read it: mend the permissions
    │   ├── SourceChanged        it was loaded, but its source has other weights now: start again
    │   └── LayoutMismatch       it is sound, but for another model, dtype or parallel size
    ├── WriteError               a checkpoint can't be written: serve on, unconverted
    │   ├── DiskFull
    │   ├── NotConvertible       this module can't be stored: load it the stock way each time
    │   └── WriterBusy           another process is writing the same checkpoint right now
    ├── NotExportable            this layout has no way back to Hugging Face names
    ├── StoreError               the store on this machine does not help; a load goes on without it
    │   ├── StoreUnavailable     no daemon answers, or it ended in the middle: read the disk in this process
    │   ├── StoreRefused         a daemon answers, but not to this: another version, user or chunk size
    │   └── StoreBusy            another daemon owns the socket: this one must not start
    ├── RemoteError              a remote source does not deliver; retries are used up
    │   ├── RemoteMissing        it has no such checkpoint
    │   ├── RemoteUnreachable    it can't be reached, or stalls: try again later
    │   │   └── RemoteRefused    it answers and refuses: mend the credentials or the request
    │   └── RemoteCorrupt        what it delivers is not what the manifest says
    ├── DaemonFailed             a daemon has ended because a part of it can't work
    └── NodeError                the node agent does not do what was asked
        ├── NodeUnavailable      no agent answers: start one
        ├── NodeBusy             another agent owns the directory: this one must not start
        ├── OrderRefused         no slot is free, a port is taken, an argument is not allowed: order otherwise
        └── ReplicaUnknown       there is no such replica (any more)

Pure. Raised everywhere, caught by class.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike


class SllmError(Exception):
    """Root of the tree. ``str()`` is one line that says what, where, and the fix.

    ``lines``: the same for people; an error about several things has a line for each.
    """

    @property
    def lines(self) -> Sequence[str]:
        """What the command line prints."""
        return (str(self),)


class ConfigError(SllmError):
    """A setting is unknown or has an impossible value."""


class SourceMissing(ConfigError):
    """A model's directory is not there, or has no weights: they may still be to be downloaded."""


class _PathError(SllmError):
    def __init__(self, path: str | PathLike[str], problem: str, mend: str) -> None:
        self.path = str(path)
        self.problem = problem
        self.mend = mend
        super().__init__(f"{self.path}: {problem}; {mend}")

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), (self.path, self.problem, self.mend))


def _restored(kind: type[_PathError], told: tuple[str, str, str]) -> _PathError:
    """What pickling makes of an error: a process pool hands it to its parent."""
    return kind(*told)


class CheckpointError(_PathError):
    """A checkpoint can't be used."""


class CheckpointMissing(CheckpointError):
    """There is no checkpoint at this path."""


class CheckpointInvalid(CheckpointError):
    """The manifest or a partition's header breaks FORMAT.md."""


class CheckpointCorrupt(CheckpointError):
    """Bytes are missing or differ from their checksum. ``tensors`` names those they belong to."""

    def __init__(self, path: str | PathLike[str], problem: str, mend: str, *, tensors: tuple[str, ...] = ()) -> None:
        self.tensors = tensors
        super().__init__(path, problem, mend)


class CheckpointUnreadable(CheckpointError):
    """The operating system refuses to read it."""


class LayoutMismatch(CheckpointError):
    """A sound checkpoint, made for another model, dtype or parallel size than is asked for."""


class SourceChanged(CheckpointError):
    """``verify_source: always`` found other source weights than the loaded checkpoint was made from."""


class WriteError(_PathError):
    """A checkpoint can't be written; nothing that was there before is lost."""


class DiskFull(WriteError):
    """No space, or no quota, is left for the checkpoint."""


class NotConvertible(WriteError):
    """The module holds something that is no plain tensor (weights quantised while loading), or no manifest may hold."""


class WriterBusy(WriteError):
    """Another process holds the lock and writes the same checkpoint right now."""


class NotExportable(CheckpointError):
    """The checkpoint's layout can't be turned back into Hugging Face tensors."""


class StoreError(_PathError):
    """The store's daemon does not help. ``path`` is its socket."""


class StoreUnavailable(StoreError):
    """No daemon answers, or it ended while it was needed."""


class StoreRefused(StoreError):
    """The daemon is there and refuses: another protocol version or user, an unknown name, a size it can't hold."""


class StoreBusy(StoreError):
    """Another daemon owns the socket."""


class RemoteError(_PathError):
    """A remote source does not deliver. ``path`` is its URL without secrets."""


class RemoteMissing(RemoteError):
    """The remote answers, but has no such checkpoint or file."""


class RemoteUnreachable(RemoteError):
    """The remote can't be reached, stalls, refuses or breaks off, also after every retry."""


class RemoteRefused(RemoteUnreachable):
    """The remote answers and refuses: asking again does not help."""


class RemoteCorrupt(RemoteError):
    """The remote delivers other bytes, or another number of them, than its manifest says."""


class DaemonFailed(SllmError):
    """A daemon has ended because a part that it needs can't work; the message says which, and why."""


class NodeError(_PathError):
    """The node agent does not do what was asked. ``path`` is its socket, or what the error is about."""


class NodeUnavailable(NodeError):
    """No agent answers, or it ended while it was needed."""


class NodeBusy(NodeError):
    """Another agent owns the directory."""


class OrderRefused(NodeError):
    """A replica can't be had, at least not now; nothing was started. ``path`` is the model."""


class ReplicaUnknown(NodeError):
    """No replica has this id, or several begin with it. ``path`` is what was asked for."""
