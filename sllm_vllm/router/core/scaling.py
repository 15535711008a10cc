"""Which replicas should exist: starts, evictions, drains, keep-alive. Pure; the part of ``RouterCore`` about engines.

A plan that evicts is carried out in two steps. First its victims are stopped, and the slots they free are held for it;
when the last victim has ended, its own replica is started. So no slot is ever promised twice.
"""

from __future__ import annotations

import math

from sllm_vllm.router.core.alarms import Alarms
from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.events import Action, StartReplica, StopReplica, Todo
from sllm_vllm.router.core.facts import ModelSpec, RouterLimits, StartSample
from sllm_vllm.router.core.foresight import Foresight
from sllm_vllm.router.core.keep_alive import desired_replicas
from sllm_vllm.router.core.model_state import STEADY_S, CoreState, ModelState, Prediction
from sllm_vllm.router.core.pending import PendingStart, PendingStarts, slug_of
from sllm_vllm.router.core.placement import (
    Plan,
    PlanKind,
    Relocation,
    best_plan,
    find_room,
    fits_somewhere,
    plan_in,
    plan_starts,
)
from sllm_vllm.router.core.queues import Hungry, ModelQueues
from sllm_vllm.router.core.rules import RuleBook


class Scaling:
    """Decides on starts and stops, updates the cluster, and returns what is to be done. Owned by ``RouterCore``."""

    def __init__(
        self, limits: RouterLimits, core_state: CoreState, queues: ModelQueues, *, estimator: Estimator
    ) -> None:
        models = core_state.models
        self.limits = limits.scaling
        self.cluster = Cluster()
        self.estimator = estimator
        self.rule_book = RuleBook(limits, core_state, cluster=self.cluster, estimator=estimator)
        self.pending = PendingStarts(self.cluster)
        self._loads: dict[str, dict[str, float]] = {}
        """Loads under way, by node and replica: how long each is expected to take."""
        self.predictions: dict[str, Prediction] = {}
        """By replica until its first answer; after that by model, the last one that has come true."""
        self._models = models
        self._suspects_waiting = core_state.suspects_waiting
        self._queues = queues
        self._hungry = Hungry(queues)
        self._blocking: str | None = None
        """The starving model that is next to have replicas drained for it; no waiting model may overtake it."""
        self.foresight = Foresight(self.cluster, estimator, models, limits=limits)
        self._later = Alarms()
        """By model: when to call ``consider`` again."""
        self._steady = Alarms()
        """By model with failed starts: when it has had a replica for ``STEADY_S``."""
        self._num_started = 0

    # ---------------------------------------------------------------------------------------------------- wanting

    def consider(self, model: str, now_s: float) -> Todo | None:
        """Start the replicas that a model lacks, or end those too many. Returns None if it has as many as it should."""
        state = self._models.get(model)
        if state is None:
            self._hungry.discard(model)
            return None
        spec, waiting = state.spec, self._queues.waiting(model)
        num_now = self.num_coming(model) + len(self._ready(model))
        wanted = desired_replicas(
            spec, ongoing=state.num_ongoing, waiting=waiting, num_now=num_now, now_s=now_s, state=state.autoscale
        )
        is_for_trial = model in self._suspects_waiting
        if is_for_trial:
            wanted = max(wanted, min(spec.max_replicas, len(self._ready(model)) + 1))
        todo = self._shed(state, wanted, now_s) if num_now > wanted else None
        while num_now < wanted:
            pays = is_for_trial or not num_now or self._pays(state, num_now, now_s)
            if state.back_off.is_resting(now_s) or not pays:
                break
            todo = todo or Todo()
            started = self._start_one(state, now_s, most=PlanKind.MIGRATE if waiting else PlanKind.START)
            if started is None:
                todo.is_short = True
                break
            todo.actions += started
            num_now += 1
        if todo is not None and todo.is_short and fits_somewhere(self.cluster, spec.accelerators):
            self._hungry.add(spec)
        else:  # a model for which no node is large enough would only block others
            self._hungry.discard(model)
        return todo

    def mark_unwanted(self, model: str, now_s: float) -> None:
        """Mark the model's starts that no request waits for: they continue until another start needs their slots."""
        state, ordered = self._models.get(model), self.cluster.replicas_of(model, ReplicaState.ORDERED)
        num_kept = 0 if state is None else state.spec.min_replicas - len(self._ready(model))
        is_waited_for = state is None or state.num_ongoing > 0 or self._queues.waiting(model) > 0
        for number, replica in enumerate(ordered):
            self.cluster.set_unwanted(replica.id, not is_waited_for and number >= num_kept, now_s)

    def _shed(self, state: ModelState, wanted: int, now_s: float) -> Todo:
        """End surplus replicas: planned and starting ones, then idle ones. Drain busy ones beyond the maximum."""
        spec, todo = state.spec, Todo()
        for pending in self.pending.of_model(spec.name)[wanted:]:
            todo.resumed += self.call_off(pending, now_s)
        ready = self._ready(spec.name)
        idle = [replica for replica in ready if not replica.ongoing][: max(0, len(ready) - wanted)]
        for replica in [*self._ordered(spec)[max(0, wanted - len(ready)) :], *idle]:
            todo.do(self.stop(replica.id, "too many", now_s))
        for replica in self._ready(spec.name)[spec.max_replicas :]:
            todo.do(self.drain(replica.id, now_s))
        return todo

    def feed_hungry(self, now_s: float) -> Todo:
        """Try to start hungry models, in order, after slots may have been freed. No model may overtake a starving one.

        After a model finds no place, those that need as many slots or more are skipped.
        """
        todo = Todo()
        todo.add(self._start_sooner(now_s))
        num_slots_in_vain = math.inf
        for model in self._hungry.first(self.limits.hungry_max):
            state = self._models.get(model)
            if state is None or state.spec.accelerators >= num_slots_in_vain:
                continue
            found = self.consider(model, now_s)
            todo.add(found)
            if found is not None and found.is_short:
                num_slots_in_vain = min(num_slots_in_vain, state.spec.accelerators)
                if model == self._blocking:
                    break
        return todo

    def drain_for_starving(self, now_s: float) -> Todo | None:
        """If the first hungry model is starving, drain the replicas with the fewest requests that make room for it.

        One model at a time: the next one's turn comes when the replicas draining for this one have ended.
        """
        self._blocking = None
        todo = self._call_off_vain_drain(now_s)
        model = next(iter(self._hungry.first(1)), None)
        state = None if model is None else self._models.get(model)
        if state is None or not self._is_starving(state.spec.name, now_s) or state.back_off.is_resting(now_s):
            return todo
        spec = state.spec
        room = find_room(self.rule_book, spec.name, spec.accelerators)
        if room is None:  # no drain would help it
            return todo
        if self.pending.draining() is not None:
            self._blocking = spec.name
            return todo
        head = self._queues.peek(spec.name)
        plan = plan_in(room, spec, self.rule_book, models=self._models, head=head)
        todo = todo or Todo()
        todo.actions += self._carry_out(plan, state, now_s)
        todo.add(self.consider(spec.name, now_s))
        return todo

    def _call_off_vain_drain(self, now_s: float) -> Todo | None:
        """Call off a draining start if the requests it was for have left or found another replica."""
        pending = self.pending.draining()
        state = None if pending is None else self._models.get(pending.model)
        if pending is None or state is None or self._queues.waiting(pending.model):
            return None
        if self.num_coming(pending.model) + len(self._ready(pending.model)) > state.spec.min_replicas:
            return Todo(resumed=self.call_off(pending, now_s))
        return None

    def _start_sooner(self, now_s: float) -> Todo | None:
        """Start the model that replicas drain for on other slots, if some have been freed earlier."""
        pending = self.pending.draining()
        state = None if pending is None else self._models.get(pending.model)
        if pending is None or state is None or pending.plan.moved or state.back_off.is_resting(now_s):
            return None
        actions = self._start_one(state, now_s, most=PlanKind.EVICT)
        return None if actions is None else Todo(actions, resumed=self.call_off(pending, now_s))

    def _is_starving(self, model: str, now_s: float) -> bool:
        oldest_s = self._queues.oldest_s(model)
        return oldest_s is not None and now_s - oldest_s > self.limits.starve_s

    def _pays(self, state: ModelState, num_now: int, now_s: float) -> bool:
        """Whether another replica would be ready before the present ones have room again.

        If not, the model is considered again once its oldest request has waited as long as a start takes, because then
        the running requests take longer than earlier ones did.
        """
        model = state.spec.name
        oldest_s, waiting = self._queues.oldest_s(model), self._queues.waiting(model)
        if oldest_s is None or not state.service_s:
            return True
        rounds = waiting / (num_now * state.spec.ongoing_max)
        startup_s = self.estimator.startup_s(state.spec)
        if startup_s <= max(now_s - oldest_s, max(1.0, rounds) * state.service_s):
            return True
        self._later.set(model, oldest_s + startup_s)
        return False

    def num_coming(self, model: str) -> int:
        """Return how many replicas of the model are starting or planned."""
        return len(self._ordered(self._models[model].spec)) + len(self.pending.of_model(model))

    def _ordered(self, spec: ModelSpec) -> list[Replica]:
        ordered = self.cluster.replicas_of(spec.name, ReplicaState.ORDERED)
        return [replica for replica in ordered if replica.generation == spec.generation]

    def _ready(self, model: str) -> list[Replica]:
        """Return the model's READY replicas of the current generation."""
        generation = self._models[model].spec.generation
        ready = self.cluster.replicas_of(model, ReplicaState.READY)
        return [replica for replica in ready if replica.generation == generation]

    # --------------------------------------------------------------------------------------------------- starting

    def _start_one(self, state: ModelState, now_s: float, *, most: PlanKind) -> list[Action] | None:
        """Carry out the best plan for one more replica; None if there is no place for it."""
        plans = self.plans_for(state, now_s, most=most)
        plan = best_plan(plans, slack_s=self.limits.slack_s)
        return None if plan is None else self._carry_out(plan, state, now_s)

    def plans_for(self, state: ModelState, now_s: float, *, most: PlanKind = PlanKind.MIGRATE) -> list[Plan]:
        """Return plans for one more replica now, the soonest first, of no kind after ``most``."""
        head = self._queues.peek(state.spec.name)
        prompt_tokens = 0 if head is None else head.prompt_tokens
        return plan_starts(self.rule_book, state.spec, prompt_tokens=prompt_tokens, now_s=now_s, most=most)

    def _carry_out(self, plan: Plan, state: ModelState, now_s: float) -> list[Action]:
        self._num_started += 1
        spec = state.spec
        replica = f"{slug_of(spec.name)}-{self._num_started}{self.limits.name_suffix}"
        self.predictions[replica] = Prediction(
            model=spec.name,
            node=plan.node,
            replica=replica,
            kind=plan.kind.value,
            tier=plan.tier.name,
            is_warm=plan.is_warm,
            decided_s=now_s,
            expected=plan.estimate,
        )
        load_s = self.estimator.weights_s(spec, plan.node, plan.tier)
        self.cluster.extend_load(plan.node, now_s, load_s)
        self._loads.setdefault(plan.node, {})[replica] = load_s
        pending = PendingStart(
            replica, spec.name, spec.generation, spec.accelerators, plan=plan, victims=set(plan.victims)
        )
        if not plan.victims:
            return [self._start(pending, now_s)]
        self.pending.add(pending, now_s)
        actions = [action for relocation in plan.relocations for action in self._relocate(relocation, now_s)]
        for victim in plan.victims:
            if self.cluster.replicas[victim].ongoing:
                self.drain(victim, now_s)
                pending.drained.add(victim)
            else:
                actions.append(self.stop(victim, f"its slots are for {spec.name}", now_s))
        return actions

    def _relocate(self, relocation: Relocation, now_s: float) -> list[Action]:
        """Start a replica to which the requests of a victim can move."""
        node = self.cluster.nodes[relocation.node]
        tier = self.cluster.tier(node.id, relocation.model)
        plan = Plan(PlanKind.START, node.id, tier, node.is_warm, estimate=relocation.estimate)
        return self._carry_out(plan, self._models[relocation.model], now_s)

    def _start(self, pending: PendingStart, now_s: float) -> StartReplica:
        estimate, spec = pending.plan.estimate, self._models[pending.model].spec
        self.cluster.add_replica(
            Replica(
                id=pending.replica,
                model=pending.model,
                generation=pending.generation,
                lineage=spec.lineage,
                node=pending.plan.node,
                num_slots=pending.num_slots,
                state_since_s=now_s,
                ordered_s=now_s,
                ready_at_s=now_s + estimate.total_s,
            )
        )
        timeout_s = self._timeout_s(self._models[pending.model], estimate.total_s)
        return StartReplica(pending.replica, spec.name, pending.generation, pending.plan.node, timeout_s)

    def _timeout_s(self, state: ModelState, expected_s: float) -> float:
        """Return the timeout of a start that is expected to take ``expected_s``.

        Doubles with each failure: a start that timed out yields no sample, so the prediction cannot learn from it.
        """
        spec, most_s = state.spec, self.limits.start_s_most
        if spec.start_s_max is not None:
            return spec.start_s_max
        p99_s = self.estimator.startup_p99_s(spec.name, expected_s)
        return min(most_s, max(self.limits.start_s_least, p99_s) * 2.0 ** min(state.back_off.num_failures, 8))

    def call_off(self, pending: PendingStart, now_s: float) -> list[str]:
        """Cancel a pending start, and return the models of the replicas that take requests again.

        Victims being stopped still end; those that drain resume.
        """
        if pending.victims:
            self.pending.forget(pending)
        drained = [self.cluster.replicas[victim] for victim in sorted(pending.drained & pending.victims)]
        resumed = [victim.model for victim in drained if self._resume(victim, now_s)]
        self.predictions.pop(pending.replica, None)
        self.load_over(pending.plan.node, pending.replica, now_s)
        return resumed

    def _resume(self, replica: Replica, now_s: float) -> bool:
        """Let a draining replica take requests again, if it may; return whether it does."""
        state = self._models.get(replica.model)
        is_current = state is not None and state.spec.generation == replica.generation
        is_open = is_current and not self.cluster.nodes[replica.node].is_cordoned
        if replica.state is not ReplicaState.DRAINING or not is_open:
            return False
        self.cluster.set_state(replica.id, ReplicaState.READY, now_s)
        self.pin(replica.model)
        return True

    def load_over(self, node: str, replica_id: str, now_s: float) -> None:
        """Remove a load that ended from its node's load queue, which then takes as long as the remaining loads."""
        loads = self._loads.get(node, {})
        if loads.pop(replica_id, None) is not None and node in self.cluster.nodes:
            self.cluster.set_load_until(node, now_s + sum(loads.values()))

    def forget_node(self, node: str) -> None:
        """Forget the loads of a node that is gone, so that a new node of the same name starts afresh."""
        self._loads.pop(node, None)

    def forget_model(self, model: str) -> None:
        """Forget a deleted model; its replicas end later."""
        self._hungry.discard(model)
        self.predictions.pop(model, None)
        self._later.discard(model)
        self._steady.discard(model)
        self.foresight.forget_model(model)

    # --------------------------------------------------------------------------------- stopping, failing to start

    def stop(self, replica_id: str, reason: str, now_s: float) -> StopReplica:
        """Stop a replica that has no request."""
        replica = self.cluster.replicas[replica_id]
        assert not replica.ongoing, f"{replica_id} has {len(replica.ongoing)} requests"
        self.cluster.set_state(replica_id, ReplicaState.STOPPING, now_s)
        return StopReplica(replica_id, replica.node, reason)

    def drain(self, replica_id: str, now_s: float) -> StopReplica | None:
        """Send a replica no more requests, and stop it when its last one has ended, which may be now."""
        replica = self.cluster.replicas[replica_id]
        self.pending.let_end(replica_id)
        if replica.state is not ReplicaState.READY:
            return None
        self.cluster.set_state(replica_id, ReplicaState.DRAINING, now_s)
        return None if replica.ongoing else self.stop(replica_id, "drained", now_s)

    def replace_generation(self, state: ModelState, now_s: float) -> Todo:
        """Replace a model's replicas after a change that requires new engines.

        If there is room, a new replica is started first, and the old ones end when it is ready. Otherwise the old ones
        are drained at once, and requests wait.
        """
        model, generation, todo = state.spec.name, state.spec.generation, Todo()
        for pending in self.pending.of_model(model):
            todo.resumed += self.call_off(pending, now_s)
        for replica in self.cluster.replicas_of(model, ReplicaState.ORDERED):
            if replica.generation != generation:
                todo.do(self.stop(replica.id, "its model was changed", now_s))
        old = [one for one in self.cluster.replicas_of(model, ReplicaState.READY) if one.generation != generation]
        may_start = old and not self.num_coming(model)
        started = self._start_one(state, now_s, most=PlanKind.START) if may_start else None
        if started is not None:
            todo.actions += started
            return todo
        for replica in old:
            todo.do(self.drain(replica.id, now_s))
        return todo

    def became_idle(self, replica: Replica, now_s: float) -> StopReplica | None:
        """Handle a replica without requests: stop it if it drains, else set its keep-alive."""
        if replica.state is ReplicaState.DRAINING:
            return self.stop(replica.id, "drained", now_s)
        state = self._models.get(replica.model)
        if replica.state is ReplicaState.READY and state is not None:
            self.foresight.became_idle(replica, state)
        return None

    def end_idle(self, now_s: float) -> list[StopReplica]:
        """Stop replicas whose keep-alive is over."""
        idle = self.foresight.idle_too_long(now_s)
        # One after the other: whether a replica is spare depends on those stopped before it.
        return [self.stop(one.id, "its keep-alive is over", now_s) for one in idle if self.rule_book.is_spare(one)]

    def reset_idle(self, model: str, now_s: float) -> None:
        """Set the keep-alive of the model's idle replicas anew, as its deployment may have changed it."""
        for replica in self.cluster.replicas_of(model, ReplicaState.READY):
            if replica.idle_since_s is not None:
                self.became_idle(replica, now_s)  # it is READY, so this stops nothing

    def ended(self, replica: Replica, now_s: float) -> Todo:
        """Remove a replica that is gone.

        Its slots are free now, or held for the start that it was stopped for, which begins if this was its last victim.
        """
        self.predictions.pop(replica.id, None)
        was_stopping_s = now_s - replica.state_since_s if replica.state is ReplicaState.STOPPING else None
        self.cluster.remove_replica(replica.id)
        self.load_over(replica.node, replica.id, now_s)
        if was_stopping_s is not None:
            self.estimator.observe_stop(replica.model, replica.node, was_stopping_s)
        todo = Todo()
        pending = self.pending.victim_ended(replica, now_s)
        if pending is not None:
            state = self._models.get(pending.model)
            if state is not None and state.spec.generation == pending.generation:
                todo.do(self._start(pending, now_s))
            else:
                todo.resumed += self.call_off(pending, now_s)
        return todo

    def became_ready(self, state: ModelState, now_s: float) -> None:
        """Note that a start succeeded. Earlier failures are forgotten only after ``STEADY_S``, so that an engine that
        dies seconds after each start is not restarted endlessly."""
        if state.back_off.num_failures:
            self._steady.set(state.spec.name, now_s + STEADY_S)

    def forget_failures(self, now_s: float) -> None:
        """Forget the failed starts of models that have had a replica for ``STEADY_S``."""
        for model in self._steady.due(now_s):
            if (state := self._models.get(model)) is not None:
                state.back_off.succeeded()

    def failed(self, state: ModelState, reason: str, now_s: float) -> None:
        """Record that a start of a model failed, or that its replica died before ``STEADY_S``."""
        self._steady.discard(state.spec.name)
        state.back_off.failed(reason, now_s)
        self._later.set(state.spec.name, state.back_off.until_s)

    def to_consider(self, now_s: float) -> list[str]:
        """Return the models that are due to be considered again, see ``_later``."""
        return list(self._later.due(now_s))

    # ------------------------------------------------------------------------------------------------------- values

    def pin(self, model: str) -> None:
        """Pin as many of the model's replicas as its minimum, so that they are not evicted."""
        state = self._models.get(model)
        for rank, replica in enumerate(self._ready(model) if state is not None else ()):
            self.cluster.set_pinned(replica.id, state is not None and rank < state.spec.min_replicas)

    def came_true(self, replica_id: str, sample: StartSample, prefill_s: float, *, ready_s: float) -> None:
        """Complete a start's prediction with what it took up to its first answer."""
        prediction = self.predictions.pop(replica_id, None)
        if prediction is not None and prediction.model in self._models:
            self.predictions[prediction.model] = prediction.come_true(sample, prefill_s, ready_s=ready_s)
