"""Starts engines in all ways, case by case and round by round, and times them. Owns the checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cold_start.engine import (
    EngineFailed,
    Ready,
    our_engine,
    session_cpu_s,
    stock_engine,
    store_dir_of,
    store_socket_of,
    wait_warm,
)
from benchmarks.cold_start.report import Case, Start, Tier, Tokens, Way, phases_of, ways_in_turn
from benchmarks.common.disturbance import Disturbance
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import Workspace
from benchmarks.common.vllm_server import Completion, stream_completion
from benchmarks.demo.loading import questions
from benchmarks.loading import page_cache
from benchmarks.loading.bytecode import environment_of
from benchmarks.store.daemon import StoreDaemon
from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.config import StoreConfig
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.units import MIB, round_up

PUBLISH_TIMEOUT_S = 180.0
SPARE_NBYTES = 256 * MIB
"""Memory of the store beyond the checkpoint's size."""
_POLL_S = 0.05


@dataclass(kw_only=True)
class ColdStarts:
    """All starts of a run. Must be used on the agents' event loop.

    Args:
        models: directory of each (architecture, size).
        warm: agent with a warm parent; it also converts the models.
    """

    workspace: Workspace
    progress: Progress
    models: Mapping[tuple[str, str], Path]
    warm: NodeAgent
    cold: NodeAgent
    starts: list[Start] = field(default_factory=list)
    _checkpoints: dict[Path, Checkpoint] = field(default_factory=dict)

    async def run(self, case: Case, ways: Sequence[Way], *, rounds: int) -> None:
        """Start a case ``rounds`` times in each way; the order of the ways changes with the round.

        Raises:
            EngineFailed, ServerFailed, DaemonFailed, PageCacheRefused: a start did not do what it should.
        """
        checkpoint = await self.checkpoint(case.architecture, case.size)
        async with self._tier(case, checkpoint) as ready_tier:
            for number in range(1, rounds + 1):
                for way in ways_in_turn(ways, number):
                    await ready_tier.prepare()
                    self.starts.append(await self._start(case, way, number))
                    self._say(self.starts[-1], rounds)

    async def checkpoint(self, architecture: str, size: str) -> Checkpoint:
        """The model's checkpoint: a first start writes it, a second verifies its checksums; neither is timed."""
        model = self.models[architecture, size]
        if model not in self._checkpoints:
            self.progress.say(f"{architecture} {size}: converting")
            await wait_warm(self.warm)
            known = self._published()
            async with our_engine(self.warm, model, self.workspace):
                self._checkpoints[model] = await self._wait_published(known)
            async with our_engine(self.warm, model, self.workspace) as ready:
                _check(ready, "warm", "disk warm")
        return self._checkpoints[model]

    async def _start(self, case: Case, way: Way, number: int) -> Start:
        await wait_warm(self.warm)
        others, start_s = Disturbance(), time.monotonic()
        first, *rest = questions()
        async with self._engine(way, self.models[case.architecture, case.size]) as ready:
            answers = [await self._ask(ready, first)]
            elapsed_s = (time.monotonic() - start_s) * (os.cpu_count() or 1)
            disturbance = max(0.0, others.share() - session_cpu_s(ready.pid) / elapsed_s)
            answers += [await self._ask(ready, question) for question in rest]
            _check(ready, way, case.tier)
        first_token_s = answers[0].first_token_s - ready.order_s
        return Start(
            case=case,
            way=way,
            round=number,
            healthy_s=ready.healthy_s,
            first_token_s=first_token_s,
            phases=phases_of(ready.phases, ready.healthy_s, first_token_s),
            disturbance=disturbance,
            tokens=_tokens_of(answers),
            load=ready.load,
        )

    def _engine(self, way: Way, model: Path) -> contextlib.AbstractAsyncContextManager[Ready]:
        if way == "stock":
            return stock_engine(model, self.workspace)
        return our_engine(self.warm if way == "warm" else self.cold, model, self.workspace)

    async def _ask(self, ready: Ready, question: Mapping[str, object]) -> Completion:
        return await asyncio.to_thread(stream_completion, ready.port, question, api_key=ready.api_key)

    @contextlib.asynccontextmanager
    async def _tier(self, case: Case, checkpoint: Checkpoint) -> AsyncIterator[_TierOf]:
        files = files_of(self.models[case.architecture, case.size], checkpoint.path)
        if case.tier != "store":
            yield _TierOf(case.tier, files)
            return
        config = StoreConfig(
            store_dir=store_dir_of(self.workspace),
            socket=store_socket_of(self.workspace),
            memory_bytes=round_up(checkpoint.manifest.nbytes + SPARE_NBYTES, checkpoint.manifest.chunk_nbytes),
            slot_bytes=checkpoint.manifest.chunk_nbytes,
        )
        log = self.workspace.run / "store.log"
        daemon = StoreDaemon(config, log=log, environment=environment_of(self.workspace))
        with contextlib.ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, daemon)
            try:
                yield _TierOf(case.tier, files, daemon, checkpoint.path.name)
            finally:
                await asyncio.to_thread(stack.close)

    def _published(self) -> dict[str, Checkpoint]:
        found = CheckpointRepository(store_dir_of(self.workspace)).list()
        return {entry.path.name: entry for entry in found if isinstance(entry, Checkpoint)}

    async def _wait_published(self, known: Mapping[str, Checkpoint]) -> Checkpoint:
        deadline_s = time.monotonic() + PUBLISH_TIMEOUT_S
        while time.monotonic() < deadline_s:
            for name, checkpoint in self._published().items():
                if name not in known:
                    return checkpoint
            await asyncio.sleep(_POLL_S)
        raise EngineFailed(f"no checkpoint was published in {PUBLISH_TIMEOUT_S:.0f} s")

    def _say(self, start: Start, rounds: int) -> None:
        figures = f"healthy {start.healthy_s:.2f} s, first token {start.first_token_s:.2f} s"
        self.progress.say(f"{start.case.words}: round {start.round} of {rounds}: {start.way}: {figures}")


@dataclass(frozen=True, slots=True)
class _TierOf:
    """Brings a case's weights to their tier before a start."""

    tier: Tier
    files: Sequence[Path]
    daemon: StoreDaemon | None = None
    checkpoint: str = ""

    async def prepare(self) -> None:
        """Bring the weights to the tier; this takes no time if they are there already."""
        page_tier: page_cache.Tier = "cold" if self.tier == "disk cold" else "warm"
        await asyncio.to_thread(page_cache.prepare, self.files, page_tier)
        if self.daemon is not None:
            await asyncio.to_thread(self.daemon.prefetch_s, self.checkpoint)


def files_of(*directories: Path) -> list[Path]:
    """All files in the directories, recursively."""
    return sorted(path for directory in directories for path in directory.rglob("*") if path.is_file())


def _check(ready: Ready, way: Way, tier: Tier) -> None:
    """Check that a start was of the kind it is counted as."""
    if way == "stock":
        return
    if ready.is_warm != (way == "warm"):
        raise EngineFailed(f"{way}: the engine was {'forked' if ready.is_warm else 'not forked'}")
    wanted = ("loaded", "store" if tier == "store" else "disk")
    found = (ready.load.get("outcome"), ready.load.get("source"))
    if found != wanted:
        raise EngineFailed(f"{way}, {tier}: the model was {found[0]} from {found[1]}, not {wanted[0]} from {wanted[1]}")


def _tokens_of(answers: Sequence[Completion]) -> Tokens:
    return tuple((answer.prompt_token_ids, answer.token_ids) for answer in answers)
