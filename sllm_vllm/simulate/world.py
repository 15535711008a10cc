"""The simulated world: carries out a policy's orders on a virtual clock and sends it the events. Seeded.

Orders take effect and events arrive at once, except that a dead engine may be noticed first by its requests or first by
its node. An impossible order (a slot used twice, a request sent twice) is an ``AssertionError``: a fault of the policy,
or of the world.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from sllm_vllm.router.core.events import (
    Dispatch,
    Event,
    FirstByte,
    ModelDeployed,
    MoveFailed,
    MoveRequest,
    PrefetchModel,
    RejectRequest,
    RequestArrived,
    RequestEnded,
    RequestFailed,
    RequestGone,
    RequestMoved,
    StartReplica,
    StopReplica,
    Ticked,
)
from sllm_vllm.router.core.facts import RequestFacts, ResumeSample
from sllm_vllm.simulate.engines import NOTICE_S, Agenda, SimulatedEngines
from sllm_vllm.simulate.hardware import HardwareCluster
from sllm_vllm.simulate.machines import SimulatedReplica, Stage
from sllm_vllm.simulate.policy import Order, PreemptRequest, SchedulingPolicy, Validated
from sllm_vllm.simulate.run import End, RequestOutcome, Run
from sllm_vllm.simulate.workload import SimulatedRequest

TICK_S = 0.5
PATIENCE_S = 3600.0
"""Time after the last arrival at which requests that have not ended count as lost."""


class World:
    """One simulated run. Handles requests; ``SimulatedEngines`` handles nodes and replicas."""

    def __init__(
        self, cluster: HardwareCluster, policy: SchedulingPolicy, *, seed: int, is_validated: bool = False
    ) -> None:
        self.cluster = cluster
        self.policy = policy
        self.agenda = Agenda()
        self.result = Run()
        self._leaving = random.Random(f"leaving {seed}")
        """Drawn from in the order of arrival, so that the same clients leave under every policy."""
        rng = random.Random(f"engines {seed}")
        self.engines = SimulatedEngines(
            cluster, self.agenda, self.result, rng=rng, tell=self.tell, interrupt=self._interrupt
        )
        self._is_validated = is_validated
        self._num_open = 0
        """Requests that have not ended, including those that have not arrived yet."""

    def run(self, requests: Sequence[SimulatedRequest]) -> Run:
        """Run until every request has ended. Requests that never do have no ``end`` in the result. Called once."""
        self.engines.join()
        for model, kind in self.engines.classes.items():
            self.tell(ModelDeployed(self.cluster.spec(model, kind)))
        self._num_open = len(requests)
        for request in requests:
            self.agenda.at(request.at_s, partial(self._arrive, request))
        self._tick()
        until_s = max((request.at_s for request in requests), default=0.0) + PATIENCE_S
        while self._num_open and self.agenda.step(until_s):
            pass
        for replica in self.engines.replicas.values():
            self.engines.count(replica)
        self.result.end_s = self.agenda.now_s
        return self.result

    def tell(self, event: Event) -> None:
        """Send the policy an event and carry out its orders."""
        self._obey(self.policy.handle(event, self.agenda.now_s))

    def _obey(self, orders: Sequence[Order]) -> None:
        for order in orders:
            self._carry_out(order)
        if self._is_validated:
            self.engines.validate()
            if isinstance(self.policy, Validated):
                self.policy.validate()

    def _tick(self) -> None:
        self.engines.report_changes()
        self.tell(Ticked())
        self.agenda.after(TICK_S, self._tick)

    # -------------------------------------------------------------------------------------------------- the orders

    def _carry_out(self, order: Order) -> None:
        match order:
            case StartReplica():
                self.engines.start(order)
            case StopReplica():
                self.engines.stop(order)
            case Dispatch():
                self._dispatch(order)
            case RejectRequest():
                self._reject(order)
            case PrefetchModel():
                self.engines.prefetch(order)
            case MoveRequest():
                self._move(order)
            case PreemptRequest():
                self._preempt(order)

    def _dispatch(self, order: Dispatch) -> None:
        outcome = self.result.outcomes[order.request]
        replica = self.engines.replicas.get(order.replica)
        assert outcome.end is None, f"{order.request} is sent after its end"
        assert outcome.replica is None, f"{order.request} is sent twice"
        if replica is None or replica.stage is not Stage.READY:
            self.agenda.after(NOTICE_S, partial(self._tell_failed, order.request, "no connection"))
            return
        assert replica.model == outcome.request.model, f"{order.request} is sent to {replica.model}"
        self._expect_room(replica)
        outcome.replica, outcome.dispatched_s = replica.id, self.agenda.now_s
        outcome.num_dispatches += 1
        assert replica.ready_s is not None
        outcome.ordered_s, outcome.ready_s = replica.ordered_s, replica.ready_s
        outcome.is_cold = outcome.is_cold or replica.ready_s > outcome.request.at_s
        self._begin(replica, outcome)

    def _expect_room(self, replica: SimulatedReplica) -> None:
        ongoing_max = self.cluster.serving.ongoing_max
        assert len(replica.ongoing) < ongoing_max, f"{replica.id} has {ongoing_max} requests already"

    def _begin(self, replica: SimulatedReplica, outcome: RequestOutcome) -> None:
        replica.ongoing[outcome.request.id] = outcome
        first_s = replica.begin_prefill(outcome.request.prompt_tokens, self.agenda.now_s)
        self.agenda.at(first_s, partial(self._first_token, replica, outcome, outcome.num_dispatches))

    def _reject(self, order: RejectRequest) -> None:
        outcome = self.result.outcomes[order.request]
        assert outcome.replica is None, f"{order.request} is rejected on {outcome.replica}"
        self._settle(outcome, End.REJECTED, order.why.value)

    def _preempt(self, order: PreemptRequest) -> None:
        outcome = self.result.outcomes[order.request]
        assert outcome.replica == order.replica, f"{order.request} is on {outcome.replica}"
        self._take_away(outcome)
        outcome.replica, outcome.first_s = None, None
        self.result.num_preemptions += 1

    def _move(self, order: MoveRequest) -> None:
        """Simulate a move as two rounds: all tokens so far, then the few generated meanwhile (the paper, section 5)."""
        source, outcome = self.engines.replicas.get(order.source), self.result.outcomes[order.request]
        if source is None:
            self.agenda.after(NOTICE_S, partial(self._tell_not_moved, order))
            return
        assert outcome.replica == order.source, f"{order.request} is on {outcome.replica}"
        left = source.tokens_left(order.request, self.agenda.now_s)
        num_answered = 0 if left is None else outcome.request.output_tokens - round(left)
        num_tokens = outcome.request.prompt_tokens + num_answered
        first_s = source.kind.prefill_s(num_tokens)
        num_more = 0 if left is None else min(round(left), int(first_s / source.kind.tpot_s))
        second_s = source.kind.prefill_s(num_more)
        self.result.num_recomputed_tokens += num_tokens + num_more
        sample = ResumeSample(source.model, source.node.id, num_tokens, first_s)
        switch = partial(self._switch, order, outcome, (outcome.num_dispatches, sample))
        self.agenda.after(first_s + second_s, switch)

    # ------------------------------------------------------------------------------------------------- the requests

    def _arrive(self, request: SimulatedRequest) -> None:
        self.result.outcomes[request.id] = outcome = RequestOutcome(request)
        failures = self.cluster.failures
        if self._leaving.random() < failures.leave_share:
            self.agenda.after(self._leaving.uniform(0.0, failures.leave_s_max), partial(self._leave, outcome))
        self.tell(RequestArrived(RequestFacts(request.id, request.model, prompt_tokens=request.prompt_tokens)))

    def _leave(self, outcome: RequestOutcome) -> None:
        if outcome.end is None:
            self._take_away(outcome)
            self._settle(outcome, End.LEFT)
            self.tell(RequestGone(outcome.request.id))

    def _first_token(self, replica: SimulatedReplica, outcome: RequestOutcome, dispatch: int) -> None:
        request = outcome.request
        is_there = outcome.replica == replica.id and outcome.num_dispatches == dispatch and outcome.end is None
        if not is_there or replica.stage is not Stage.READY:
            return
        outcome.first_s = self.agenda.now_s
        replica.begin_decode(request.id, request.output_tokens, self.agenda.now_s)
        self._foresee(replica)
        self.tell(FirstByte(request.id))

    def _foresee(self, replica: SimulatedReplica) -> None:
        """Schedule the end of the request that ends first; called when the replica's batch has changed."""
        replica.version += 1
        end = replica.next_end(self.agenda.now_s)
        if end is not None:
            self.agenda.at(end[0], partial(self._answer, replica, replica.version, end[1]))

    def _answer(self, replica: SimulatedReplica, version: int, request: str) -> None:
        if replica.version != version or replica.stage is Stage.GONE:
            return
        outcome = replica.ongoing[request]
        self._take_away(outcome)
        self._settle(outcome, End.ANSWERED)
        self.tell(RequestEnded(request, outcome.request.output_tokens))

    def _take_away(self, outcome: RequestOutcome) -> None:
        """Take a request off its replica, if it is on one."""
        replica = self.engines.replicas.get(outcome.replica or "")
        if replica is not None and outcome.request.id in replica.ongoing:
            replica.remove(outcome.request.id, self.agenda.now_s)
            self._foresee(replica)

    def _settle(self, outcome: RequestOutcome, end: End, why: str = "") -> None:
        assert outcome.end is None, f"{outcome.request.id} ended twice: {outcome.end}, {end}"
        outcome.end, outcome.why, outcome.ended_s = end, why, self.agenda.now_s
        self._num_open -= 1

    def _interrupt(self, replica: SimulatedReplica) -> None:
        """Handle the death of a replica: requests without a token may be sent elsewhere, the others end as they are."""
        for outcome in list(replica.ongoing.values()):
            if outcome.end is not None or outcome.replica != replica.id:
                continue
            outcome.replica = None
            if outcome.first_s is None:
                self.tell(RequestFailed(outcome.request.id, "its engine died"))
            else:
                self._settle(outcome, End.BROKEN)
                self.tell(RequestEnded(outcome.request.id))

    def _tell_failed(self, request: str, reason: str) -> None:
        if self.result.outcomes[request].end is None:
            self.tell(RequestFailed(request, reason))

    def _tell_not_moved(self, order: MoveRequest) -> None:
        self.tell(MoveFailed(order.request, order.target, "an engine died"))

    def _switch(self, order: MoveRequest, outcome: RequestOutcome, begun: tuple[int, ResumeSample]) -> None:
        """The target has recomputed the source's tokens: continue the request there."""
        dispatch, sample = begun
        source, target = self.engines.replicas.get(order.source), self.engines.replicas.get(order.target)
        is_there = outcome.replica == order.source and outcome.num_dispatches == dispatch and outcome.end is None
        if not is_there:
            return
        if source is None or target is None or target.stage is not Stage.READY:
            self._tell_not_moved(order)
            return
        self._expect_room(target)
        left = source.remove(outcome.request.id, self.agenda.now_s)
        self._foresee(source)
        outcome.replica = target.id
        outcome.num_dispatches += 1
        if left is None:
            self._begin(target, outcome)
        else:
            target.ongoing[outcome.request.id] = outcome
            target.begin_decode(outcome.request.id, left, self.agenda.now_s)
            self._foresee(target)
        self.result.num_moves += 1
        self.tell(RequestMoved(outcome.request.id, target.id, (sample,)))
