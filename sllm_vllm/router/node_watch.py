"""The controller's view of a node: reads its report regularly, and at once when something may have changed it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.errors import NodeUnavailable, SllmError
from sllm_vllm.node.protocol import CheckpointReport, NodeReport
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.core.events import (
    CopyCheckpoint,
    Event,
    NodeJoined,
    NodeReported,
    PrefetchModel,
    StartReplica,
    StopReplica,
)
from sllm_vllm.router.core.facts import FoundReplica, RequestFacts, Tier
from sllm_vllm.router.engines import AgentLink, NodeLink
from sllm_vllm.router.pauses import in_slices

logger = logging.getLogger(__name__)

REPORT_S = 5.0
REPORTS_PER_S_MAX = 20.0
"""For all nodes together: with more than a hundred, each is asked less often. Events of a node still come at once."""
PAUSE_S = 0.1
"""Shortest time between two reports of a node, however much happens."""
WARM_S = 60.0
"""How long one call waits for a warm parent before the node is asked again."""
PREFETCH_IN_VAIN_MAX = 8
"""A prefetch is no longer followed after this many looks without progress, about ten seconds."""
_PREFETCH_PAUSE_S = 0.1
_PREFETCH_PAUSE_S_MAX = 2.0


class NodeWatch:
    """Turns one node's reports into events of the core. Runs on the controller's loop.

    Args:
        models: the served models; read at every report.
        tell: called with the events.
        on_lost: called when the agent does not answer.
        num_nodes: returns the number of nodes.
    """

    def __init__(
        self,
        name: str,
        node: AgentLink,
        models: Mapping[str, ModelConfig],
        *,
        tell: Callable[[Event], None],
        on_lost: Callable[[str], None],
        num_nodes: Callable[[], int] = lambda: 1,
    ) -> None:
        self._on_lost = on_lost
        self._num_nodes = num_nodes
        self.report: NodeReport | None = None
        self._name = name
        self._node = node
        self._models = models
        self._tell = tell
        self._stale = asyncio.Event()
        self._checkpoints: dict[str, CheckpointReport] = {}
        """Those in the last report, by model."""
        self._tiers: dict[str, Tier] = {}
        self._prefetches: dict[str, asyncio.Task[None]] = {}

    async def join(self, find: Callable[[NodeReport], tuple[FoundReplica, ...]]) -> None:
        """Ask for the first report, and announce the node to the core with it.

        Args:
            find: returns the replicas in the report that are taken over.

        Raises:
            NodeError: there is no report.
        """
        report = await self._node.report()
        first = await self._taken(report)
        found = find(report)
        self._tell(NodeJoined(self._name, len(report.slots), is_warm=first.is_warm, report=first, found=found))
        self._tell(first)

    async def follow_report(self) -> None:
        """Wait until the next report is due or ``refresh`` is called, and read it: one step of a run loop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(REPORT_S, self._num_nodes() / REPORTS_PER_S_MAX)):
                await self._stale.wait()
        self._stale.clear()
        try:
            report = await self._node.report()
        except NodeUnavailable as error:
            self._on_lost(error.problem)
        except SllmError as error:
            logger.warning("event=no_report node=%s reason=%s", self._name, error)
        else:
            self._tell(await self._taken(report))
        await asyncio.sleep(PAUSE_S)

    async def follow_warm(self) -> None:
        """Refresh as soon as a warm parent is ready, not only with the next regular report: one step of a run loop."""
        try:
            is_warm = await self._node.wait_warm(WARM_S)
        except NodeUnavailable as error:
            self._on_lost(error.problem)
        else:
            if is_warm and self.report is not None and self.report.warm.pid is None:
                self.refresh()
        await asyncio.sleep(REPORT_S)  # ``wait_warm`` is called again, even if the parent is warm or never will be

    def what_is_known(self, model: ModelConfig) -> tuple[Mapping[str, Tier], int]:
        """The tiers of a model's weights by node, and their bytes, from the last report; empty and 0 if unknown."""
        checkpoint = _checkpoint_of(model, self._checkpoints)
        return ({}, 0) if checkpoint is None else ({self._name: _tier_of(checkpoint)}, checkpoint.nbytes)

    def checkpoint_of(self, model: ModelConfig) -> CheckpointReport | None:
        """A model's checkpoint, according to the last report."""
        return _checkpoint_of(model, self._checkpoints)

    def refresh(self) -> None:
        """Read the report now: a start, an end or a prefetch may have moved a checkpoint."""
        self._stale.set()

    def prefetch_ordered(self, model: str) -> None:
        """Look often until a model's checkpoint is in memory, because the store does not announce it."""
        if model not in self._prefetches:
            task = asyncio.get_running_loop().create_task(self._follow_prefetch(model))
            self._prefetches[model] = task
            task.add_done_callback(lambda _: self._prefetches.pop(model, None))

    async def close(self) -> None:
        """Stop following prefetches."""
        tasks = list(self._prefetches.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow_prefetch(self, model: str) -> None:
        pause_s, num_in_vain, resident = _PREFETCH_PAUSE_S, 0, -1
        while self._tiers.get(model, Tier.REMOTE) is Tier.DISK:  # on other tiers there is nothing to read ahead
            if self.report is None or self.report.store or num_in_vain > PREFETCH_IN_VAIN_MAX:
                return  # there is no store, or it is busy with other work
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PREFETCH_PAUSE_S_MAX)
            self.refresh()
            before, resident = resident, self._resident_nbytes(model)
            num_in_vain = 0 if resident > before else num_in_vain + 1

    def _resident_nbytes(self, model: str) -> int:
        config = self._models.get(model)
        checkpoint = None if config is None else _checkpoint_of(config, self._checkpoints)
        return 0 if checkpoint is None else checkpoint.resident_nbytes

    async def _taken(self, report: NodeReport) -> NodeReported:
        self.report = report
        checkpoints = {name: one async for one in in_slices(report.checkpoints) for name in _names_of(one)}
        self._checkpoints = checkpoints
        known: dict[str, CheckpointReport] = {}
        async for name, model in in_slices(list(self._models.items())):
            if (checkpoint := _checkpoint_of(model, checkpoints)) is not None:
                known[name] = checkpoint
        self._tiers = {name: _tier_of(checkpoint) for name, checkpoint in known.items()}
        return NodeReported(
            self._name,
            is_warm=report.warm.pid is not None or report.warm.ready_in_s is not None,
            warm_in_s=report.warm.ready_in_s or 0.0,
            residency=self._tiers,
            nbytes={name: checkpoint.nbytes for name, checkpoint in known.items()},
            hops=_hops_of(report),
        )


