"""All errors of this package: one class for each way in which a caller can react.

::

    SllmError
    ├── ConfigError              a setting is wrong: the user fixes it
    │   └── SourceMissing        a model's weights are not on this machine: the load may download them
    ├── CheckpointError          a checkpoint can't be used; every message names the file and the fix
    │   ├── CheckpointMissing    it does not exist: load the stock way and convert
    │   ├── CheckpointInvalid    its manifest or a header breaks the format: convert again
    │   ├── CheckpointCorrupt    its bytes differ from those that were written: remove it, convert again
    │   ├── CheckpointUnreadable the system refuses to read it: fix the permissions
    │   ├── SourceChanged        it was loaded, but its source has other weights now: start again
    │   └── LayoutMismatch       it is intact, but made for another model, dtype or parallel size
    ├── WriteError               a checkpoint can't be written: keep serving, unconverted
    │   ├── DiskFull
    │   ├── NotConvertible       this module can't be stored: load it the stock way each time
    │   └── WriterBusy           another process is writing the same checkpoint
    ├── NotExportable            this layout can't be converted back to Hugging Face names
    ├── StoreError               this machine's store can't be used; a load continues without it
    │   ├── StoreUnavailable     no daemon answers, or it ended during the load: read the disk in this process
    │   ├── StoreRefused         the daemon refuses: another version, user or chunk size
    │   └── StoreBusy            another daemon owns the socket: this one must not start
    ├── RemoteError              a remote source does not deliver; retries are used up
    │   ├── RemoteMissing        it has no such checkpoint
    │   ├── RemoteUnreachable    it can't be reached, or stalls: try again later
    │   │   └── RemoteRefused    it answers and refuses: fix the credentials or the request
    │   └── RemoteCorrupt        what it delivers differs from what the manifest says
    ├── DaemonFailed             a daemon has ended because one of its parts failed for good
    └── NodeError                the node agent does not do what it was asked to
        ├── NodeUnavailable      no agent answers: start one
        ├── NodeBusy             another agent owns the directory: this one must not start
        ├── OrderRefused         no slot is free, a port is taken, an argument is not allowed: change the order
        └── ReplicaUnknown       there is no such replica, or no longer

Pure. Raised in all packages, caught by class.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike


class SllmError(Exception):
    """Base class of all errors of this package. ``str()`` is one line that names the place, the problem and the fix."""

    @property
    def lines(self) -> Sequence[str]:
        """The lines that the command line prints: one for each thing that is wrong."""
        return (str(self),)


class ConfigError(SllmError):
    """A setting is unknown or has an impossible value."""


class SourceMissing(ConfigError):
    """A model's directory does not exist or has no weights, perhaps because they were not downloaded yet."""


class _PathError(SllmError):
    def __init__(self, path: str | PathLike[str], problem: str, mend: str) -> None:
        self.path = str(path)
        self.problem = problem
        self.mend = mend
        super().__init__(f"{self.path}: {problem}; {mend}")

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), (self.path, self.problem, self.mend))


def _restored(kind: type[_PathError], told: tuple[str, str, str]) -> _PathError:
    """Rebuild an unpickled error; a process pool's workers send errors to the parent pickled."""
    return kind(*told)


class CheckpointError(_PathError):
    """A checkpoint can't be used."""


class CheckpointMissing(CheckpointError):
    """There is no checkpoint at this path."""


class CheckpointInvalid(CheckpointError):
    """The manifest or a partition's header breaks FORMAT.md."""


class CheckpointCorrupt(CheckpointError):
    """Bytes are missing or differ from their checksum. ``tensors`` names the tensors they belong to."""

    def __init__(self, path: str | PathLike[str], problem: str, mend: str, *, tensors: tuple[str, ...] = ()) -> None:
        self.tensors = tensors
        super().__init__(path, problem, mend)


class CheckpointUnreadable(CheckpointError):
    """The operating system refuses to read the checkpoint."""


class LayoutMismatch(CheckpointError):
    """The checkpoint is intact, but made for another model, dtype or parallel size than the one requested."""


class SourceChanged(CheckpointError):
    """``verify_source: always`` found that the source weights are not those the loaded checkpoint was made from."""


class WriteError(_PathError):
    """A checkpoint can't be written. Nothing that existed before is lost."""


class DiskFull(WriteError):
    """No disk space or quota is left for the checkpoint."""


class NotConvertible(WriteError):
    """The module holds more than plain tensors (weights quantised while loading), or more than a manifest can hold."""


class WriterBusy(WriteError):
    """Another process holds the lock and is writing the same checkpoint."""


class NotExportable(CheckpointError):
    """The checkpoint's layout can't be converted back to Hugging Face tensors."""


class StoreError(_PathError):
    """The store's daemon can't be used. ``path`` is its socket."""


class StoreUnavailable(StoreError):
    """No daemon answers, or it ended while in use."""


class StoreRefused(StoreError):
    """The daemon answers, but refuses: another protocol version or user, an unknown name, a size it can't hold."""


class StoreBusy(StoreError):
    """Another daemon owns the socket."""


class RemoteError(_PathError):
    """A remote source does not deliver. ``path`` is its URL without secrets."""


class RemoteMissing(RemoteError):
    """The remote answers, but has no such checkpoint or file."""


class RemoteUnreachable(RemoteError):
    """The remote can't be reached, stalls, refuses or breaks off, and retries did not help."""


class RemoteRefused(RemoteUnreachable):
    """The remote answers, but refuses; retrying does not help."""


class RemoteCorrupt(RemoteError):
    """The remote delivers bytes that differ, or a number of bytes that differs, from its manifest."""


class DaemonFailed(SllmError):
    """A daemon has ended because a part that it needs failed for good; the message says which part, and why."""


class NodeError(_PathError):
    """The node agent does not do what it was asked to. ``path`` is its socket, or what the error is about."""


class NodeUnavailable(NodeError):
    """No agent answers, or it ended while in use."""


class NodeBusy(NodeError):
    """Another agent owns the directory."""


class OrderRefused(NodeError):
    """A replica can't be started, at least not now; nothing was started. ``path`` is the model."""


class ReplicaUnknown(NodeError):
    """No replica has this id, or several ids begin with it. ``path`` is the id."""
