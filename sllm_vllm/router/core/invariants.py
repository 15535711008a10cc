"""The core's invariants, asserted after every event in tests and in the simulator. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sllm_vllm.router.core.cluster import ReplicaState

if TYPE_CHECKING:
    from sllm_vllm.router.core.router import RouterCore


def validate(core: RouterCore) -> None:
    """Assert every invariant of a core. Scans the whole state."""
    core.cluster.validate()
    core.queues.validate()
    core.moves.validate()
    core.trials.validate()
    _validate_requests(core)
    _validate_models(core)
    _validate_pending(core)
    _validate_nodes(core)


def _validate_requests(core: RouterCore) -> None:
    """A request waits once or is on one replica; bounds are kept; no ordinary request waits while there is room."""
    waiting = Counter(request.facts.model for request in core.requests.values() if request.is_queued)
    for model, state in core.models.items():
        assert core.queues.waiting(model) == waiting[model], f"{model}: {waiting[model]} requests wait"
        assert waiting[model] <= max(state.spec.queue_max, state.num_kept)
        ready = core.cluster.replicas_of(model, ReplicaState.READY)
        if any(core.requests[facts.id].is_ordinary for facts in core.queues.in_order(model)):
            fit = [one for one in ready if one.id not in core.failing and not core.trials.is_closed(one)]
            assert all(len(one.ongoing) >= state.spec.ongoing_max for one in fit), (
                f"{model}: a request waits although a replica has room"
            )
    for replica in core.cluster.replicas.values():
        for request_id in replica.ongoing:
            places = (core.requests[request_id].replica, core.requests[request_id].target)
            assert replica.id in places, f"{request_id} is not on {replica.id}"
    for request_id, request in core.requests.items():
        assert request.attempt - request.num_unreached <= core.limits.attempts_max + request.num_resumes
        assert request.is_held == (request_id in core.deaths)
        replica_id = request.replica
        if replica_id is not None and replica_id in core.cluster.replicas:
            assert request_id in core.cluster.replicas[replica_id].ongoing


def _validate_models(core: RouterCore) -> None:
    ongoing = Counter(request.facts.model for request in core.requests.values() if request.replica is not None)
    for model, state in core.models.items():
        assert state.num_ongoing == ongoing[model], f"{model}: {state.num_ongoing} counted, {ongoing[model]} there are"
        assert core.scaling.num_coming(model) <= state.spec.max_replicas, f"{model}: too many replicas are starting"


def _validate_pending(core: RouterCore) -> None:
    """Every placeholder belongs to exactly one pending start, and every pending start has victims that are ending."""
    holds = [hold for pending in core.scaling.pending.all() for hold in pending.holds]
    assert len(set(holds)) == len(holds)
    assert {name for name, one in core.cluster.replicas.items() if not one.model} == set(holds)
    for pending in core.scaling.pending.all():
        assert pending.victims, f"{pending.replica} waits without a victim"
        for victim in pending.victims:
            assert core.cluster.replicas[victim].state in (ReplicaState.DRAINING, ReplicaState.STOPPING)


def _validate_nodes(core: RouterCore) -> None:
    """On a drained node nothing starts, no slots are freed for a start, and no replica gets new requests."""
    for node in core.cluster.nodes.values():
        assert node.is_cordoned == (node.id in core.membership.cordoned), f"{node.id} is wrong about its cordon"
        if node.is_cordoned:
            leaving = (ReplicaState.DRAINING, ReplicaState.STOPPING)
            assert all(one.state in leaving for one in node.replicas.values()), f"{node.id} is drained"
            assert not core.scaling.pending.of_node(node.id), f"{node.id} is drained, and a start waits for it"