def _names_of(checkpoint: CheckpointReport) -> set[str]:
    """The model's name, and its normalized path if it is one. With both as keys, a model needs only one look-up."""
    name = checkpoint.model
    return {name, os.path.normpath(name)} if name and os.path.isabs(name) else {name} if name else set()


def _checkpoint_of(model: ModelConfig, checkpoints: Mapping[str, CheckpointReport]) -> CheckpointReport | None:
    found = checkpoints.get(model.source)
    if found is None and os.path.isabs(model.source):
        return checkpoints.get(os.path.normpath(model.source))
    return found


def _tier_of(checkpoint: CheckpointReport) -> Tier:
    is_in_memory = checkpoint.nbytes > 0 and checkpoint.resident_nbytes >= checkpoint.nbytes
    return Tier.HOST if is_in_memory else Tier.DISK


def _hops_of(report: NodeReport) -> dict[Tier, float]:
    """The store's measured disk speed, which no load from disk can exceed."""
    bps = report.hops.get("disk", {}).get("bps")
    return {Tier.DISK: bps} if isinstance(bps, int | float) and bps > 0 else {}


# One node as the controller sees it: its replicas, its reports, and the tasks that keep both up to date. Runs on the
# controller's loop.


class WatchedNode:
    """A node, from when it joins until it is lost.

    Args:
        models: the served models.
        tell: called with the node's events.
        on_lost: called once, with the reason, if its agent does not answer (any more).
        num_nodes: returns the number of nodes, this one included.
    """

    def __init__(
        self,
        name: str,
        node: AgentLink,
        models: Mapping[str, ModelConfig],
        *,
        tell: Callable[[Event], None],
        on_lost: Callable[[str], None],
        num_nodes: Callable[[], int] = lambda: 1,
    ) -> None:
        self.name = name
        self._when_lost = on_lost
        self._is_lost = False
        self.watch = NodeWatch(name, node, models, tell=tell, on_lost=self._lost, num_nodes=num_nodes)
        self.engines = NodeLink(name, node, tell, on_lost=self._lost, on_pulled=self.watch.refresh)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def report(self) -> NodeReport | None:
        """The node's last report."""
        return self.watch.report

    def checkpoint_of(self, model: ModelConfig) -> CheckpointReport | None:
        """A model's checkpoint on the node, according to the last report."""
        return self.watch.checkpoint_of(model)

    def checkpoint_url(self, model: ModelConfig) -> str | None:
        """The URL, key included, where other nodes can pull a model's checkpoint; None if they can't."""
        checkpoint = self.checkpoint_of(model)
        peer = "" if self.report is None else self.report.peer
        return f"{peer}/{checkpoint.name}" if checkpoint is not None and peer else None

    @property
    def is_well(self) -> bool:
        """Whether the node has reported, and its agent's loops work according to its last report."""
        return self.report is not None and not self.report.problem

    async def join(self, requests: Callable[[], Mapping[str, tuple[RequestFacts, ...]]], loops: RunLoops) -> None:
        """Add the node with the replicas that already run on it, and begin to follow it.

        Args:
            requests: returns, by replica, the requests that ingresses stream from it.
            loops: runs the loops that follow the node.

        Raises:
            NodeError: its agent does not answer.
        """
        await self.watch.join(lambda report: self.engines.find(report.replicas, requests()))
        self._tasks = [
            loops.start(f"reports of {self.name}", self.watch.follow_report),
            loops.start(f"warm parent of {self.name}", self.watch.follow_warm),
        ]

    async def close(self) -> None:
        """Stop following the node."""
        self._is_lost = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.watch.close()
        await self.engines.close()

    def _lost(self, reason: str) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._when_lost(reason)


