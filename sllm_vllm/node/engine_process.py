"""One engine's process, warm or cold: a child of the agent that leads a session and a process group of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence

from sllm_vllm.daemon.file_limit import Spare
from sllm_vllm.daemon.run_loops import is_shortage
from sllm_vllm.node.cold_start import command_of
from sllm_vllm.node.orphans import TRACKER_S_MAX, all_processes, is_tracker

# Finds and ends the processes of an engine by their session: an engine leads one, and all that it starts stay in it.


_POLL_S = 0.01


def living_members(session: int) -> list[int]:
    """The running processes of a session. Lists all processes of the machine, which may take tens of milliseconds."""
    return list(_living_members(session))


def _living_members(session: int) -> Iterator[int]:
    return (process.pid for process in all_processes() if process.session == session and not process.is_ended)


def kill_members(session: int, *, also_trackers: bool = False) -> list[int]:
    """Kill the processes of a session (SIGKILL); resource trackers, which clean up after the others, only on request.

    While one of them exists, the session's id can't be reused. Returns those that still ran.
    """
    members = []
    for pid in _living_members(session):  # each is killed as soon as it is found, before its id can be reused
        members.append(pid)
        if also_trackers or not is_tracker(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return members


def kill_group(leader: int) -> None:
    """Kill a session leader's own group (SIGKILL): all that is possible where processes can't be listed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


async def end_session(session: int, *, timeout_s: float) -> bool:
    """Kill every process of a session, and wait until none runs; returns False if some still run after
    ``timeout_s``."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    while await _has_members(session, also_trackers=loop.time() - start_s > TRACKER_S_MAX):
        if loop.time() - start_s > timeout_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True


async def _has_members(session: int, *, also_trackers: bool) -> bool:
    """Kill the members and return whether there were any; if they can't be listed, assume that there are.

    Listed in a thread: each look into the system's process table releases the interpreter lock, and the loop would
    wait up to a switch interval for it again, hundreds of times, while another thread computes.
    """
    try:
        return bool(await asyncio.to_thread(kill_members, session, also_trackers=also_trackers))
    except (OSError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        return True


def reap_adopted(sessions: Collection[int]) -> int:
    """Reap ended children of this process in these sessions, except for the sessions' leaders; returns how many.

    An engine's children become this process's when their parent ends before them. Leaders are left to the code that
    started them, which waits for their status.
    """
    if not _has_ended_children():  # called often, and listing all processes is slow: see ``_has_members``
        return 0
    num_reaped = 0
    for process in all_processes():
        if process.is_ended and process.session in sessions and process.pid != process.session:
            with contextlib.suppress(ChildProcessError):
                num_reaped += os.waitpid(process.pid, os.WNOHANG)[0] != 0
    return num_reaped


def _has_ended_children() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


logger = logging.getLogger(__name__)

_SPARE_DESCRIPTORS = 2
"""For listing processes when the engine is to be ended."""
_STATUS_LOST = 255
"""Exit status reported if other code in this process has reaped the engine."""


class EngineProcess:
    """A running process. Owned by the agent's loop; reaped when it ends, and the rest of its session killed.

    Args:
        pid: a child of this process that no other code waits for.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._loop = asyncio.get_running_loop()
        try:
            self._fd = os.pidfd_open(pid)
            self._spare = Spare(_SPARE_DESCRIPTORS)
        except OSError:  # without a descriptor it could never be watched
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._fd, self._reap)

    async def wait(self) -> int:
        """Wait for its end; returns its exit status, or minus the signal that ended it."""
        return await asyncio.shield(self._ended)

    @property
    def status(self) -> int | None:
        """Its exit status once it has ended, else None."""
        return self._ended.result() if self._ended.done() else None

    def terminate(self) -> None:
        """Ask the server to end (SIGTERM); it ends its other processes."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill every process of the engine."""
        if not self._ended.done():
            self._kill_members()
            self._signal(signal.SIGKILL)  # it may not lead its session yet, which then has no members

    def _signal(self, number: signal.Signals) -> None:
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def _kill_members(self) -> None:
        """Kill its session; never raises, so that the process's end is always noticed."""
        with self._spare.lent():
            try:
                kill_members(self.pid)
            except OSError as error:
                logger.warning("event=processes_not_listed session=%d reason=%s", self.pid, error)
                kill_group(self.pid)

    def _reap(self) -> None:
        self._kill_members()  # before it is reaped, while its pid can't be reused
        self._loop.remove_reader(self._fd)
        try:
            found = os.waitid(os.P_PIDFD, self._fd, os.WEXITED)
            assert found is not None
            status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        except ChildProcessError:
            logger.error("event=status_lost pid=%d", self.pid)
            status = _STATUS_LOST
        os.close(self._fd)
        self._spare.close()
        self._ended.set_result(status)


def closing_inherited() -> list[tuple[int, int]]:
    """Return ``posix_spawn`` actions that close every descriptor from 3 on that a child would inherit.

    Python opens none that are inherited, but C++ libraries do: Ray's and gRPC's listening sockets, for example.
    """
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, as that of this listing is
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append((os.POSIX_SPAWN_CLOSE, int(name)))
    return found


def start_cold(
    command: Sequence[str],
    environment: Mapping[str, str],
    output: int,
    *,
    directory: str = "/",
    cpus: Sequence[int] = (),
) -> EngineProcess:
    """Start an engine by exec.

    Args:
        command: program and arguments, as ``cold_start.serve_command`` and those of ``vllm serve``.
        output: descriptor for its standard output and error.
        cpus: where it may run; empty for everywhere.

    Raises:
        OSError: no process can be started.
    """
    words = command_of(command, directory, cpus)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, output, 2),
        *closing_inherited(),
    ]
    pid = os.posix_spawn(sys.executable, words, dict(environment), file_actions=actions, setsid=True)
    return EngineProcess(pid)
