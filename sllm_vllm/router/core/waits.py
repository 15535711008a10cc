"""What a model's requests wait for, in words for a client, and when to retry. Pure; called by ``RouterCore``."""

from __future__ import annotations

from collections.abc import Container, Iterable

from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState
from sllm_vllm.router.core.facts import ModelSpec
from sllm_vllm.router.core.model_state import ModelState
from sllm_vllm.router.core.placement import fits_somewhere
from sllm_vllm.router.core.scaling import Scaling

LATE_SHARE = 0.25
"""How much later than predicted a start may be, as a share of its predicted time, before requests stop waiting."""
SHOWN_MAX = 4
"""Replicas named in a message; the others are only counted."""
RETRY_S_MIN = 1.0
RETRY_S_MAX = 60.0
"""Longest retry time, except where a start is predicted to be ready later; also used without any estimate."""


def due_s(spec: ModelSpec, cluster: Cluster) -> float | None:
    """Return the latest time by which the model's first starting engine should be ready; None if none starts."""
    coming = _coming(spec, cluster)
    times = [one.ready_at_s + LATE_SHARE * max(0.0, one.ready_at_s - one.ordered_s) for one in coming]
    return min(times, default=None)


def what_it_waits_for(
    state: ModelState, scaling: Scaling, now_s: float, *, failing: Container[str]
) -> tuple[str, float]:
    """Return what a waiting request waits for, as text, and after how many seconds to retry.

    ``failing``: IDs of the replicas that get no requests because they have just failed one.
    """
    spec, cluster = state.spec, scaling.cluster
    # 1. An engine is starting.
    if coming := _coming(spec, cluster):
        return _starting(min(coming, key=lambda one: (one.ready_at_s, one.id)), now_s)
    startup_s = scaling.estimator.startup_s(spec)
    # 2. A start waits for its victims to end.
    if pending := scaling.pending.of_model(spec.name):
        victims = [cluster.replicas[name] for name in sorted(pending[0].victims)]
        return f"its engine starts when these have ended: {_listed(victims, now_s)}", _retry_s(startup_s)
    # 3. Its replicas have just failed requests, or they are full.
    if ready := cluster.replicas_of(spec.name, ReplicaState.READY):
        if all(one.id in failing for one in ready):
            return f"all its replicas have just failed requests: {_listed(ready, now_s)}", RETRY_S_MIN
        num = sum(len(one.ongoing) for one in ready)
        return f"all its replicas are busy: {num} requests on {len(ready)}", _retry_s(state.service_s)
    # 4. No node is large enough, or 5. other models hold the slots.
    if not fits_somewhere(cluster, spec.accelerators):
        return f"it takes {spec.accelerators} slots, and no node that takes starts has as many", RETRY_S_MAX
    others = [one for one in cluster.replicas.values() if one.model]
    if not others:
        return "its start could not begin in time", _retry_s(startup_s)
    return f"all slots are taken: {_listed(others, now_s)}", _retry_s(startup_s)


def _coming(spec: ModelSpec, cluster: Cluster) -> list[Replica]:
    ordered = cluster.replicas_of(spec.name, ReplicaState.ORDERED)
    return [one for one in ordered if one.generation == spec.generation]


def _starting(replica: Replica, now_s: float) -> tuple[str, float]:
    passed_s, left_s = now_s - replica.ordered_s, replica.ready_at_s - now_s
    said = f"its engine on node {replica.node} has been starting for {passed_s:.0f} s"
    if left_s > 0:
        return f"{said} and is expected in {max(1.0, left_s):.0f} s", max(RETRY_S_MIN, left_s)
    return f"{said}, {-left_s:.0f} s longer than predicted", _retry_s(-left_s)


def _listed(replicas: Iterable[Replica], now_s: float) -> str:
    told = [f"{one.model} on {one.node} ({_doing(one, now_s)})" for one in replicas]
    more = f" and {len(told) - SHOWN_MAX} more" if len(told) > SHOWN_MAX else ""
    return ", ".join(told[:SHOWN_MAX]) + more


def _doing(replica: Replica, now_s: float) -> str:
    if replica.state is ReplicaState.ORDERED:
        return f"starting for {now_s - replica.state_since_s:.0f} s"
    if replica.ongoing:
        return f"{len(replica.ongoing)} requests"
    if replica.is_pinned:
        return "kept by its min_replicas"
    return "idle" if replica.state is ReplicaState.READY else replica.state.value


def _retry_s(seconds: float) -> float:
    return min(RETRY_S_MAX, max(RETRY_S_MIN, seconds))
