"""Ensures that no engine outlives the agent: the record of running engines, the sweep over it, and the death watch.

The kernel ends an engine's first process with the agent, but not the processes that it has started. So the agent keeps
a record of its engines, and a *death watch*: a tiny process that holds the reading end of a pipe whose writing end only
the agent holds. When the pipe reaches EOF, the agent is dead, however it was killed, and the watch ends everything in
the record. If the watch died as well, the next agent sweeps when it starts.

Standard library only, and nothing of this package: the watch is this file, run as
``python -I -S orphans.py DESCRIPTOR RECORD OWNER``.

The record is a text file. Its first line holds the machine's boot id, the namespace of its process ids and its owner;
each other line is a living engine: its leader's process id, and when that started, in clock ticks since the boot. An
engine leads a session of its own; processes that it starts may have other groups, but stay in the session.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

logger = logging.getLogger(__name__)

SWEEP_S_MAX = 2.0
"""A process that has been killed but is not gone by then is left to the kernel, which has the signal."""
CLOSE_S_MAX = 2.0
RECORD_NBYTES_MAX = 1 << 20
_PAUSE_S = 0.01
TRACKER = b"multiprocessing.resource_tracker"
"""Part of the command line of Python's resource tracker, which removes the shared memory of killed processes. It is
spared until those are gone; then it removes their shared memory and exits."""
TRACKER_S_MAX = 1.0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

StrPath = str | os.PathLike[str]


class Process(NamedTuple):
    """An entry of the system's process table; ``start`` is in clock ticks since the boot."""

    pid: int
    group: int
    session: int
    start: int
    is_ended: bool


def find_process(pid: int) -> Process | None:
    """The system's entry for a process; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may contain anything
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return Process(pid, int(fields[2]), int(fields[3]), int(fields[19]), fields[0] in {b"Z", b"X"})


def all_processes() -> Iterator[Process]:
    """Every process of every user, including those that have ended but are not reaped."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := find_process(int(name))) is not None:
            yield process


def is_tracker(pid: int) -> bool:
    """Whether it is a resource tracker of Python's ``multiprocessing``."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return TRACKER in file.read(4096)
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return False


class Record:
    """The living engines, as a file. Owned by the agent's loop; nothing is written before the first change.

    A failed write is logged, and the next change writes everything again: no engine fails because of it.
    """

    def __init__(self, path: StrPath) -> None:
        self._path = os.path.abspath(path)
        self._head = f"{_boot()} {_owner()}"
        self._starts: dict[int, int] = {}

    def add(self, pid: int) -> None:
        """Add an engine that was started; call this before the process can have been reaped."""
        try:
            process = find_process(pid)
        except OSError as error:
            logger.warning("event=engine_not_recorded pid=%d reason=%s", pid, error)
            return
        if process is None:
            logger.warning("event=engine_not_recorded pid=%d reason='there is no such process'", pid)
            return
        self._starts[pid] = process.start
        self._write()

    def remove(self, pid: int) -> None:
        """Remove an engine once its whole session has ended; does nothing if it is not recorded."""
        if self._starts.pop(pid, None) is not None:
            self._write()

    def _write(self) -> None:
        lines = [self._head, *(f"{pid} {start}" for pid, start in self._starts.items())]
        try:
            self._replace("".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            logger.warning("event=record_not_written path=%s reason=%s", self._path, error)

    def _replace(self, data: bytes) -> None:
        """Replace the file atomically. Not synced: after a crash of the machine the record is void."""
        new = f"{self._path}.new"
        with contextlib.suppress(FileNotFoundError):  # a leftover, or a file put there by another program
            os.unlink(new)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(new, flags, 0o600), "wb", buffering=0) as file:
            try:
                while data:
                    data = data[file.write(data) :]
                os.replace(new, self._path)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(new)
                raise


def sweep(path: StrPath, *, owner: str | None = None) -> list[int]:
    """Kill what is left of the recorded engines and return the pids of the killed. May take ``SWEEP_S_MAX``.

    A record that is missing, broken, or of another boot kills nothing. Processes that have reused an engine's process
    id or session id are spared, and so are those of other users and of the caller's own session.

    Args:
        owner: a record of another owner counts as missing.
    """
    leaders = _read(path, owner)
    killed: dict[Process, None] = {}
    start_s = time.monotonic()
    while leaders and (found := _living(leaders)):
        passed_s = time.monotonic() - start_s
        doomed = found if passed_s > TRACKER_S_MAX else [one for one in found if not is_tracker(one.pid)]
        killed.update((process, None) for process in doomed if process not in killed and _kill(process))
        if passed_s > SWEEP_S_MAX:
            break
        time.sleep(_PAUSE_S)
    return [process.pid for process in killed]


def _living(leaders: Mapping[int, int]) -> list[Process]:
    """Living processes of the leaders' sessions and groups. ``leaders`` maps process ids to starts."""
    table = {process.pid: process for process in all_processes()}
    starts = {
        leader: start
        for leader, start in leaders.items()
        # A leader that is gone still counts: while its session lives, no other process can get its id.
        if leader not in table or table[leader].start == start
    }

    def is_member(process: Process) -> bool:
        start = min((starts[name] for name in (process.session, process.group) if name in starts), default=None)
        if start is None or process.is_ended or process.start < start or process.session == os.getsid(0):
            return False
        return _is_of_this_user(process.pid)

    return [process for process in table.values() if is_member(process)]


