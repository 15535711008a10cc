"""The router's decisions: ``handle(event, now_s) -> [action]``. Pure; owned by the controller's loop.

This module handles requests: admit, dispatch, retry, refuse. ``Scaling`` handles replicas.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from sllm_vllm.router.core.cluster import Replica, ReplicaState, choose_replica
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
    NodeJoined,
    NodeLost,
    NodeReported,
    Refusal,
    RejectRequest,
    ReplicaEnded,
    ReplicaMovable,
    ReplicaReady,
    RequestArrived,
    RequestEnded,
    RequestFailed,
    RequestFound,
    RequestGone,
    RequestMoved,
    Ticked,
    Todo,
    UndrainAsked,
    is_about,
)
from sllm_vllm.router.core.facts import FailureSign, PrefillSample, RequestFacts, RouterLimits, StartSample
from sllm_vllm.router.core.failures import Failures
from sllm_vllm.router.core.invariants import validate
from sllm_vllm.router.core.membership import Deployments, Membership, Recovery
from sllm_vllm.router.core.model_state import STEADY_S, CoreState, ModelState, Request
from sllm_vllm.router.core.moves import Moves
from sllm_vllm.router.core.queues import ModelQueues, QueueFull
from sllm_vllm.router.core.scaling import Scaling
from sllm_vllm.router.core.trials import FailingReplicas, Trials
from sllm_vllm.router.core.waits import due_s, what_it_waits_for

CHOICES_MAX = 8
"""Replicas examined for a request, those with the fewest requests first."""


class RouterCore:
    """All models, requests, replicas and nodes, as the router sees them.

    A request waits in its model's queue until a replica has room, first come first served within a priority. Every
    event that frees room or slots serves the queues at once, so no request waits while there is room for it.
    """

    def __init__(self, limits: RouterLimits | None = None, estimator: Estimator | None = None) -> None:
        self.limits = limits or RouterLimits()
        core_state = CoreState()
        self.models, self.requests = core_state.models, core_state.requests
        self.queues = ModelQueues(self.limits.waiting_max)
        self.scaling = Scaling(self.limits, core_state, self.queues, estimator=estimator or Estimator())
        self.cluster = self.scaling.cluster
        self.estimator = self.scaling.estimator
        self._samples: dict[str, StartSample] = {}
        """Start samples of replicas that are ready and have not answered a request yet."""
        self.failing = FailingReplicas()
        self.deployments = Deployments(self.scaling, core_state, self.queues)
        self.moves = Moves(self.limits.moves, self.scaling, core_state)
        self.trials = Trials(self.limits.poison, core_state, self.cluster, failing=self.failing)
        self._failures = Failures(self.limits, core_state, self.cluster, trials=self.trials)
        self.deaths = self._failures.deaths
        self._recovery = Recovery(self.scaling, core_state)
        self.membership = Membership(self.scaling, core_state.models, self.queues, recovery=self._recovery)
        self.events: deque[tuple[float, Event | Action]] = deque(maxlen=self.limits.story_max)

    # --------------------------------------------------------------------------------------------------- interface

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Process an event and return the actions to carry out, in order.

        The handlers below, and the parts, say in a ``Todo`` what follows; here it is followed up.
        """
        todo = Todo()
        self._note(event, now_s)
        self._record(event, now_s, todo)
        self._judge(now_s, todo)
        models = list(todo.models)
        for model in models:
            self._serve(model, now_s, todo)
            self.scaling.mark_unwanted(model, now_s)
        if todo.has_room:  # models that wait for slots come before those that freed them
            todo.add(self.scaling.feed_hungry(now_s))
        for model in models:
            todo.add(self.scaling.consider(model, now_s))
        while todo.resumed:
            self._serve(todo.resumed.pop(), now_s, todo)
        if self.cluster.draining:
            todo.actions += self.moves.relieve(now_s)
        self.events.extend((now_s, action) for action in todo.actions)
        return todo.actions

    def _note(self, event: Event, now_s: float) -> None:
        """Keep the event for ``story``; skips the frequent ones and drops bulky fields."""
        if isinstance(event, NodeJoined):
            self.events.append((now_s, replace(event, report=None, found=())))
        elif not isinstance(event, Ticked | NodeReported):
            self.events.append((now_s, event))

    def validate(self) -> None:
        """Assert every invariant. Scans the whole state; for tests and the simulator."""
        validate(self)

    def why_not_move(self, request: str, target: str | None, now_s: float) -> str:
        """Return why ``MoveAsked`` would do nothing; empty if it would order a migration."""
        return self.moves.why_not(request, target, now_s)

    def story(self, name: str) -> list[tuple[float, Event | Action]]:
        """Return the latest events and actions about a request, replica, model or node, oldest first."""
        return [(at_s, what) for at_s, what in self.events if is_about(what, name)]

    # ------------------------------------------------------------------------------------------------------ events

    def _record(self, event: Event, now_s: float, todo: Todo) -> None:
        match event:
            case RequestArrived():
                self._request_arrived(event.facts, now_s, todo)
            case FirstByte() | FirstToken():
                self._proven(event.request, now_s, todo)
                self._first_byte(event, now_s)
            case RequestEnded():
                self._learn_pace(event, now_s)
                self._request_ended(event.request, now_s, todo)
            case RequestGone():
                self._request_ended(event.request, now_s, todo)
            case RequestFailed():
                self._request_failed(event, now_s, todo)
            case ReplicaReady():
                self._replica_ready(event, now_s, todo)
            case ReplicaEnded():
                self._replica_ended(event, now_s, todo)
            case ReplicaMovable() | MoveAsked() | RequestMoved() | MoveFailed():
                todo.add(self.moves.record(event, now_s))
            case Ticked():
                self._ticked(now_s, todo)
            case _:
                self._record_setting(event, now_s, todo)

    def _record_setting(self, event: Event, now_s: float, todo: Todo) -> None:
        """Process events of operators and nodes."""
        match event:
            case ModelDeployed():
                todo.add(self.deployments.deployed(event, now_s))
            case ModelDeleted():
                self._model_deleted(event.model, now_s, todo)
            case NodeJoined():
                todo.add(self.membership.joined(event, now_s))
            case RequestFound():
                todo.add(self._recovery.request_found(event.facts, event.replica, now_s))
            case NodeReported():
                self.membership.reported(event, now_s)
            case NodeLost():
                self._node_lost(event.node, now_s, todo)
            case DrainAsked():
                todo.add(self.membership.drain_asked(event.target, now_s))
            case UndrainAsked():
                todo.add(self.membership.undrain(event.node))
            case _:
                raise AssertionError(event)

    def _model_deleted(self, model: str, now_s: float, todo: Todo) -> None:
        if model not in self.models:
            return
        while (facts := self.queues.pop(model)) is not None:
            todo.do(self._refused(RejectRequest(facts.id, Refusal.DELETED, f"model {model!r} was deleted")))
        todo.add(self.deployments.deleted(model, now_s))

    def _node_lost(self, node: str, now_s: float, todo: Todo) -> None:
        gone, more = self.membership.lost(node, now_s)
        todo.add(more)
        for replica in gone:
            self.moves.target_gone(replica, now_s)
            self._samples.pop(replica.id, None)
            self.failing.discard(replica.id)
            self.deaths.ended(replica.id, "", is_fault=False)

    # ---------------------------------------------------------------------------------------------------- requests

    def _request_arrived(self, facts: RequestFacts, now_s: float, todo: Todo) -> None:
        assert facts.id not in self.requests, f"{facts.id} arrived twice"
        state = self.models.get(facts.model)
        if state is None:
            todo.do(RejectRequest(facts.id, Refusal.UNKNOWN_MODEL, f"no model {facts.model!r}"))
            return
        self.scaling.foresight.arrived(state, now_s)
        if state.back_off.is_hopeless and state.back_off.is_resting(now_s) and not self._has_replica(facts.model):
            todo.do(_no_start(facts.id, state, now_s))
            return
        if left_s := self._failures.quarantine_left_s(facts, now_s):
            reason = f"it is refused for another {left_s:.0f} s"
            todo.do(RejectRequest(facts.id, Refusal.KILLED_ENGINE, reason, left_s))
            return
        request = self.requests[facts.id] = Request(facts, arrived_s=now_s)
        request.is_suspect = self._failures.is_suspected(facts, now_s)
        todo.models[facts.model] = None
        if not self.queues.waiting(facts.model) and request.is_ordinary:
            replica = self._choose(request, now_s)
            if replica is not None:
                todo.do(self._dispatch(facts.id, replica, now_s))
                return
        todo.do(self._enqueue(request, now_s))

    def _enqueue(self, request: Request, now_s: float) -> RejectRequest | None:
        """Queue a request; returns its refusal if there is no room."""
        facts, state = request.facts, self.models[request.facts.model]
        try:
            self.queues.push(facts, request.arrived_s, spec=state.spec, away_s=request.away_s)
        except QueueFull as error:
            startup_s = self.estimator.startup_s(state.spec)
            return self._refused(RejectRequest(facts.id, Refusal.QUEUE_FULL, str(error), startup_s))
        if request.is_suspect:
            self.trials.waits(request, now_s)
        return None

    def _serve(self, model: str, now_s: float, todo: Todo) -> None:
        """Dispatch the model's waiting requests to replicas with room."""
        while (found := self._next(model, now_s)) is not None:
            request, replica = found
            self.queues.remove(request)
            todo.do(self._dispatch(request, replica, now_s))

    def _next(self, model: str, now_s: float) -> tuple[str, Replica] | None:
        """Return the next request to dispatch, and its replica; None if none can be dispatched.

        An ordinary request that finds no replica blocks those behind it, because they would find none either. Suspects
        and begun answers, which only some replicas can take, are skipped.
        """
        for facts in self.queues.in_order(model):
            request = self.requests[facts.id]
            if (replica := self._choose(request, now_s)) is not None:
                return facts.id, replica
            if request.is_ordinary:
                return None
        return None

    def _choose(self, request: Request, now_s: float) -> Replica | None:
        facts = request.facts
        spec = self.models[facts.model].spec
        if request.is_suspect:
            found = self.trials.choose(request, now_s)
            return found if found is not None and self._is_fit(found, request) else None
        least = self.cluster.least_busy(facts.model, CHOICES_MAX)
        fit = (one for one in least if len(one.ongoing) < spec.ongoing_max and one.id not in self.failing)
        return choose_replica(
            (one for one in fit if not self.trials.is_closed(one) and self._is_fit(one, request)), facts.prefix
        )

    def _is_fit(self, replica: Replica, request: Request) -> bool:
        """Whether the replica can continue the request's answer, if that has begun.

        An engine that has not been asked yet whether it can move requests may try.
        """
        return not request.has_begun or (replica.lineage == request.lineage and not replica.is_unmovable)

    def _dispatch(self, request_id: str, replica: Replica, now_s: float) -> Dispatch:
        request = self.requests[request_id]
        request.was_alone = not replica.ongoing
        request.replica, request.dispatched_s = replica.id, now_s
        request.attempt += 1
        request.lineage, request.is_proven = replica.lineage, False
        if request.is_suspect:
            self.trials.begin(request, replica.id)
        self.cluster.begin_request(replica.id, request_id, prefix=request.facts.prefix, now_s=now_s)
        self.models[request.facts.model].num_ongoing += 1
        return Dispatch(request_id, replica.id, request.attempt)

    def _first_byte(self, event: FirstByte | FirstToken, now_s: float) -> None:
        request = self.requests.get(event.request)
        if request is None or request.replica is None or request.is_answered or isinstance(event, FirstToken):
            return
        request.is_answered, request.answered_s = True, now_s
        replica = self.cluster.replicas.get(request.replica)
        if replica is None:
            return
        prefill_s = now_s - request.dispatched_s
        if request.was_alone:
            facts = request.facts
            self.estimator.observe_prefill(PrefillSample(facts.model, replica.node, facts.prompt_tokens, prefill_s))
        sample = self._samples.pop(replica.id, None)
        if sample is not None and replica.ready_s is not None:
            self.scaling.came_true(replica.id, sample, prefill_s, ready_s=replica.ready_s)

    def _proven(self, request_id: str, now_s: float, todo: Todo) -> None:
        """Note that the replica has begun to answer the request, so the request does not kill it."""
        request = self.requests.get(request_id)
        if request is None or request.replica is None:
            return
        request.is_proven = True
        self.deaths.answered(request.replica, request_id)
        self._failures.answered(request.facts, now_s)
        if request.is_suspect and self._failures.cleared(request):
            todo.models[request.facts.model] = None

    def _learn_pace(self, event: RequestEnded, now_s: float) -> None:
        request = self.requests.get(event.request)
        state = None if request is None else self.models.get(request.facts.model)
        if request is not None and state is not None and event.output_tokens and request.is_answered:
            state.generated(event.output_tokens, now_s - request.answered_s)

    def _request_ended(self, request_id: str, now_s: float, todo: Todo) -> None:
        request = self.requests.get(request_id)
        if request is None:
            return
        self._forget(request)
        todo.models[request.facts.model] = None
        todo.do(self.moves.called_off(request, now_s))
        if request.replica is None:
            self.queues.remove(request_id)
            return
        self._leave_replica(request, now_s, todo)

    def _leave_replica(self, request: Request, now_s: float, todo: Todo) -> None:
        """Release the request's place on its replica."""
        assert request.replica is not None
        name = request.facts.id
        state = self.models.get(request.facts.model)
        if state is not None:
            state.num_ongoing -= 1
            state.served(now_s - request.dispatched_s)
        self.trials.end(request.replica, name)
        replica = self.cluster.replicas.get(request.replica)
        request.replica = None
        if replica is None or name not in replica.ongoing:
            return
        self.cluster.end_request(replica.id, name, now_s)
        if not replica.ongoing:
            self._serve(replica.model, now_s, todo)
            if not replica.ongoing:
                todo.do(self.scaling.became_idle(replica, now_s))
                todo.has_room = True

    def _request_failed(self, event: RequestFailed, now_s: float, todo: Todo) -> None:
        request = self.requests.get(event.request)
        if request is None or request.replica is None:
            return
        todo.models[request.facts.model] = None
        todo.do(self.moves.called_off(request, now_s))
        self.failing.add(request.replica, event.sign, now_s)
        is_held = self._failures.failed(request, event, now_s)
        was_reached = event.sign is not FailureSign.UNREACHED
        if was_reached:
            request.away_s += now_s - request.dispatched_s
        else:
            request.num_unreached += 1
        self._leave_replica(request, now_s, todo)
        if not is_held:
            refusal = self._failures.refusal(request, event.reason, was_reached=was_reached)
            todo.do(self._enqueue(request, now_s) if refusal is None else self._refused(refusal))

    def _judge(self, now_s: float, todo: Todo) -> None:
        """Refuse the requests that were held for the verdicts that are due, or try them again."""
        for request, refusal in self._failures.judged(now_s):
            if refusal is None or request.is_suspect:
                todo.models[request.facts.model] = None
            todo.do(self._enqueue(request, now_s) if refusal is None else self._refused(refusal))

    def _replica_ready(self, event: ReplicaReady, now_s: float, todo: Todo) -> None:
        replica = self.cluster.replicas.get(event.replica)
        if replica is None or replica.state is not ReplicaState.ORDERED:
            return
        state = self.models.get(replica.model)
        if event.sample is not None:
            self.estimator.observe_start(event.sample)
            self._samples[event.replica] = event.sample
        self.cluster.set_state(event.replica, ReplicaState.READY, now_s)
        self.scaling.load_over(replica.node, event.replica, now_s)
        if state is None or state.spec.generation != replica.generation:
            todo.do(self.scaling.stop(event.replica, "its model was changed", now_s))
            return
        self.scaling.became_ready(state, now_s)
        self.scaling.pin(replica.model)
        for old in self.cluster.replicas_of(replica.model, ReplicaState.READY):
            if old.generation != state.spec.generation:
                todo.do(self.scaling.drain(old.id, now_s))
        self._serve(replica.model, now_s, todo)
        todo.models[replica.model] = None
        if not replica.ongoing:
            todo.do(self.scaling.became_idle(replica, now_s))
            todo.has_room = True

    def _replica_ended(self, event: ReplicaEnded, now_s: float, todo: Todo) -> None:
        replica = self.cluster.replicas.get(event.replica)
        has_died = event.is_fault and not event.is_unseen
        if replica is not None and has_died and (unproven := self._failures.unproven(replica)):
            self.deaths.suspect(event.replica, unproven, now_s)
        self.deaths.ended(event.replica, event.reason, is_fault=has_died)
        self._samples.pop(event.replica, None)
        self.failing.discard(event.replica)
        if replica is None:
            return
        todo.add(self.scaling.ended(replica, now_s))
        self.moves.target_gone(replica, now_s)
        todo.has_room = True
        todo.models[replica.model] = None
        self.scaling.pin(replica.model)
        state = self.models.get(replica.model)
        if state is None or not event.is_fault:
            return
        if replica.ready_s is None or now_s - replica.ready_s < STEADY_S:
            self.scaling.failed(state, event.reason, now_s)
        if state.back_off.is_hopeless and not self._has_replica(replica.model):
            while (facts := self.queues.pop(replica.model)) is not None:
                todo.do(self._refused(_no_start(facts.id, state, now_s)))

    def _has_replica(self, model: str) -> bool:
        return bool(self.cluster.replicas_of(model, ReplicaState.READY))

    def _ticked(self, now_s: float, todo: Todo) -> None:
        for facts in self.queues.expire(now_s):
            todo.models[facts.model] = None
            todo.do(self._waited_long(self.requests[facts.id], now_s))
        for replica_id in self.failing.cleared(now_s):
            if (replica := self.cluster.replicas.get(replica_id)) is not None:
                todo.models[replica.model] = None
        self.scaling.forget_failures(now_s)
        todo.look_at(self.trials.models())
        for request_id in self.trials.overdue(now_s):
            self._failures.cleared(self.requests[request_id])
        todo.actions += self.scaling.end_idle(now_s)
        todo.actions += self.scaling.foresight.errands(now_s)
        todo.add(self.scaling.drain_for_starving(now_s))
        todo.look_at(self.scaling.to_consider(now_s))
        todo.has_room = True

    def _waited_long(self, request: Request, now_s: float) -> RejectRequest | None:
        """Refuse a request that has reached its deadline, or extend the deadline if an engine is about to be ready."""
        facts, state = request.facts, self.models[request.facts.model]
        until_s = due_s(state.spec, self.cluster) if facts.deadline_s is None and state.spec.waits_for_start else None
        latest_s = request.arrived_s + state.spec.queue_s_max + self.limits.scaling.start_s_most
        if until_s is not None and now_s < min(until_s, latest_s):
            extended = replace(facts, deadline_s=min(until_s, latest_s))
            self.queues.put_back(extended, request.arrived_s, spec=state.spec)
            return None
        if state.back_off.reason and not self._has_replica(facts.model):
            return self._refused(_no_start(facts.id, state, now_s))
        why, retry_s = what_it_waits_for(state, self.scaling, now_s, failing=self.failing)
        return self._refused(RejectRequest(facts.id, Refusal.TOO_LATE, why, retry_s))

    def _refused(self, refusal: RejectRequest) -> RejectRequest:
        """Forget a request that is refused."""
        self._forget(self.requests[refusal.request])
        return refusal

    def _forget(self, request: Request) -> None:
        """Forget a request that ends or has ended, and remove it from the trials and verdicts it waits for."""
        del self.requests[request.facts.id]
        if request.is_suspect:
            self.trials.waits_no_more(request)
        if request.is_held:
            self.deaths.left(request.facts.id)
            request.is_held = False
        elif request.replica is not None and not request.is_proven:
            self.deaths.left(request.facts.id)


def _no_start(request: str, state: ModelState, now_s: float) -> RejectRequest:
    """Refuse a request because its model's starts fail."""
    back_off = state.back_off
    return RejectRequest(request, Refusal.NO_START, back_off.reason, max(1.0, back_off.until_s - now_s))
