"""No engine outlives the agent: the record of what it has started, the sweep over it, and the watch for its death.

The kernel ends an engine's first process with the agent, but not what that process has started. So the agent keeps a
record of its engines, and a *death watch*: a tiny process that holds the reading end of a pipe whose writing end is the
agent's alone. When the pipe ends, the agent is dead, whatever killed it; the watch ends all that is in the record. If
the watch died as well, the next agent sweeps when it starts.

Standard library only, and nothing of this package: the watch is this file, run as
``python -I -S orphans.py DESCRIPTOR RECORD OWNER``.

The record is a text file. Its first line holds the machine's boot id, the namespace of its process ids and its owner;
each other line a living engine: its leader's process id, and when that started, in clock ticks since the boot. An
engine leads a session of its own; what it starts may have other groups, but stays in the session.
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
"""A process that is killed and not gone by then is left to the kernel, which has the signal."""
CLOSE_S_MAX = 2.0
RECORD_NBYTES_MAX = 1 << 20
_PAUSE_S = 0.01
TRACKER = b"multiprocessing.resource_tracker"
"""In the command line of Python's process that removes the shared memory of those that were killed. It is spared until
they are gone: then it does its work, and ends by itself."""
TRACKER_S_MAX = 1.0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

StrPath = str | os.PathLike[str]


class Process(NamedTuple):
    """A line of the system's table of processes; ``start`` is in clock ticks since the boot."""

    pid: int
    group: int
    session: int
    start: int
    is_ended: bool


def find_process(pid: int) -> Process | None:
    """What the system says about a process; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may hold anything
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return Process(pid, int(fields[2]), int(fields[3]), int(fields[19]), fields[0] in {b"Z", b"X"})


def all_processes() -> Iterator[Process]:
    """Every process of every user, also those that have ended and are not reaped."""
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
    """The engines that live, as a file. Owned by the agent's loop; nothing is written before the first change.

    A write that fails is logged, and made up for at the next change: no engine fails because of it.
    """

    def __init__(self, path: StrPath) -> None:
        self._path = os.path.abspath(path)
        self._head = f"{_boot()} {_owner()}"
        self._starts: dict[int, int] = {}

    def add(self, pid: int) -> None:
        """An engine was started; call it before the process can have been reaped."""
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
        """An engine has ended, with all of its session; nothing happens if it is not recorded."""
        if self._starts.pop(pid, None) is not None:
            self._write()

    def _write(self) -> None:
        lines = [self._head, *(f"{pid} {start}" for pid, start in self._starts.items())]
        try:
            self._replace("".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            logger.warning("event=record_not_written path=%s reason=%s", self._path, error)

    def _replace(self, data: bytes) -> None:
        """Not synced: after a crash of the machine the record means nothing."""
        new = f"{self._path}.new"
        with contextlib.suppress(FileNotFoundError):  # whatever was left over, or put there
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
    """Kill all that is left of the recorded engines; returns who was killed. May take ``SWEEP_S_MAX``.

    Nobody is killed by a record that is missing, broken, or of another boot; nobody who has got a process id, or a
    session's, that was an engine's before; nobody of another user or of the caller's own session.

    Args:
        owner: a record of another one counts as missing.
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
    """Those of the leaders' sessions and groups. ``leaders`` maps their process ids to their starts."""
    table = {process.pid: process for process in all_processes()}
    starts = {
        leader: start
        for leader, start in leaders.items()
        # One that is not there any more: as long as its session lives, nobody else can get its number.
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
    """Kill exactly this one, not who may have got its number a moment ago."""
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
    """The recorded leaders and their starts; none if the record can't be relied on."""
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
    """What process ids and starts are relative to. Two containers of one machine share the boot, not the ids."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def _owner() -> str:
    """This process, so that a late watch does not take the next agent's record for its own agent's."""
    process = find_process(os.getpid())
    assert process is not None
    return f"{process.pid}:{process.start}"


class DeathWatch:
    """The agent's hold on its death watch. Owned by the agent's loop; a child of this process, reaped here alone.

    Args:
        environment: the watch's; it needs none, unless the interpreter does.
    """

    def __init__(self, record_path: StrPath, environment: Mapping[str, str] | None = None) -> None:
        self._path = os.path.abspath(record_path)
        self._environment = dict(environment or {})
        self._is_wanted = False
        self._writer = -1
        self.pid: int | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it watches."""
        if self.pid is None:
            return False
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:  # somebody else has reaped it
            return False

    def start(self) -> None:
        """Start watching; from the return on, this process's death is noticed.

        Raises:
            OSError: no process or no pipe is to be had.
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
        """Start another one if it has ended: for the agent's tick. Says whether one watches now; never raises."""
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
        """End it without a sweep; what is left of the engines lives on. Blocks for ``CLOSE_S_MAX`` at most."""
        self._is_wanted = False
        if self.pid is None:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writer, b"\0")
        if self.is_alive:
            self._end()
        self._forget()

    def _end(self) -> None:
        """Wait until it has taken the byte; one that was stopped never does."""
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
        """Reap it, which is about to end if it has not, and let go of its pipe."""
        assert self.pid is not None
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED)
        os.close(self._writer)
        self.pid, self._writer = None, -1

    def _spawn(self, reader: int) -> int:
        """It gets the pipe as its standard input, and no other descriptor."""
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
    """Wait for the end of a pipe, then sweep the record; a byte from it means that nothing is to be done.

    Args:
        fd: reading end; every other descriptor is closed.
        path: absolute.
        owner: whose record it must be; see `sweep`.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(PermissionError):  # it leads one already
        os.setsid()
    if fd:  # Python takes an empty range at 0 for everything
        os.closerange(0, fd)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")  # keeps no file system busy
    if not os.read(fd, 1):
        sweep(path, owner=owner)


if __name__ == "__main__":
    watch_main(int(sys.argv[1]), *sys.argv[2:4])
    os._exit(0)  # nothing to tidy up, and nowhere to complain to