def _is_of_this_user(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.geteuid()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _kill(process: Process) -> bool:
    """Kill exactly this process, not one that has reused its id meanwhile."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        now = find_process(process.pid)
        if now is None or now.start != process.start:
            return False
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(fd)
    return True


def _read(path: StrPath, owner: str | None) -> dict[int, int]:
    """The recorded leaders and their starts; empty if the record can't be trusted."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            data = file.read(RECORD_NBYTES_MAX)
        head, *lines = data.decode("ascii").split("\n")
        boot, _, whose = head.rpartition(" ")
        if boot != _boot() or lines.pop() != "" or owner not in {None, whose}:
            return {}
        leaders = {int(pid): int(start) for pid, start in (line.split(" ") for line in lines)}
    except (OSError, ValueError, IndexError):
        return {}
    return leaders if all(pid > 1 and start > 0 for pid, start in leaders.items()) else {}


def _boot() -> str:
    """What process ids and starts are relative to. Two containers of one machine share the boot, but not the ids."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def _owner() -> str:
    """This process. With it, a late watch does not take the next agent's record for its own agent's."""
    process = find_process(os.getpid())
    assert process is not None
    return f"{process.pid}:{process.start}"


class DeathWatch:
    """The agent's handle on its death watch. Owned by the agent's loop; the watch is a child that is reaped only here.

    Args:
        environment: of the watch; only needed if the interpreter needs it.
    """

    def __init__(self, record_path: StrPath, environment: Mapping[str, str] | None = None) -> None:
        self._path = os.path.abspath(record_path)
        self._environment = dict(environment or {})
        self._is_wanted = False
        self._writer = -1
        self.pid: int | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the watch runs."""
        if self.pid is None:
            return False
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:  # reaped by other code in this process
            return False

    def start(self) -> None:
        """Start the watch; once this returns, this process's death is noticed.

        Raises:
            OSError: no process can be started, or no pipe made.
        """
        assert self.pid is None, "one watch is enough"
        self._is_wanted = True
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self.pid = self._spawn(reader)
        except BaseException:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        self._writer = writer

    def ensure(self) -> bool:
        """Start a new watch if the last one has ended; called on the agent's tick. Returns whether one runs; never
        raises."""
        if self._is_wanted and not self.is_alive:
            if self.pid is not None:
                logger.warning("event=death_watch_ended pid=%d", self.pid)
                self._forget()
            try:
                self.start()
            except OSError as error:
                logger.warning("event=death_watch_not_started reason=%s", error)
        return self.is_alive

    def close(self) -> None:
        """End the watch without a sweep; engines that are left live on. Blocks for ``CLOSE_S_MAX`` at most."""
        self._is_wanted = False
        if self.pid is None:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writer, b"\0")
        if self.is_alive:
            self._end()
        self._forget()

    def _end(self) -> None:
        """Wait until it exits after the byte; kill it if it does not, as when it is stopped."""
        assert self.pid is not None
        fd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(CLOSE_S_MAX * 1000):
                logger.warning("event=death_watch_killed pid=%d", self.pid)
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)

    def _forget(self) -> None:
        """Reap it once it ends, and close its pipe."""
        assert self.pid is not None
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED)
        os.close(self._writer)
        self.pid, self._writer = None, -1

    def _spawn(self, reader: int) -> int:
        """Start the watch with the pipe as its standard input and no other descriptor."""
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), "0", self._path, _owner()]
        actions = [(os.POSIX_SPAWN_DUP2, reader, 0), (os.POSIX_SPAWN_CLOSE, 1), (os.POSIX_SPAWN_CLOSE, 2)]
        return os.posix_spawn(
            sys.executable,
            command,
            self._environment,
            file_actions=actions,
            setsid=True,
            setsigmask=_IGNORED,  # until it ignores them
        )


def watch_main(fd: int, path: str, owner: str | None = None) -> None:
    """Wait for EOF on a pipe, then sweep the record; a byte instead of EOF means that there is nothing to do.

    Args:
        fd: reading end; every other descriptor is closed.
        path: absolute.
        owner: whose record it must be; see `sweep`.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    if fd:  # Python would treat an empty range at 0 as every descriptor
        os.closerange(0, fd)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")  # keeps no file system busy
    if not os.read(fd, 1):
        sweep(path, owner=owner)


if __name__ == "__main__":
    watch_main(int(sys.argv[1]), *sys.argv[2:4])
    os._exit(0)  # nothing to clean up, and no output to report to