# Turns the core's actions into orders to node agents: start, stop, prefetch and copy checkpoints. Runs on the
# controller's loop.


NodeAction = StartReplica | StopReplica | PrefetchModel | CopyCheckpoint


class NodeOrders:
    """Gives orders to members. The controller keeps both mappings up to date.

    Args:
        directory: the engines' working directory.
    """

    def __init__(self, members: Mapping[str, WatchedNode], models: Mapping[str, ModelConfig], directory: Path) -> None:
        self._members = members
        self._models = models
        self.directory = directory

    def give(self, action: NodeAction) -> None:
        """Carry out an action; the member reports the results as events."""
        member = self._members[action.node]
        match action:
            case StartReplica():
                logger.info("event=start replica=%s model=%r node=%s", action.replica, action.model, action.node)
                model = self._models[action.model]
                directory, peer = str(self.directory), self._peer_of(model, member)
                member.engines.start(action.replica, model, directory, timeout_s=action.timeout_s, peer=peer)
            case StopReplica():
                logger.info("event=stop replica=%s reason=%r", action.replica, action.reason)
                member.engines.stop(action.replica)
            case PrefetchModel():
                member.engines.prefetch(self._models[action.model])
                member.watch.prefetch_ordered(action.model)
            case CopyCheckpoint():
                logger.info("event=copy model=%r source=%s node=%s", action.model, action.source, action.node)
                peer = self._members[action.source].checkpoint_url(self._models[action.model])
                if peer is not None:
                    member.engines.copy(peer)

    def _peer_of(self, model: ModelConfig, member: WatchedNode) -> str | None:
        """Where a start on the node can pull its checkpoint from; None if the node has it, or no other node does."""
        if member.checkpoint_of(model) is not None:
            return None
        others = (one.checkpoint_url(model) for one in self._members.values() if one is not member)
        return next((url for url in others if url is not None), None)
