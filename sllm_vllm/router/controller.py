"""The controller: owns the core, feeds it what happens, and does what it says. One object on one loop; a ``Gate``."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sllm_vllm.node.protocol import NodeReport
from sllm_vllm.router.config import ModelConfig
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.events import (
    Action,
    Dispatch,
    DrainAsked,
    Event,
    FirstByte,
    ModelDeleted,
    ModelDeployed,
    MoveAsked,
    MoveFailed,
    MoveRequest,
    PrefetchModel,
    Refusal,
    RejectRequest,
    ReplicaEnded,
    ReplicaReady,
    RequestArrived,
    RequestEnded,
    RequestFailed,
    RequestGone,
    RequestMoved,
    StartReplica,
    StopReplica,
    Ticked,
    UndrainAsked,
)
from sllm_vllm.router.core.facts import RequestFacts, ResumeSample
from sllm_vllm.router.core.limits import MoveLimits, RouterLimits, ScalingLimits
from sllm_vllm.router.core.router import RouterCore
from sllm_vllm.router.counts import Counts
from sllm_vllm.router.engines import Engines, Node
from sllm_vllm.router.gate import MoveOrder, MoveReport, OnMove, Outcome, Rejected, ServedModel, Ticket
from sllm_vllm.router.movability import Movability
from sllm_vllm.router.node_watch import NodeWatch
from sllm_vllm.router.weights_size import weights_nbytes

logger = logging.getLogger(__name__)

TICK_S = 0.25
OUTCOMES_MAX = 256
_STATUS = {
    Refusal.UNKNOWN_MODEL: (404, "invalid_request_error", "model_not_found"),
    Refusal.DELETED: (404, "invalid_request_error", "model_not_found"),
    Refusal.QUEUE_FULL: (429, "rate_limit_error", "queue_full"),
    Refusal.TOO_LATE: (503, "server_error", "no_capacity"),
    Refusal.NO_START: (503, "server_error", "engine_start_failed"),
    Refusal.ENGINE_FAILED: (502, "server_error", "engine_failed"),
}


class Controller:
    """One router's decisions, for one node in this process.

    Args:
        directory: engines' working directory.
        moves_max: requests that move between engines at once; 0: none ever does.
        estimator: what was learned before.
        clock: seconds; the core's time.
    """

    def __init__(
        self,
        node: Node,
        *,
        waiting_max: int,
        directory: Path,
        moves_max: int = 0,
        estimator: Estimator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        scaling = ScalingLimits(name_suffix=f"-{secrets.token_hex(2)}")
        moves = MoveLimits(is_on=moves_max > 0, moves_max=max(1, moves_max))
        self.core = RouterCore(RouterLimits(waiting_max=waiting_max, scaling=scaling, moves=moves), estimator)
        self.models: dict[str, ModelConfig] = {}
        self.outcomes: deque[tuple[Ticket, Outcome]] = deque(maxlen=OUTCOMES_MAX)
        self.counts = Counts()
        self._created: dict[str, int] = {}
        self._served: tuple[ServedModel, ...] = ()
        self._directory = directory
        self._clock = clock
        self._engines = Engines("local", node, self._tell)
        self._movability = Movability(self._tell) if moves_max else None
        self._waiting: dict[str, asyncio.Future[Ticket]] = {}
        self._followers: dict[str, OnMove] = {}
        """By request: who is to be told that it moves."""
        self._watch = NodeWatch(self._engines.name, node, self.models, tell=self._tell)
        self._nbytes: dict[str, int] = {}
        """Of the weights of models by their source, as the source's own files had it when it was measured last."""
        self._tasks: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------------------------------------------------- its life

    async def start(self) -> None:
        """Take the node in, and begin to count time."""
        await self._watch.join()
        loop = asyncio.get_running_loop()
        work = (self._tick(), self._watch.keep_reporting(), self._watch.watch_warm())
        self._tasks = [loop.create_task(one) for one in work]
        for task in self._tasks:
            task.add_done_callback(_tell_failure)

    async def close(self) -> None:
        """Stop deciding; who still waits is told."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._watch.close()
        if self._movability is not None:
            await self._movability.close()
        await self._engines.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Rejected(503, "server_error", "The router is stopping.", retry_after_s=5.0))

    # ----------------------------------------------------------------------------------------------------- as a gate

    def served(self) -> Sequence[ServedModel]:
        """The models that were deployed, in that order."""
        return self._served

    def is_ready(self) -> bool:
        """As soon as the node is known, and as long as nothing that has to run for ever has ended."""
        return self._watch.report is not None and not any(task.done() for task in self._tasks)

    async def acquire(self, facts: RequestFacts) -> Ticket:
        """See ``Gate``."""
        future = self._waiting[facts.id] = asyncio.get_running_loop().create_future()
        self._tell(RequestArrived(facts))
        return await self._ticket(facts.id, future)

    def first_byte(self, ticket: Ticket) -> None:
        """See ``Gate``."""
        self._tell(FirstByte(ticket.request))

    def finished(self, ticket: Ticket, outcome: Outcome) -> None:
        """See ``Gate``."""
        self.outcomes.append((ticket, outcome))
        self.counts.note_outcome(ticket, outcome)
        self._followers.pop(ticket.request, None)
        self._tell(RequestEnded(ticket.request, outcome.output_tokens))

    async def retry(self, ticket: Ticket, reason: str) -> Ticket:
        """See ``Gate``."""
        self._followers.pop(ticket.request, None)
        future = self._waiting[ticket.request] = asyncio.get_running_loop().create_future()
        self._tell(RequestFailed(ticket.request, reason))
        return await self._ticket(ticket.request, future)

    def follow(self, ticket: Ticket, on_order: OnMove) -> None:
        """See ``Gate``."""
        self._followers[ticket.request] = on_order

    def moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport) -> None:
        """See ``Gate``."""
        self.counts.note_move(report, outcome="moved")
        self._tell(RequestMoved(ticket.request, order.target.replica, self._samples(order, report)))

    def not_moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport, *, reason: str, is_lasting: bool) -> None:
        """See ``Gate``."""
        self.counts.note_move(report, outcome="not_moved")
        samples = self._samples(order, report)
        self._tell(MoveFailed(ticket.request, order.target.replica, reason, is_lasting=is_lasting, samples=samples))

    def _samples(self, order: MoveOrder, report: MoveReport) -> tuple[ResumeSample, ...]:
        target = self.core.cluster.replicas.get(order.target.replica)
        if target is None:
            return ()
        return tuple(ResumeSample(target.model, target.node, num, seconds) for num, seconds in report.samples)

    async def _ticket(self, request: str, future: asyncio.Future[Ticket]) -> Ticket:
        try:
            return await future
        except asyncio.CancelledError:
            self._tell(RequestGone(request))
            raise
        finally:
            if self._waiting.get(request) is future:
                del self._waiting[request]

    # ------------------------------------------------------------------------------------------------- as an operator

    async def measure(self, models: Sequence[ModelConfig]) -> None:
        """Look how large models' sources are, where they are directories: their first start is predicted by it."""
        for source in dict.fromkeys(model.source for model in models):
            self._nbytes[source] = await asyncio.to_thread(weights_nbytes, self._directory / source)

    def deploy(self, model: ModelConfig) -> None:
        """Serve a model, or serve it otherwise from now on."""
        self.models[model.name] = model
        self._created.setdefault(model.name, int(time.time()))
        self._list_served()
        tiers, nbytes = self._watch.what_is_known(model)
        spec = replace(model.spec(model.generation), nbytes=nbytes or self._nbytes.get(model.source, 0))
        self._tell(ModelDeployed(spec, tiers))
        self._watch.refresh()

    def delete(self, name: str) -> None:
        """Serve it no more; requests that run are answered."""
        self._nbytes.pop(self.models[name].source, None)
        del self.models[name], self._created[name]
        self._list_served()
        self._tell(ModelDeleted(name))

    def _list_served(self) -> None:
        """Once a change, and not once a request."""
        self._served = tuple(ServedModel(name, self._created[name], one.source) for name, one in self.models.items())

    def drain(self, target: str) -> None:
        """Have a replica, or all of a node, end without harm to a request; on the node nothing starts any more."""
        self._tell(DrainAsked(target))

    def migrate(self, request: str, target: str | None) -> str:
        """Have a request go on at another replica; says why it can't, or nothing if it was ordered."""
        if problem := self.core.why_not_move(request, target, self._clock()):
            return problem
        self._tell(MoveAsked(request, target))
        return ""

    def undrain(self, node: str) -> None:
        """Have a node take starts again."""
        self._tell(UndrainAsked(node))

    def set_waiting_max(self, waiting_max: int) -> None:
        """So many requests may wait from now on."""
        self.core.queues.set_total_max(waiting_max)

    @property
    def engines(self) -> Engines:
        """The node's replicas that were ordered here."""
        return self._engines

    @property
    def node_report(self) -> NodeReport | None:
        """The node's last one."""
        return self._watch.report

    def now_s(self) -> float:
        """The core's time."""
        return self._clock()

    def recent(self, num_max: int) -> list[tuple[float, Event | Action]]:
        """The core's last events and actions, oldest first."""
        events = self.core.events
        return list(itertools.islice(events, max(0, len(events) - num_max), None))

    # --------------------------------------------------------------------------------------------------------- effects

    def _tell(self, event: Event) -> None:
        now_s = self._clock()
        actions = self.core.handle(event, now_s)
        self.counts.note(event, actions, now_s)
        for action in actions:
            self._do(action)
        if self._movability is not None:
            self._follow_movability(self._movability, event)
        if isinstance(event, ReplicaReady | ReplicaEnded):  # it may have made a checkpoint, or brought one into memory
            self._watch.refresh()

    def _follow_movability(self, movability: Movability, event: Event) -> None:
        match event:
            case ReplicaReady() if (replica := self.core.cluster.replicas.get(event.replica)) is not None:
                report = self._engines.reports[event.replica]
                movability.ask(replica.id, replica.model, url=report.url or "", api_key=report.api_key or "")
            case ReplicaEnded():
                movability.forget(event.replica)

    def _do(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._give_ticket(action)
            case RejectRequest():
                self._reject(action)
            case StartReplica():
                logger.info("event=start replica=%s model=%r node=%s", action.replica, action.model, action.node)
                self._engines.start(action.replica, self.models[action.model], str(self._directory))
            case StopReplica():
                logger.info("event=stop replica=%s reason=%r", action.replica, action.reason)
                self._engines.stop(action.replica)
            case PrefetchModel():
                self._engines.prefetch(self.models[action.model])
                self._watch.prefetch_ordered(action.model)
            case MoveRequest():
                self._order_move(action)

    def _order_move(self, action: MoveRequest) -> None:
        """Tell whoever streams it. Later, as it may answer at once, and the core is still being obeyed."""
        order = MoveOrder(action.source, self._ticket_of(action.request, action.target))
        logger.info("event=move request=%s source=%s target=%s", action.request, action.source, action.target)
        asyncio.get_running_loop().call_soon(self._hand_over, action.request, order)

    def _hand_over(self, request: str, order: MoveOrder) -> None:
        on_order = self._followers.get(request)
        if on_order is not None:
            on_order(order)
        else:  # it has ended, or has not begun to be followed
            self._tell(MoveFailed(request, order.target.replica, "nobody streams it"))

    def _ticket_of(self, request: str, replica: str) -> Ticket:
        """Of a request that the core knows, for a replica that is ready."""
        report = self._engines.reports[replica]
        assert report.url is not None
        assert report.api_key is not None
        known = self.core.requests[request]
        return Ticket(
            request=request,
            replica=replica,
            model=known.facts.model,
            url=report.url,
            api_key=report.api_key,
            attempt=known.attempt,
        )

    def _give_ticket(self, dispatch: Dispatch) -> None:
        ticket = self._ticket_of(dispatch.request, dispatch.replica)
        future = self._waiting.get(dispatch.request)
        if future is not None and not future.done():
            future.set_result(ticket)

    def _reject(self, action: RejectRequest) -> None:
        status, kind, code = _STATUS[action.why]
        future = self._waiting.get(action.request)
        if future is not None and not future.done():
            message = f"{action.why.value[0].upper()}{action.why.value[1:]}: {action.reason}"
            future.set_exception(Rejected(status, kind, message, retry_after_s=action.retry_after_s, code=code))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._tell(Ticked())


def _tell_failure(task: asyncio.Task[None]) -> None:
    """None of them ever ends by itself: without one the router stands still, and that must not be silent."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("event=controller_failed", exc_info=error)
