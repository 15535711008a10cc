"""The agent's handle on its warm parent: starts it, asks it to fork, and replaces it when it is dead, stale or worn
out."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from sllm_vllm.daemon.plain_file import open_plain
from sllm_vllm.node.engine_process import EngineProcess, closing_inherited
from sllm_vllm.node.running_time import within
from sllm_vllm.node.warm_order import ORDER_NBYTES_MAX, WarmAnswer, WarmOrder, WarmReady, installation

logger = logging.getLogger(__name__)

FORKS_MAX = 500
"""A parent is replaced after this many forks, whatever its state."""
LOG_NBYTES_MAX = 1 << 20
"""A longer log is emptied when a parent starts; a parent that has imported prints little."""
READY_MAX_S = 600.0
FORK_MAX_S = 10.0
RESTART_PAUSE_S = 1.0
RESTART_PAUSE_S_MAX = 60.0
STEADY_S = 60.0
"""A parent that lived longer than this is replaced at once when it dies."""
_PARENTS_MAX = 16


class NotWarm(Exception):
    """There is no warm parent to fork from now; the message says why. The engine is then started cold."""


class _Parent:
    """One warm parent that is ready to fork."""

    def __init__(self, process: EngineProcess, channel: socket.socket, ready: WarmReady) -> None:
        self.process = process
        self.channel = channel
        self.ready = ready
        self.num_forks = 0
        self.has_died = False
        """Whether it has ended without being told to."""

    def close(self) -> None:
        """End it; the engines it has forked live on."""
        self.channel.close()
        self.process.kill()


class WarmPool:
    """Keeps one warm parent. Lives on the agent's loop.

    Args:
        environment: the parent's, in which vLLM is imported.
        log: file for the parent's output.
        on_import: called with the seconds from a parent's start until it is ready.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        log: Path,
        *,
        forks_max: int = FORKS_MAX,
        on_import: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._environment = dict(environment)
        self._log = log
        self._forks_max = forks_max
        self._on_import = on_import
        self._import_began_s: float | None = time.monotonic()
        self._attempted = asyncio.Event()
        """Set while no parent imports."""
        self._parent: _Parent | None = None
        self._problem = "the warm parent is still importing"
        self._forking = asyncio.Lock()
        self._numbers = itertools.count(1)
        self.parents: deque[int] = deque(maxlen=_PARENTS_MAX)
        """Pids of the last parents; their sessions hold forked processes that don't lead a session of their own yet."""
        self.num_forks = 0
        self._wanted = asyncio.Event()
        self._warm = asyncio.Event()
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    @property
    def pid(self) -> int | None:
        """The warm parent's pid; None if there is none."""
        return self._parent.ready.pid if self._parent is not None else None

    @property
    def import_s(self) -> float | None:
        """Seconds that the parent's imports took; None if there is none."""
        return self._parent.ready.seconds if self._parent is not None else None

    @property
    def importing_s(self) -> float | None:
        """Seconds that a parent has been importing; None if none is."""
        return None if self._import_began_s is None else time.monotonic() - self._import_began_s

    @property
    def problem(self) -> str:
        """Why there is no parent; empty if there is one."""
        return "" if self._parent is not None else self._problem

    async def fork(self, order: WarmOrder, output: int) -> EngineProcess:
        """Have the parent fork a server, which becomes this process's child.

        Args:
            order: its number is set here.
            output: descriptor for the server's standard output and error.

        Raises:
            NotWarm: there is no parent, or it can't fork.
        """
        async with self._forking:
            parent = self._parent
            if parent is None:
                raise NotWarm(self._problem)
            if await asyncio.to_thread(installation) != parent.ready.installation:
                self._drop(parent, "vLLM or sllm-vllm was installed anew")
                raise NotWarm(self._problem)
            return await self._fork(parent, order.model_copy(update={"number": next(self._numbers)}), output)

    async def close(self) -> None:
        """End the warm parent."""
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        if self._parent is not None:
            self._drop(self._parent, "the agent is stopping")

    async def wait_import(self, timeout_s: float) -> None:
        """Wait until the parent that is importing is ready or has failed; no longer than ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._attempted.wait()

    async def wait_warm(self, timeout_s: float) -> bool:
        """Wait until there is a warm parent; returns False if it takes too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._warm.wait()
        return self._parent is not None

    async def _fork(self, parent: _Parent, order: WarmOrder, output: int) -> EngineProcess:
        loop = asyncio.get_running_loop()
        go_reader, go_writer = os.pipe2(os.O_CLOEXEC)
        try:
            socket.send_fds(parent.channel, [order.model_dump_json().encode()], [output, go_reader])
            received = loop.sock_recv(parent.channel, ORDER_NBYTES_MAX)
            answer = WarmAnswer.model_validate_json(await within(FORK_MAX_S, received))
        except (OSError, TimeoutError, ValidationError) as error:
            self._drop(parent, f"the warm parent did not answer ({type(error).__name__})")
            raise NotWarm(self._problem) from None
        else:
            process = self._born(parent, order, answer)  # an error here is not the parent's fault
            os.write(go_writer, b"1")
        finally:
            for fd in (go_reader, go_writer):
                os.close(fd)  # an engine that was not told to begin sees EOF and ends
        parent.num_forks += 1
        self.num_forks += 1
        if parent.num_forks >= self._forks_max:
            self._drop(parent, f"it has forked {parent.num_forks} times")
        return process

    def _born(self, parent: _Parent, order: WarmOrder, answer: WarmAnswer) -> EngineProcess:
        """The process of an answer: our child, which waits for our word to begin."""
        if answer.number != order.number or answer.pid is None:
            self._drop(parent, answer.problem or "the warm parent answered out of turn")
            raise NotWarm(self._problem)
        return EngineProcess(answer.pid)

    def _drop(self, parent: _Parent, reason: str) -> None:
        """End a parent; the keeper then starts another one. Does nothing if the keeper has already noticed its end."""
        if self._parent is not parent:
            return
        logger.info("event=warm_parent_dropped pid=%d reason=%r", parent.ready.pid, reason)
        parent.close()
        self._parent, self._problem = None, f"{reason}; another one is importing"
        self._warm.clear()
        self._import_began_s = time.monotonic()  # the keeper's next step
        self._attempted.clear()
        self._wanted.set()

    async def _keep(self) -> None:
        """Start a parent whenever there is none, with growing pauses while that keeps failing."""
        pause_s = RESTART_PAUSE_S
        while True:
            self._wanted.clear()
            try:
                parent = await self._import()
            except Exception as error:  # top of a run loop
                self._problem = f"the warm parent does not start ({_words(error)}), see {self._log}"
                logger.warning("event=warm_parent_failed reason=%r next_attempt_s=%.0f", self._problem, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RESTART_PAUSE_S_MAX)
                continue
            ready_s = time.monotonic()
            self._warm.set()
            logger.info("event=warm_parent_ready pid=%d seconds=%.1f", parent.ready.pid, parent.ready.seconds)
            await self._until_gone(parent)
            if not parent.has_died or time.monotonic() - ready_s > STEADY_S:
                pause_s = RESTART_PAUSE_S
                continue
            logger.warning("event=warm_parent_died_young next_attempt_s=%.0f", pause_s)
            self._import_began_s = None
            self._attempted.set()  # none imports during the pause
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_PAUSE_S_MAX)

    async def _until_gone(self, parent: _Parent) -> None:
        ended = asyncio.ensure_future(parent.process.wait())
        wanted = asyncio.ensure_future(self._wanted.wait())
        try:
            await asyncio.wait([ended, wanted], return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and self._parent is parent:
                parent.has_died = True
                self._drop(parent, f"the warm parent ended with status {ended.result()}")
        finally:
            ended.cancel()
            wanted.cancel()

    async def _import(self) -> _Parent:
        """Start a parent, and wait until it has imported."""
        self._import_began_s = began_s = time.monotonic()
        self._attempted.clear()
        try:
            parent = self._parent = await self._start()
        finally:
            self._import_began_s = None
            self._attempted.set()
        self._on_import(time.monotonic() - began_s)
        return parent

    async def _start(self) -> _Parent:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs, self._opened_log() as log:
                if log.tell() > LOG_NBYTES_MAX:
                    log.truncate(0)
                process = EngineProcess(self._spawn(theirs.fileno(), log.fileno()))
            self.parents.append(process.pid)
            try:
                received = asyncio.get_running_loop().sock_recv(ours, ORDER_NBYTES_MAX)
                data = await within(READY_MAX_S, received)
                if not data:
                    process.kill()  # it may only have closed its end
                    raise OSError(f"it ended with status {await process.wait()}")
                return _Parent(process, ours, WarmReady.model_validate_json(data))
            except BaseException:
                process.kill()
                raise
        except BaseException:
            ours.close()
            raise

    def _opened_log(self) -> BinaryIO:
        return open(self._log, "ab", opener=open_plain)

    def _spawn(self, channel: int, log: int) -> int:
        """Start the parent's process, which inherits only its end of the socket."""
        target = 3 if channel != 3 else channel
        actions = [
            *closing_inherited(),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
            (os.POSIX_SPAWN_DUP2, channel, target),
        ]
        os.set_inheritable(channel, channel == target)
        command = [sys.executable, "-m", "sllm_vllm.node.warm_parent", str(target)]
        return os.posix_spawn(sys.executable, command, self._environment, file_actions=actions, setsid=True)


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"it has not imported vLLM within {READY_MAX_S:.0f} s"
    return str(error) or type(error).__name__
