"""Which replicas there are to be: starts, evictions, drains, keep-alive. Pure; ``RouterCore``'s half about engines.

A plan that evicts is carried out in two steps: its victims are stopped, and what they free is held for it, slot by
slot; when the last one has ended, its own replica is started. So no slot is ever promised twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sllm_vllm.router.core.alarms import Alarms
from sllm_vllm.router.core.autoscale import desired_replicas
from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.events import Action, PrefetchModel, StartReplica, StopReplica
from sllm_vllm.router.core.facts import Estimate, ModelSpec, StartSample, Term, Tier
from sllm_vllm.router.core.hungry import Hungry
from sllm_vllm.router.core.keep_alive import keep_alive_s, keep_value_s
from sllm_vllm.router.core.model_state import ModelState, Prediction
from sllm_vllm.router.core.pending import PendingStart, PendingStarts, slug_of
from sllm_vllm.router.core.placement import Plan, Rules, best_plan, plan_starts
from sllm_vllm.router.core.queues import ModelQueues


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """How many nodes are looked at for a start (``plans_max``), how many models that lack slots are tried after each
    event (``hungry_max``); how long the oldest request waits before nobody may overtake it and a busy replica is
    drained for it (``starve_s``); how long before its likely arrival a model is prefetched (``prefetch_s``). What names
    of replicas end with (``name_suffix``), so that no two routers of a cluster give one twice."""

    plans_max: int = 8
    hungry_max: int = 4
    starve_s: float = 30.0
    prefetch_s: float = 30.0
    slack_s: float = 0.1
    name_suffix: str = ""


class Scaling:
    """Starts and stops replicas in the picture of the cluster, and says so by actions. Owned by ``RouterCore``."""

    def __init__(
        self, limits: ScalingLimits, models: dict[str, ModelState], queues: ModelQueues, *, estimator: Estimator
    ) -> None:
        self.limits = limits
        self.cluster = Cluster()
        self.estimator = estimator
        self.pending = PendingStarts(self.cluster)
        self._loads: dict[str, dict[str, float]] = {}
        """Loads under way by node and replica: how long each was expected to take."""
        self.predictions: dict[str, Prediction] = {}
        """By replica, until its first answer; then the last one of each model, by its name."""
        self._models = models
        self._queues = queues
        self._hungry = Hungry(queues)
        self._idle: Alarms[tuple[str, float]] = Alarms()
        """The end of a keep-alive: replica, and since when it was idle."""
        self._prefetches: Alarms[tuple[str, float]] = Alarms()
        """Model, and its last arrival then."""
        self._resting: Alarms[str] = Alarms()
        """The end of a model's back-off."""
        self._num_started = 0
        self.actions: list[Action] = []

    # ---------------------------------------------------------------------------------------------------- wanting

    def consider(self, model: str, now_s: float) -> bool:
        """Start what a model lacks; False if it lacks one and found no place."""
        state = self._models.get(model)
        if state is None:
            self._hungry.discard(model)
            return True
        spec, waiting = state.spec, self._queues.waiting(model)
        num_now = self.num_coming(model) + len(self._ready(model))
        wanted = desired_replicas(
            spec, ongoing=state.num_ongoing, waiting=waiting, num_now=num_now, now_s=now_s, state=state.autoscale
        )
        if num_now > wanted:
            self._shed(state, wanted, now_s)
        while num_now < wanted:
            if state.back_off.is_resting(now_s) or (num_now and not self._pays(state, waiting, num_now)):
                break
            if not self._start_one(state, now_s, may_evict=waiting > 0):
                self._hungry.add(spec)
                return False
            num_now += 1
        self._hungry.discard(model)
        return True

    def _shed(self, state: ModelState, wanted: int, now_s: float) -> None:
        """End what is too much: what is only planned or starting, then what is idle; what is busy beyond the most."""
        spec = state.spec
        for pending in self.pending.of_model(spec.name)[wanted:]:
            self.call_off(pending, now_s)
        ready = self._ready(spec.name)
        num_coming = max(0, wanted - len(ready))
        for replica in self._ordered(spec)[num_coming:]:
            self.stop(replica.id, "too many", now_s)
        idle = [replica for replica in ready if not replica.ongoing]
        for replica in idle[: max(0, len(ready) - wanted)]:
            self.stop(replica.id, "too many", now_s)
        for replica in self._ready(spec.name)[spec.max_replicas :]:
            self.drain(replica.id, now_s)

    def feed_hungry(self, now_s: float) -> None:
        """Slots may have come free: try models that lack some, first who waits longest, and nobody past a starving one.

        A model that finds no place spares the others the search that want as much.
        """
        num_slots_in_vain = math.inf
        for model in self._hungry.first(self.limits.hungry_max):
            state = self._models.get(model)
            if state is None or state.spec.accelerators >= num_slots_in_vain:
                continue
            if not self.consider(model, now_s):
                num_slots_in_vain = min(num_slots_in_vain, state.spec.accelerators)
                if self._is_starving(model, now_s):
                    return

    def drain_for_starving(self, now_s: float) -> None:
        """If somebody has waited too long for slots, let the busy replica end that has the fewest requests."""
        model = next(iter(self._hungry.first(1)), None)
        if model is None or not self._is_starving(model, now_s):
            return
        busy = [
            replica
            for replica in self.cluster.replicas.values()
            if replica.state is ReplicaState.READY and replica.model != model and self._is_spare(replica)
        ]
        if busy and not any(r.state is ReplicaState.DRAINING for r in self.cluster.replicas.values()):
            victim = min(busy, key=lambda replica: (len(replica.ongoing), replica.ready_s or 0.0, replica.id))
            self.drain(victim.id, now_s)

    def _is_starving(self, model: str, now_s: float) -> bool:
        oldest_s = self._queues.oldest_s(model)
        return oldest_s is not None and now_s - oldest_s > self.limits.starve_s

    def _pays(self, state: ModelState, waiting: int, num_now: int) -> bool:
        """Whether another replica would be there before those that are have room again."""
        if not waiting or not state.service_s:
            return True
        rounds = waiting / (num_now * state.spec.ongoing_max)
        return self.estimator.startup_s(state.spec) < max(1.0, rounds) * state.service_s

    def num_coming(self, model: str) -> int:
        """Replicas on their way."""
        return len(self._ordered(self._models[model].spec)) + len(self.pending.of_model(model))

    def _ordered(self, spec: ModelSpec) -> list[Replica]:
        ordered = self.cluster.replicas_of(spec.name, ReplicaState.ORDERED)
        return [replica for replica in ordered if replica.generation == spec.generation]

    def _ready(self, model: str) -> list[Replica]:
        """Those of the present generation."""
        generation = self._models[model].spec.generation
        ready = self.cluster.replicas_of(model, ReplicaState.READY)
        return [replica for replica in ready if replica.generation == generation]

    # --------------------------------------------------------------------------------------------------- starting

    def _start_one(self, state: ModelState, now_s: float, *, may_evict: bool) -> bool:
        plans = self.plans_for(state, now_s, may_evict=may_evict)
        plan = best_plan(plans, slack_s=self.limits.slack_s)
        if plan is None:
            return False
        self._carry_out(plan, state, now_s)
        return True

    def plans_for(self, state: ModelState, now_s: float, *, may_evict: bool = True) -> list[Plan]:
        """Plans for one more replica now, the best first."""
        head = self._queues.peek(state.spec.name)
        rules = Rules(
            keep_value=lambda replica: self._keep_value(replica, now_s),
            may_evict=self._is_spare if may_evict else _never,
            k=self.limits.plans_max,
        )
        prompt_tokens = head.prompt_tokens if head is not None else 0
        return plan_starts(
            self.cluster, self.estimator, state.spec, prompt_tokens=prompt_tokens, now_s=now_s, rules=rules
        )

    def _carry_out(self, plan: Plan, state: ModelState, now_s: float) -> None:
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
        pending = PendingStart(replica, spec.name, spec.generation, plan, set(plan.victims))
        if not plan.victims:
            self._start(pending, now_s)
            return
        self.pending.add(pending, spec.accelerators, now_s)
        for victim in plan.victims:
            self.stop(victim, f"its slots are for {spec.name}", now_s)

    def _start(self, pending: PendingStart, now_s: float) -> None:
        spec = self._models[pending.model].spec
        estimate = pending.plan.estimate
        self.cluster.add_replica(
            Replica(
                id=pending.replica,
                model=pending.model,
                generation=pending.generation,
                node=pending.plan.node,
                num_slots=spec.accelerators,
                state_since_s=now_s,
                ordered_s=now_s,
                ready_at_s=now_s + estimate.total_s,
            )
        )
        self.actions.append(StartReplica(pending.replica, pending.model, pending.generation, pending.plan.node))

    def call_off(self, pending: PendingStart, now_s: float) -> None:
        """It will not start; its victims end all the same."""
        if pending.victims:
            self.pending.forget(pending)
        self.predictions.pop(pending.replica, None)
        self.load_over(pending.plan.node, pending.replica, now_s)

    def load_over(self, node: str, replica_id: str, now_s: float) -> None:
        """A load ended, sooner or later than was expected: the queue of its node is what the others need."""
        loads = self._loads.get(node, {})
        if loads.pop(replica_id, None) is not None and node in self.cluster.nodes:
            self.cluster.set_load_until(node, now_s + sum(loads.values()))

    # --------------------------------------------------------------------------------------------------- stopping

    def stop(self, replica_id: str, reason: str, now_s: float) -> None:
        """End a replica that has no request."""
        replica = self.cluster.replicas[replica_id]
        assert not replica.ongoing, f"{replica_id} has {len(replica.ongoing)} requests"
        self.cluster.set_state(replica_id, ReplicaState.STOPPING, now_s)
        self.actions.append(StopReplica(replica_id, replica.node, reason))

    def drain(self, replica_id: str, now_s: float) -> None:
        """Send it nothing more, and end it when its last request has ended."""
        replica = self.cluster.replicas[replica_id]
        if replica.state is not ReplicaState.READY:
            return
        self.cluster.set_state(replica_id, ReplicaState.DRAINING, now_s)
        if not replica.ongoing:
            self.stop(replica_id, "drained", now_s)

    def replace_generation(self, state: ModelState, now_s: float) -> None:
        """Its engines are to be started otherwise. If there is room for a new one it comes first, and the old ones go
        when it is ready; else they go at once, and requests wait."""
        model, generation = state.spec.name, state.spec.generation
        for pending in self.pending.of_model(model):
            self.call_off(pending, now_s)
        for replica in self.cluster.replicas_of(model, ReplicaState.ORDERED):
            if replica.generation != generation:
                self.stop(replica.id, "its model was changed", now_s)
        old = [one for one in self.cluster.replicas_of(model, ReplicaState.READY) if one.generation != generation]
        if old and not self.num_coming(model) and self._start_one(state, now_s, may_evict=False):
            return
        for replica in old:
            self.drain(replica.id, now_s)

    def became_idle(self, replica: Replica, now_s: float) -> None:
        """Its last request ended, or it is ready and nobody waits."""
        if replica.state is ReplicaState.DRAINING:
            self.stop(replica.id, "drained", now_s)
            return
        state = self._models.get(replica.model)
        if replica.state is not ReplicaState.READY or state is None:
            return
        assert replica.idle_since_s is not None
        ttl_s = state.spec.keep_alive_s
        if ttl_s is None:
            ttl_s = keep_alive_s(
                state.arrivals,
                startup_s=self.estimator.startup_s(state.spec),
                share=self._share(replica),
                now_s=now_s,
            )
        self._idle.set(now_s + ttl_s, (replica.id, replica.idle_since_s))

    def end_idle(self, now_s: float) -> None:
        """Stop replicas whose keep-alive is over."""
        for replica_id, since_s in self._idle.due(now_s):
            replica = self.cluster.replicas.get(replica_id)
            if replica is None or replica.state is not ReplicaState.READY or replica.idle_since_s != since_s:
                continue
            if self._is_spare(replica):
                self.stop(replica_id, "its keep-alive is over", now_s)

    def ended(self, replica_id: str, now_s: float) -> Replica | None:
        """A replica is gone; its slots are free, or held for the start that they were freed for."""
        replica = self.cluster.replicas.get(replica_id)
        self.predictions.pop(replica_id, None)
        if replica is None:
            return None
        was_stopping_s = now_s - replica.state_since_s if replica.state is ReplicaState.STOPPING else None
        self.cluster.remove_replica(replica_id)
        self.load_over(replica.node, replica_id, now_s)
        if was_stopping_s is not None:
            self.estimator.observe_stop(replica.model, replica.node, was_stopping_s)
        pending = self.pending.victim_ended(replica, now_s)
        if pending is not None:
            state = self._models.get(pending.model)
            if state is not None and state.spec.generation == pending.generation:
                self._start(pending, now_s)
            else:
                self.call_off(pending, now_s)
        return replica

    # ------------------------------------------------------------------------------------------------- prefetching

    def arrived(self, state: ModelState, now_s: float) -> None:
        """A request of a model came: it may be time to think of the next one."""
        lead_s = self.limits.prefetch_s
        next_s = state.arrivals.next_after_s(now_s, 0.5)
        if next_s is not None and next_s > lead_s:
            self._prefetches.set(now_s + next_s - lead_s, (state.spec.name, now_s))

    def prefetch(self, now_s: float) -> None:
        """Have checkpoints read whose models are likely next and have no replica."""
        for model, last_s in self._prefetches.due(now_s):
            state = self._models.get(model)
            if state is None or state.arrivals.last_s != last_s or self.cluster.replicas_of(model):
                continue
            for node in self.cluster.candidates(model, 0, 1):
                if self.cluster.tier(node, model) is not Tier.HOST:
                    self.actions.append(PrefetchModel(model, node))

    # ---------------------------------------------------------------------------------------------------- back-off

    def failed(self, state: ModelState, reason: str, now_s: float) -> None:
        """A start of a model failed."""
        state.back_off.failed(reason, now_s)
        self._resting.set(state.back_off.until_s, state.spec.name)

    def rested(self, now_s: float) -> list[str]:
        """Models whose back-off is over."""
        return list(self._resting.due(now_s))

    # ------------------------------------------------------------------------------------------------------- values

    def pin(self, model: str) -> None:
        """Keep as many of its replicas from being evicted as its minimum says."""
        state = self._models.get(model)
        for rank, replica in enumerate(self._ready(model) if state is not None else ()):
            self.cluster.set_pinned(replica.id, state is not None and rank < state.spec.min_replicas)

    def _is_spare(self, replica: Replica) -> bool:
        """Whether its model can do without it, as far as its minimum says; an old generation always can."""
        state = self._models.get(replica.model)
        if state is None or replica.generation != state.spec.generation:
            return True
        return state.spec.min_replicas == 0 or len(self._ready(replica.model)) > state.spec.min_replicas

    def _keep_value(self, replica: Replica, now_s: float) -> float:
        state = self._models.get(replica.model)
        if state is None:
            return 0.0
        return keep_value_s(state.arrivals, startup_s=self.estimator.startup_s(state.spec), now_s=now_s)

    def _share(self, replica: Replica) -> float:
        return replica.num_slots / max(1, self.cluster.num_slots(replica.node))

    def came_true(self, replica_id: str, sample: StartSample, prefill_s: float, *, ready_s: float) -> None:
        """A start has come down to its first answer: hold it against what was predicted."""
        prediction = self.predictions.pop(replica_id, None)
        if prediction is None:
            return
        took = {
            Term.PROCESS: sample.process_s,
            Term.INIT: sample.init_s,
            Term.WEIGHTS: sample.weights_s,
            Term.PREFILL: prefill_s,
        }
        queue_s = max(0.0, ready_s - prediction.decided_s - sum(took.values()) + prefill_s)
        actual = Estimate({Term.QUEUE: queue_s, **took})
        self.predictions[prediction.model] = replace(prediction, actual=actual)


def _never(replica: Replica) -> bool:
    return False
