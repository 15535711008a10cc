"""What the compared policies share: queues, dispatch, replicas, evictions, keep-alive. Pure; a policy adds ``place``.

The rules are ``RouterCore``'s, so that little but placement differs: each model has a queue, which is served in the
order of arrival whenever a replica has room, and one replica for every ``target_ongoing`` requests. Models that can't
be placed are overtaken until one has waited ``STARVE_S``; then a busy replica is drained for it. An idle replica stays
for as long as its model took to start, as in ServerlessLLM's evaluation.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable

from sllm_vllm.router.core.events import (
    Dispatch,
    Event,
    FirstByte,
    ModelDeployed,
    MoveFailed,
    MoveRequest,
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
    RequestGone,
    RequestMoved,
    StartReplica,
    StopReplica,
    Ticked,
)
from sllm_vllm.router.core.facts import ModelSpec
from sllm_vllm.simulate.policy import Order, PreemptRequest
from sllm_vllm.simulate.views import NodeView, Placement, ReplicaPhase, View, Waiter

STARVE_S = 30.0
ATTEMPTS_MAX = 2


class Baseline:
    """A policy without ``place``. It knows only what ``RouterCore`` receives."""

    def __init__(self) -> None:
        self.specs: dict[str, ModelSpec] = {}
        self.nodes: dict[str, NodeView] = {}
        self.views: dict[str, View] = {}
        self.requests: dict[str, Waiter] = {}
        self.waiting: dict[str, list[tuple[float, str]]] = {}
        """(arrival, request) by model, the oldest first; models without waiting requests have no entry."""
        self.targets: dict[str, str] = {}
        """By replica that is being emptied, the replica that takes its requests."""
        self.orders: list[Order] = []
        self._replicas_of: dict[str, dict[str, View]] = {}
        self._startup_s: dict[str, float] = {}
        self._num_named = 0
        self._has_requeued = False
        """Preempted requests wait again, and the queues have not been served since."""

    def place(self, spec: ModelSpec, now_s: float) -> Placement | None:
        """Where a model starts; None if it can't start anywhere now."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ events

    def handle(self, event: Event, now_s: float) -> list[Order]:
        """See ``Policy``."""
        self.orders = []
        self._record(event, now_s)
        while self._has_requeued:
            self._has_requeued = False
            self._serve_all(now_s)
        return self.orders

    def _record(self, event: Event, now_s: float) -> None:
        match event:
            case ModelDeployed():
                self.specs[event.spec.name] = event.spec
            case NodeJoined():
                self.nodes[event.node] = NodeView(event.node, event.num_slots, event.num_slots)
            case NodeReported():
                node = self.nodes[event.node]
                node.residency, node.hops = dict(event.residency), dict(event.hops)
            case NodeLost():
                self._node_lost(event.node)
                self._serve_all(now_s)
            case RequestArrived() | RequestEnded() | RequestGone() | RequestFailed() | FirstByte():
                self._request_event(event, now_s)
            case ReplicaReady():
                self._ready(event.replica, now_s)
            case ReplicaEnded():
                self._ended(event.replica)
                self._serve_all(now_s)
            case Ticked():
                self._ticked(now_s)
            case _:
                self._record_move(event, now_s)

    def _record_move(self, event: Event, now_s: float) -> None:
        match event:
            case RequestMoved():
                self._moved(event.request, now_s)
            case ReplicaMovable() | MoveFailed():
                pass  # every replica is movable; requests on a dead replica get their own event
            case _:
                raise AssertionError(f"{event} does not happen in a simulation")

    def _moved(self, request_id: str, now_s: float) -> None:
        """Record that a request runs on the target replica of its move."""
        waiter = self.requests[request_id]
        assert waiter.replica is not None
        target = self.views[self.targets[waiter.replica]]
        self._leave(waiter, now_s)
        waiter.replica = target.id
        target.ongoing.add(request_id)
        self._serve_all(now_s)

    def _request_event(
        self, event: RequestArrived | RequestEnded | RequestGone | RequestFailed | FirstByte, now_s: float
    ) -> None:
        if isinstance(event, RequestArrived):
            facts = event.facts
            self.requests[facts.id] = Waiter(facts.id, facts.model, now_s, facts.prompt_tokens)
            self._enqueue(self.requests[facts.id])
            self._serve(facts.model, now_s)
            return
        waiter = self.requests.get(event.request)
        if waiter is None:
            return
        if isinstance(event, FirstByte):
            waiter.first_s = now_s
            return
        was_waiting = waiter.replica is None
        self._leave(waiter, now_s)
        if isinstance(event, RequestFailed) and waiter.attempts < ATTEMPTS_MAX:
            if not was_waiting:
                self._enqueue(waiter)
        else:
            self._forget(waiter)
            if isinstance(event, RequestFailed):
                self.orders.append(RejectRequest(waiter.id, Refusal.ENGINE_FAILED, event.reason))
        self._serve_all(now_s)

    def _ticked(self, now_s: float) -> None:
        for model, queue in list(self.waiting.items()):
            late_s = now_s - self.specs[model].queue_s_max
            for _, request in [entry for entry in queue if entry[0] <= late_s]:
                self._refuse(self.requests[request], Refusal.TOO_LATE)
        for view in list(self.views.values()):
            is_idle = view.phase is ReplicaPhase.READY and not view.ongoing and not view.num_incoming
            if is_idle and now_s - view.since_s >= self._startup_s.get(view.model, 0.0):
                self.stop(view)
        self._serve_all(now_s)
        self._drain_for_starving(now_s)

    def _refuse(self, waiter: Waiter, why: Refusal) -> None:
        self._forget(waiter)
        self.orders.append(RejectRequest(waiter.id, why, why.value))

    # ---------------------------------------------------------------------------------------------------- requests

    def _enqueue(self, waiter: Waiter) -> None:
        queue = self.waiting.setdefault(waiter.model, [])
        insort(queue, (waiter.arrived_s, waiter.id))
        if len(queue) > self.specs[waiter.model].queue_max:
            self._refuse(self.requests[queue[-1][1]], Refusal.QUEUE_FULL)

    def _forget(self, waiter: Waiter) -> None:
        del self.requests[waiter.id]
        queue = self.waiting.get(waiter.model, [])
        if (waiter.arrived_s, waiter.id) in queue:
            queue.remove((waiter.arrived_s, waiter.id))
            if not queue:
                del self.waiting[waiter.model]

    def _leave(self, waiter: Waiter, now_s: float) -> None:
        """Take a request off its replica."""
        view = self.views.get(waiter.replica or "")
        waiter.replica = None
        if view is None or waiter.id not in view.ongoing:
            return
        view.ongoing.remove(waiter.id)
        target = self.views.get(self.targets.get(view.id, ""))
        if target is not None and target.num_incoming:
            target.num_incoming -= 1
        if not view.ongoing:
            view.since_s = now_s
            if view.phase is ReplicaPhase.LEAVING:
                self.stop(view)

    def _serve_all(self, now_s: float) -> None:
        """Serve the models, the longest waiting first; no model may overtake one that has waited more than
        ``STARVE_S``."""
        for (arrived_s, _), model in sorted((queue[0], model) for model, queue in self.waiting.items()):
            if not self._serve(model, now_s) and model in self.waiting and now_s - arrived_s > STARVE_S:
                return

    def _serve(self, model: str, now_s: float) -> bool:
        """Dispatch requests to replicas with room, and start the replicas that are lacking; returns False if one has no
        place."""
        spec = self.specs[model]
        while (queue := self.waiting.get(model)) and (view := self._with_room(spec)) is not None:
            waiter = self.requests[queue.pop(0)[1]]
            if not queue:
                del self.waiting[model]
            waiter.replica, waiter.first_s = view.id, None
            waiter.attempts += 1
            view.ongoing.add(waiter.id)
            self.orders.append(Dispatch(waiter.id, view.id, waiter.attempts))
        while self._num_lacking(spec) > 0:
            placement = self.place(spec, now_s)
            if placement is None:
                return False
            if not self.waiting.get(model) and placement != Placement(placement.node):
                return True  # no replica is displaced for one that no request waits for
            self.carry_out(placement, spec, now_s)
        return True

    def replicas_of(self, model: str, *phases: ReplicaPhase) -> list[View]:
        """The model's replicas in any of these phases."""
        return [view for view in self._replicas_of.get(model, {}).values() if view.phase in phases]

    def num_room(self, view: View) -> int:
        """Requests that a replica could still take."""
        return self.specs[view.model].ongoing_max - len(view.ongoing) - view.num_incoming

    def _with_room(self, spec: ModelSpec) -> View | None:
        ready = [view for view in self.replicas_of(spec.name, ReplicaPhase.READY) if self.num_room(view) > 0]
        return min(ready, key=lambda view: (len(view.ongoing), view.id), default=None)

    def _num_lacking(self, spec: ModelSpec) -> int:
        serving = self.replicas_of(spec.name, ReplicaPhase.HELD, ReplicaPhase.STARTING, ReplicaPhase.READY)
        num_requests = len(self.waiting.get(spec.name, ())) + sum(len(view.ongoing) for view in serving)
        return min(spec.max_replicas, -(-num_requests // spec.target_ongoing)) - len(serving)

    # ---------------------------------------------------------------------------------------------------- replicas

    def carry_out(self, placement: Placement, spec: ModelSpec, now_s: float) -> View:
        """End the placement's victims, reserve slots as they become free, and start the replica once it has all of
        them."""
        node = self.nodes[placement.node]
        self._num_named += 1
        view = View(f"{spec.name}-{self._num_named}", spec.name, node.id, spec.accelerators, 0, since_s=now_s)
        self.views[view.id] = view
        self._replicas_of.setdefault(spec.name, {})[view.id] = view
        self._hold(view, node)
        node.load_until_s = max(now_s, node.load_until_s) + node.weights_s(spec)
        view.waits_for = {*placement.victims, *placement.preempted, *(source for source, _ in placement.moves)}
        for victim in placement.victims:
            self.stop(self.views[victim])
        for victim in placement.preempted:
            self._preempt(self.views[victim], now_s)
        for source, target in placement.moves:
            self._begin_move(self.views[source], target, now_s)
        self._start_if_free(view)
        return view

    def _hold(self, view: View, node: NodeView) -> None:
        num_taken = min(node.num_free, view.num_slots - view.num_held)
        view.num_held += num_taken
        node.num_free -= num_taken

    def _start_if_free(self, view: View) -> None:
        if view.phase is ReplicaPhase.HELD and not view.waits_for:
            assert view.num_held == view.num_slots, f"{view.id} has {view.num_held} of {view.num_slots} slots"
            view.phase = ReplicaPhase.STARTING
            self.orders.append(StartReplica(view.id, view.model, 0, view.node))

    def stop(self, view: View) -> None:
        """End a replica that has no requests."""
        assert not view.ongoing, f"{view.id} has {len(view.ongoing)} requests"
        view.phase = ReplicaPhase.STOPPING
        self.orders.append(StopReplica(view.id, view.node, "its slots are needed, or it is idle"))

    def _preempt(self, view: View, now_s: float) -> None:
        view.phase = ReplicaPhase.LEAVING
        for request in sorted(view.ongoing):
            waiter = self.requests[request]
            waiter.was_preempted = True
            waiter.attempts = 0
            self.orders.append(PreemptRequest(request, view.id))
            self._leave(waiter, now_s)
            self._enqueue(waiter)
        self._has_requeued = True

    def _begin_move(self, source: View, target: str, now_s: float) -> None:
        """Move a replica's requests to ``target``, a replica or a node to start one on."""
        source.phase = ReplicaPhase.LEAVING
        if target in self.nodes:
            view = self.carry_out(Placement(target), self.specs[source.model], now_s)
        else:
            view = self.views[target]
        self.targets[source.id] = view.id
        view.num_incoming += len(source.ongoing)
        if view.phase is ReplicaPhase.READY:
            self._move_all(source, view)

    def _move_all(self, source: View, target: View) -> None:
        self.orders.extend(MoveRequest(request, source.id, target.id) for request in sorted(source.ongoing))

    def _ready(self, replica: str, now_s: float) -> None:
        view = self.views.get(replica)
        if view is None or view.phase is not ReplicaPhase.STARTING:
            return
        self._startup_s[view.model] = now_s - view.since_s
        view.phase, view.since_s = ReplicaPhase.READY, now_s
        for source in [source for source, target in self.targets.items() if target == replica]:
            self._move_all(self.views[source], view)
        self._serve_all(now_s)

    def _ended(self, replica: str) -> None:
        view = self._drop(replica)
        if view is None:
            return
        node = self.nodes.get(view.node)
        if node is None:
            return
        node.num_free += view.num_held
        for other in [other for other in self.views.values() if replica in other.waits_for]:
            other.waits_for.discard(replica)
            self._hold(other, node)
            self._start_if_free(other)

    def _drop(self, replica: str) -> View | None:
        """Forget a replica, and call off the moves to it."""
        view = self.views.pop(replica, None)
        self.targets.pop(replica, None)
        if view is None:
            return None
        del self._replicas_of[view.model][replica]
        for source in [source for source, target in self.targets.items() if target == replica]:
            del self.targets[source]
            self._call_off(self.views[source])
        return view

    def _call_off(self, source: View) -> None:
        """Call off the moves from a replica: it stays, and starts that waited for its slots are given up."""
        if source.phase is ReplicaPhase.LEAVING:
            source.phase = ReplicaPhase.READY
        for held in [view for view in self.views.values() if source.id in view.waits_for]:
            self._ended(held.id)

    def _node_lost(self, node: str) -> None:
        self.nodes.pop(node, None)
        for replica in [view.id for view in self.views.values() if view.node == node]:
            self._drop(replica)

    def _drain_for_starving(self, now_s: float) -> None:
        oldest = min(((queue[0], model) for model, queue in self.waiting.items()), default=None)
        if oldest is None or now_s - oldest[0][0] <= STARVE_S:
            return
        views = list(self.views.values())
        busy = [view for view in views if view.phase is ReplicaPhase.READY and view.ongoing and view.model != oldest[1]]
        if (
            busy
            and not any(view.phase is ReplicaPhase.LEAVING for view in views)
            and self._num_lacking(self.specs[oldest[1]])
        ):
            min(busy, key=lambda view: (len(view.ongoing), view.id)).phase = ReplicaPhase.LEAVING

    # --------------------------------------------------------------------------------------------------- for place

    def idle_victims(self, node: NodeView, num_slots: int, but: Iterable[str] = ()) -> tuple[str, ...] | None:
        """Idle replicas whose slots, with the free ones, suffice, the longest idle first; None if even all don't
        suffice."""
        kept = set(but)
        idle = [v for v in self.views.values() if v.node == node.id and self._is_idle(v) and v.id not in kept]
        victims, num_free = list[str](), node.num_free
        for view in sorted(idle, key=lambda view: (view.since_s, view.id)):
            if num_free >= num_slots:
                break
            victims.append(view.id)
            num_free += view.num_slots
        return tuple(victims) if num_free >= num_slots else None

    def first_fit(self, nodes: Iterable[NodeView], spec: ModelSpec) -> Placement | None:
        """The first node with enough free slots, else the first where ending idle replicas frees enough."""
        order = list(nodes)
        fits: tuple[Callable[[NodeView], bool], ...] = (lambda node: node.num_free >= spec.accelerators, lambda _: True)
        for fit in fits:
            for node in filter(fit, order):
                victims = self.idle_victims(node, spec.accelerators)
                if victims is not None:
                    return Placement(node.id, victims)
        return None

    def _is_idle(self, view: View) -> bool:
        return view.phase is ReplicaPhase.READY and not view.ongoing and not view.num_incoming
