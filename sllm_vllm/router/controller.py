"""The controller: owns the core, feeds it events, and carries out its actions. One object on one loop; a ``Gate``."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import ChainMap, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.node.protocol import NodeReport, ReplicaReport
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.events import (
    Action,
    Dispatch,
    DrainAsked,
    Event,
    FirstByte,
    FirstToken,
    ModelDeleted,
    ModelDeployed,
    MoveAsked,
    MoveFailed,
    MoveRequest,
    NodeLost,
    Refusal,
    RejectRequest,
    ReplicaEnded,
    ReplicaReady,
    RequestArrived,
    RequestEnded,
    RequestFailed,
    RequestFound,
    RequestGone,
    RequestMoved,
    Ticked,
    UndrainAsked,
)
from sllm_vllm.router.core.facts import (
    CopyLimits,
    MoveLimits,
    PoisonLimits,
    RequestFacts,
    ResumeSample,
    RouterLimits,
    ScalingLimits,
    Tier,
)
from sllm_vllm.router.core.router import RouterCore
from sllm_vllm.router.counts import Counts
from sllm_vllm.router.engine_client.model_lengths import ModelLengths
from sllm_vllm.router.engines import AgentLink
from sllm_vllm.router.gate import Failure, MoveOrder, MoveReport, OnMove, Outcome, ServedModel, Ticket
from sllm_vllm.router.http.errors import rejected, stopping
from sllm_vllm.router.migration.movability import Movability
from sllm_vllm.router.node_watch import NodeOrders, WatchedNode
from sllm_vllm.router.pauses import in_slices

# The size of a model's weights before it has a checkpoint, from its source files. Blocking: call it in a thread.


_KINDS = ("*.safetensors", "*.bin", "*.pt")
"""vLLM reads only the first of these kinds that exists."""
_CONSOLIDATED = "consolidated"
"""Some sources hold the same weights twice: in files with this prefix and in files without it."""
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin"})


def weights_nbytes(source: Path) -> int:
    """Bytes of the weight files in a directory; 0 if it is not a directory, can't be read, or holds none."""
    if not os.path.isdir(source):  # a Hub name, which saves three searches; also False if the path is too long
        return 0
    for kind in _KINDS:
        try:
            files = [path for path in source.glob(kind) if path.name not in _NO_WEIGHTS]
            nbytes = _total_nbytes([path for path in files if not path.name.startswith(_CONSOLIDATED)] or files)
        except OSError:
            return 0
        if nbytes:
            return nbytes
    return 0


