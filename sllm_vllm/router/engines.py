"""Starts and stops a node's replicas through its agent, and turns the agent's reports into events of the core.

Runs on the controller's loop.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Protocol, runtime_checkable

from sllm_vllm.errors import NodeError, NodeUnavailable
from sllm_vllm.node.protocol import NodeReport, ReplicaOrder, ReplicaReport, StartReport
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.core.events import Event, ReplicaEnded, ReplicaReady
from sllm_vllm.router.core.facts import FoundReplica, RequestFacts, StartSample, Tier

logger = logging.getLogger(__name__)

PROCESS_PHASES = ("process", "imports", "inspect", "workers")
INIT_PHASES = ("init", "profile", "compile", "warmup", "graphs", "http")
WEIGHTS_PHASE = "weights"
MODEL_LABEL, GENERATION_LABEL, LINEAGE_LABEL = "sllm/model", "sllm/generation", "sllm/lineage"
"""Labels of a replica; a restarted router reads them from the replicas that it finds."""
_TIERS = {"store": Tier.HOST, "disk": Tier.DISK}
_REASON_CHARS_MAX = 500
WATCH_AGAIN_S = 1.0
"""Pause after an unexpected error."""
_FOUND = {"starting", "loading", "ready", "unwell", "stopping"}
"""States in which a replica has slots."""


class AgentLink(Protocol):
    """What the controller uses of a node agent, in this process or elsewhere."""

    @property
    def is_here(self) -> bool:
        """Whether the agent is in this process, so that its engines can be reached over Unix sockets."""
        ...

    async def ensure_replica(self, order: ReplicaOrder) -> ReplicaReport: ...
    async def stop_replica(self, replica_id: str) -> ReplicaReport: ...
    def watch(self, replica_id: str) -> AsyncIterator[ReplicaReport]: ...
    async def report(self, *, with_memory: bool = False) -> NodeReport: ...
    async def wait_warm(self, timeout_s: float) -> bool: ...
    async def prefetch_model(self, arguments: tuple[str, ...]) -> None: ...


@runtime_checkable
class Puller(Protocol):
    """A node that can pull checkpoints from other nodes."""

    async def pull_checkpoint(self, url: str) -> None: ...


class NodeLink:
    """The replicas ordered on one node. ``reports`` holds the latest report of each that has not ended.

    Args:
        tell: called with the events of these replicas.
        on_lost: called, perhaps more than once, when the agent does not answer; its replicas' states are then unknown.
        on_pulled: called when the node has pulled a checkpoint.
    """

    def __init__(
        self,
        name: str,
        node: AgentLink,
        tell: Callable[[Event], None],
        *,
        on_lost: Callable[[str], None],
        on_pulled: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.node = node
        self.reports: dict[str, ReplicaReport] = {}
        self._tell = tell
        self._on_lost = on_lost
        self._on_pulled = on_pulled
        self._tasks: set[asyncio.Task[None]] = set()
        self._called_off: set[str] = set()

    def start(
        self,
        replica: str,
        model: ModelConfig,
        directory: str,
        *,
        timeout_s: float | None = None,
        peer: str | None = None,
    ) -> None:
        """Order a replica; the events ``ReplicaReady`` and ``ReplicaEnded`` follow.

        Args:
            timeout_s: longest time from the start of its process until it is healthy; None: the agent's default.
            peer: where to pull its checkpoint from first; if that fails, the engine looks for the weights itself.
        """
        order = ReplicaOrder(
            id=replica,
            model=model.source,
            arguments=model.engine_order_arguments(),
            environment=model.environment,
            directory=directory,
            num_slots=model.num_accelerators,
            start_s=timeout_s,
            waits=True,
            takes_socket=self.node.is_here,
            labels=_labels_of(model),
        )
        self._in_background(self._live(order, model.name, peer))

    def find(
        self, replicas: tuple[ReplicaReport, ...], requests: Mapping[str, tuple[RequestFacts, ...]]
    ) -> tuple[FoundReplica, ...]:
        """Take over replicas that an earlier run of this router ordered; stop those that still wait for slots.

        Args:
            requests: by replica, the requests that ingresses still stream from it.
        """
        found = []
        for report in replicas:
            model = report.labels.get(MODEL_LABEL)
            if model is None or report.has_ended:
                continue
            if report.state not in _FOUND:
                self._in_background(self._stop(report.id))
                continue
            self.reports[report.id] = report
            self._in_background(self._keep_watching(report.id, model))
            if report.state == "stopping":
                self._called_off.add(report.id)
            found.append(_found(report, model, requests.get(report.id, ())))
        return tuple(found)

    def stop(self, replica: str) -> None:
        """Stop a replica; the event ``ReplicaEnded`` follows."""
        self._called_off.add(replica)
        if replica in self.reports:
            self._in_background(self._stop(replica))

    def prefetch(self, model: ModelConfig) -> None:
        """Have the node read a model's checkpoint ahead; has no effect if there is no checkpoint, or no store."""
        self._in_background(self.node.prefetch_model((model.source, *model.engine_order_arguments())))

    def copy(self, peer: str) -> None:
        """Have the node pull a checkpoint; has no effect if it can't."""
        self._in_background(self._pull(peer))

    async def close(self) -> None:
        """Cancel all tasks. The engines are ended by the owner of the node."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _live(self, order: ReplicaOrder, model: str, peer: str | None) -> None:
        """Follow one replica from its order to its end."""
        replica = order.id
        assert replica is not None
        if peer is not None:
            await self._pull(peer)
            if replica in self._called_off:
                self._called_off.discard(replica)
                self._tell(ReplicaEnded(replica, "it was called off", is_fault=False))
                return
        try:
            self.reports[replica] = await self.node.ensure_replica(order)
        except NodeUnavailable as error:
            self._on_lost(error.problem)
            return
        except NodeError as error:
            self._called_off.discard(replica)
            self._tell(ReplicaEnded(replica, error.problem, is_fault=True))
            return
        except Exception as error:  # top of a run loop: without an event the core would hold its slots for good
            logger.exception("event=order_failed replica=%s", replica)
            await self._stop(replica)  # the order may have been carried out in part
            self._called_off.discard(replica)
            self._tell(ReplicaEnded(replica, f"its order failed: {type(error).__name__}: {error}", is_fault=True))
            return
        if replica in self._called_off:
            await self._stop(replica)
        await self._keep_watching(replica, model)

    async def _keep_watching(self, replica: str, model: str) -> None:
        """Watch a replica until it has ended, also after an unexpected error: unwatched, it would keep its slots."""
        while replica in self.reports:
            try:
                await self._watch(replica, model)
                return
            except Exception:  # top of a run loop
                logger.exception("event=watch_failed replica=%s", replica)
                await asyncio.sleep(WATCH_AGAIN_S)

    async def _watch(self, replica: str, model: str) -> None:
        was_ready = False
        report, unseen = self.reports[replica], ""
        try:
            async for report in self.node.watch(replica):
                self.reports[replica] = report
                if report.is_ready and not was_ready:
                    was_ready = True
                    self._tell(ReplicaReady(replica, sample_of(report, model, self.name)))
        except NodeUnavailable as error:
            self._on_lost(error.problem)
            return
        except NodeError as error:  # the agent does not know it (any more): its slots must be released
            unseen = error.problem
        self.reports.pop(replica)
        is_fault = replica not in self._called_off and report.state != "stopped"  # an operator may stop it at the agent
        self._called_off.discard(replica)
        self._tell(ReplicaEnded(replica, unseen or reason_of(report), is_fault=is_fault, is_unseen=bool(unseen)))

    async def _pull(self, peer: str) -> None:
        if not isinstance(self.node, Puller):
            return
        try:
            await self.node.pull_checkpoint(peer)
        except NodeUnavailable as error:
            self._on_lost(error.problem)
        except NodeError as error:
            logger.warning("event=not_pulled node=%s reason=%s", self.name, error)
        else:
            self._on_pulled()

    async def _stop(self, replica: str) -> None:
        try:
            await self.node.stop_replica(replica)
        except NodeUnavailable as error:
            self._on_lost(error.problem)
        except NodeError as error:  # it ended meanwhile; ``_watch`` sends the event
            logger.info("event=stop_in_vain replica=%s reason=%r", replica, error.problem)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("event=task_failed", exc_info=error)


def _labels_of(model: ModelConfig) -> dict[str, str]:
    spec = model.spec(model.generation)
    return {MODEL_LABEL: spec.name, GENERATION_LABEL: str(spec.generation), LINEAGE_LABEL: str(spec.lineage)}


def _found(report: ReplicaReport, model: str, requests: tuple[RequestFacts, ...]) -> FoundReplica:
    return FoundReplica(
        id=report.id,
        model=model,
        generation=int(report.labels.get(GENERATION_LABEL, "0")),
        lineage=int(report.labels.get(LINEAGE_LABEL, "0")),
        num_slots=len(report.slots),
        is_ready=report.state in {"ready", "unwell"},
        is_stopping=report.state == "stopping",
        requests=requests,
    )


def sample_of(report: ReplicaReport, model: str, node: str) -> StartSample | None:
    """What a replica's start took, for the estimator; None if its report does not say."""
    start = report.start
    if start is None or start.is_warm is None:
        return None
    return StartSample(
        model=model,
        node=node,
        is_warm=start.is_warm,
        tier=tier_of(start),
        nbytes=start.nbytes or 0,
        process_s=sum(start.seconds.get(phase, 0.0) for phase in PROCESS_PHASES),
        init_s=sum(start.seconds.get(phase, 0.0) for phase in INIT_PHASES),
        weights_s=start.seconds.get(WEIGHTS_PHASE, 0.0),
    )


def tier_of(start: StartReport) -> Tier:
    """The tier that the weights came from: store memory or disk; weights read the stock way count as remote."""
    if start.load.get("outcome") != "loaded":
        return Tier.REMOTE
    return _TIERS.get(start.load.get("source", ""), Tier.DISK)


def reason_of(report: ReplicaReport) -> str:
    """Why a replica ended: the exception behind it, and the engine's own last line.

    The last line of a process that was killed is not about its end.
    """
    tail = () if report.status == -signal.SIGKILL else report.tail
    last = next((line.strip() for line in reversed(tail) if line.strip()), "")
    words = [report.reason, report.cause] if report.cause else [report.reason, last]
    told = ": ".join(word for word in words if word)
    if report.cause and last and report.cause not in last:
        told += f" (its last line: {last})"
    return told[:_REASON_CHARS_MAX]
