"""One node as the controller sees it: its replicas, its reports, and the tasks that keep both up to date.

Runs on the controller's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.node.protocol import CheckpointReport, NodeReport
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.core.events import Event
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.engines import Engines, Node
from sllm_vllm.router.node_watch import NodeWatch


class Member:
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
        node: Node,
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
        self.engines = Engines(name, node, tell, on_lost=self._lost, on_pulled=self.watch.refresh)
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