def _total_nbytes(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


logger = logging.getLogger(__name__)

TICK_S = 0.25
OUTCOMES_MAX = 256


@dataclass(frozen=True, slots=True)
class ControllerLimits:
    """Configured limits of the core.

    ``moves_max``: requests that move between engines at once; 0 turns migration off. ``holders_max``: most nodes that
    hold one hot checkpoint; 0 turns copying off. ``poison``: for requests that kill their engines.
    """

    moves_max: int = 0
    holders_max: int = 0
    poison: PoisonLimits = field(default_factory=PoisonLimits)


class Controller:
    """Runs one router's decisions, for nodes in this process or elsewhere.

    Args:
        directory: engines' working directory.
        bounds: limits of the core.
        estimator: one that has learned before, if any.
        clock: returns the core's time, in seconds.
    """

    def __init__(
        self,
        *,
        waiting_max: int,
        directory: Path,
        bounds: ControllerLimits | None = None,
        estimator: Estimator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        scaling = ScalingLimits(name_suffix=f"-{secrets.token_hex(2)}")
        bounds = bounds or ControllerLimits()
        moves = MoveLimits(is_on=bounds.moves_max > 0, moves_max=max(1, bounds.moves_max))
        copies = CopyLimits(holders_max=bounds.holders_max)
        limits = RouterLimits(
            waiting_max=waiting_max, scaling=scaling, moves=moves, copies=copies, poison=bounds.poison
        )
        self.core = RouterCore(limits, estimator)
        self.models: dict[str, ModelConfig] = {}
        self.outcomes: deque[tuple[Ticket, Outcome]] = deque(maxlen=OUTCOMES_MAX)
        self.counts = Counts()
        self._shown: dict[str, ServedModel] = {}
        self._served: tuple[ServedModel, ...] | None = ()
        """The values of ``_shown`` as a tuple; None after a change."""
        self._clock = clock
        self._loops = RunLoops()
        self._members: dict[str, WatchedNode] = {}
        self._orders = NodeOrders(self._members, self.models, directory)
        self._leaving: set[asyncio.Task[None]] = set()
        self._movability = Movability(self._tell) if bounds.moves_max else None
        self._lengths = ModelLengths(self._show)
        self._waiting: dict[str, asyncio.Future[Ticket]] = {}
        self._followers: dict[str, OnMove] = {}
        """By request: the callback that gives an order to move it to its stream."""
        self._nbytes: dict[str, int] = {}
        """By source: size of the model's weights, as last measured from the source's files."""

    # ------------------------------------------------------------------------------------------------------ lifecycle

    async def start(self, loops: RunLoops | None = None) -> None:
        """Start the controller's tick.

        Args:
            loops: runs its loops; the controller is not ready while one of them fails.
        """
        self._loops = loops or self._loops
        self._ticking = self._loops.start("the controller's tick", self._tick)

    async def add_node(
        self,
        name: str,
        node: AgentLink,
        requests: Callable[[], Mapping[str, tuple[RequestFacts, ...]]] = dict,
        *,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Add a node, with the replicas that run there already.

        Args:
            requests: returns, by replica, the requests that an earlier process of this router sent there.
            on_lost: called after the node was written off because its agent stopped answering.

        Raises:
            NodeError: its agent does not answer.
        """
        assert name not in self._members, f"node {name} is there already"

        def lose(reason: str) -> None:
            self.lose_node(name, reason)
            on_lost()

        count = self._members.__len__
        member = WatchedNode(name, node, self.models, tell=self._tell, on_lost=lose, num_nodes=count)
        self._members[name] = member
        try:
            await member.join(requests, self._loops)
        except BaseException:
            if self._members.get(name) is member:
                del self._members[name]
            await member.close()
            raise

    def lose_node(self, name: str, reason: str) -> None:
        """Write a node off, with everything that ran on it; an unknown node is ignored."""
        member = self._members.pop(name, None)
        if member is None:
            return
        logger.warning("event=node_lost node=%s reason=%r", name, reason)
        leaving = asyncio.get_running_loop().create_task(member.close())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        self._tell(NodeLost(name))

    async def close(self) -> None:
        """Stop the controller, and refuse the requests that still wait."""
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        for member in self._members.values():
            await member.close()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self._lengths.close()
        if self._movability is not None:
            await self._movability.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(stopping())

    # -------------------------------------------------------------------------------------------- interface as a gate

    def served(self) -> Sequence[ServedModel]:
        """Return the deployed models, in the order of their first deployment."""
        if self._served is None:
            self._served = tuple(self._shown.values())
        return self._served

    def is_ready(self) -> bool:
        """Whether all the controller's loops work, and at least one node's do."""
        return not self._loops.problem and any(member.is_well for member in self._members.values())

    async def acquire(self, facts: RequestFacts) -> Ticket:
        """See ``Gate``."""
        future = self._waiting[facts.id] = asyncio.get_running_loop().create_future()
        self._tell(RequestArrived(facts))
        return await self._ticket(facts.id, future)

    def found(self, facts: RequestFacts, replica: str) -> None:
        """Take over a request that runs on a replica already: an earlier process of this router sent it there."""
        self._tell(RequestFound(facts, replica))

    def gone(self, request: str) -> None:
        """Note that the process that waited for a request, or streamed it, is gone."""
        self._followers.pop(request, None)
        self._tell(RequestGone(request))

    def first_byte(self, ticket: Ticket) -> None:
        """See ``Gate``."""
        self._tell(FirstByte(ticket.request))

    def first_token(self, ticket: Ticket) -> None:
        """See ``Gate``."""
        self._tell(FirstToken(ticket.request))

    def finished(self, ticket: Ticket, outcome: Outcome) -> None:
        """See ``Gate``."""
        self.outcomes.append((ticket, outcome))
        self.counts.note_outcome(ticket, outcome)
        self._followers.pop(ticket.request, None)
        self._tell(RequestEnded(ticket.request, outcome.output_tokens))

    async def retry(self, ticket: Ticket, failure: Failure) -> Ticket:
        """See ``Gate``."""
        self._followers.pop(ticket.request, None)
        future = self._waiting[ticket.request] = asyncio.get_running_loop().create_future()
        self._tell(
            RequestFailed(
                ticket.request,
                failure.reason,
                sign=failure.sign,
                has_begun=failure.has_begun,
                is_proven=failure.is_proven,
            )
        )
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

    def call_off_move(self, request: str, order: MoveOrder) -> None:
        """Call off a migration of which it is unknown whether the order was followed."""
        self._tell(MoveFailed(request, order.target.replica, "its ingress has restarted"))

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

    # ---------------------------------------------------------------------------------------- interface for operators

    async def measure(self, models: Sequence[ModelConfig]) -> None:
        """Measure the weights of models whose sources are directories, to predict their first start."""
        sources, directory = list(dict.fromkeys(model.source for model in models)), self._orders.directory
        found = await asyncio.to_thread(lambda: [weights_nbytes(directory / source) for source in sources])
        self._nbytes.update(zip(sources, found, strict=True))

    async def change_models(self, removed: Iterable[str], deployed: Iterable[ModelConfig]) -> None:
        """Delete and deploy many models, in slices, so that requests are served meanwhile."""
        deletions = (partial(self._delete_known, name) for name in removed)
        async for change in in_slices(chain(deletions, (partial(self.deploy, one) for one in deployed))):
            change()

    def _delete_known(self, name: str) -> None:
        if name in self.models:
            self.delete(name)

    def deploy(self, model: ModelConfig) -> None:
        """Deploy a model, or change one that is deployed."""
        if self.models.get(model.name) != model:
            self._lengths.forget(model.name)
        self.models[model.name] = model
        self._show(model.name)
        told = [member.watch.what_is_known(model) for member in self._members.values()]
        tiers = dict[str, Tier](ChainMap(*(dict(there) for there, _ in told)))
        nbytes = max((num for _, num in told), default=0) or self._nbytes.get(model.source, 0)
        self._tell(ModelDeployed(replace(model.spec(model.generation), nbytes=nbytes), tiers))
        for member in self._members.values():
            member.watch.refresh()

    def delete(self, name: str) -> None:
        """Delete a model; its running requests are still answered."""
        self._nbytes.pop(self.models[name].source, None)
        del self.models[name], self._shown[name]
        self._lengths.forget(name)
        self._served = None
        self._tell(ModelDeleted(name))

    def _show(self, name: str) -> None:
        """Update the record of a model that clients see, if it is still deployed."""
        if name not in self.models:
            return
        known = self._shown.get(name)
        created_unix_s = int(time.time()) if known is None else known.created_unix_s
        self._shown[name] = ServedModel(name, created_unix_s, self.models[name].source, self._lengths.of(name))
        self._served = None

    def drain(self, target: str) -> None:
        """Drain a replica, or a node, without cutting off requests. Nothing new starts on a drained node."""
        self._tell(DrainAsked(target))

    def migrate(self, request: str, target: str | None) -> str:
        """Order a request to move to another replica. Returns why it can't; empty if it was ordered."""
        if problem := self.core.why_not_move(request, target, self._clock()):
            return problem
        self._tell(MoveAsked(request, target))
        return ""

    def undrain(self, node: str) -> None:
        """Let a drained node take starts again."""
        self._tell(UndrainAsked(node))

    def set_waiting_max(self, waiting_max: int) -> None:
        """Change how many requests may wait, of all models."""
        self.core.queues.set_total_max(waiting_max)

    def node_reports(self) -> dict[str, NodeReport]:
        """Return the nodes' last reports, by name."""
        return {name: one.report for name, one in self._members.items() if one.report is not None}

    def replica_reports(self) -> dict[str, ReplicaReport]:
        """Return the agents' last reports of live replicas, by id."""
        return {name: report for one in self._members.values() for name, report in one.engines.reports.items()}

    def report_of(self, replica: str) -> ReplicaReport | None:
        """Return its agent's last report of a replica; None if the replica is not live."""
        member = self._member_of(replica)
        return None if member is None else member.engines.reports.get(replica)

    def _member_of(self, replica: str) -> WatchedNode | None:
        known = self.core.cluster.replicas.get(replica)
        return None if known is None else self._members.get(known.node)

    def now_s(self) -> float:
        """Return the core's time."""
        return self._clock()

    # --------------------------------------------------------------------------------------------------------- effects

    def _tell(self, event: Event) -> None:
        now_s = self._clock()
        # A replica's start or end may have written a checkpoint, or brought one into memory: ask its node again below.
        member = self._member_of(event.replica) if isinstance(event, ReplicaReady | ReplicaEnded) else None
        actions = self.core.handle(event, now_s)
        self.counts.note(event, actions, now_s)
        for action in actions:
            self._do(action)
            if isinstance(action, RejectRequest) and action.why is Refusal.KILLED_ENGINE:
                logger.warning("event=request_killed_engine request=%s reason=%r", action.request, action.reason)
        if isinstance(event, ReplicaReady):
            self._ask_length(event.replica)
        if self._movability is not None:
            self._follow_movability(self._movability, event)
        if member is not None:
            member.watch.refresh()

    def _ask_length(self, replica: str) -> None:
        known, report = self.core.cluster.replicas.get(replica), self.report_of(replica)
        if known is not None and report is not None:
            self._lengths.ask(replica, known.model, url=report.url or "", api_key=report.api_key or "")

    def _follow_movability(self, movability: Movability, event: Event) -> None:
        match event:
            case ReplicaReady() if (report := self.report_of(event.replica)) is not None:
                model = self.core.cluster.replicas[event.replica].model
                movability.ask(event.replica, model, url=report.url or "", api_key=report.api_key or "")
            case ReplicaEnded():
                movability.forget(event.replica)

    def _do(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._give_ticket(action)
            case RejectRequest():
                self._reject(action)
            case MoveRequest():
                self._order_move(action)
            case _:
                self._orders.give(action)

    def _order_move(self, action: MoveRequest) -> None:
        """Pass a move order to the process that streams the request.

        Deferred, because the callback may answer at once, while actions of the core are still being carried out.
        """
        order = MoveOrder(action.source, self._ticket_of(action.request, action.target))
        logger.info("event=move request=%s source=%s target=%s", action.request, action.source, action.target)
        asyncio.get_running_loop().call_soon(self._hand_over, action.request, order)

    def _hand_over(self, request: str, order: MoveOrder) -> None:
        on_order = self._followers.get(request)
        if on_order is not None:
            on_order(order)
        else:  # it has ended, or is not followed yet
            self._tell(MoveFailed(request, order.target.replica, "no ingress streams it"))

    def _ticket_of(self, request: str, replica: str) -> Ticket:
        """Return the ticket of a request that the core knows, for a replica that is ready."""
        report = self.report_of(replica)
        assert report is not None
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
        future = self._waiting.get(action.request)
        if future is not None and not future.done():
            future.set_exception(rejected(action))

    async def _tick(self) -> None:
        await asyncio.sleep(TICK_S)
        self._tell(Ticked())
