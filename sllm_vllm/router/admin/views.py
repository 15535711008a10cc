"""The admin API's views: the controller's state as JSON records. Only reads, on the controller's loop.

Nothing here shows an engine's API key, the value of an engine's environment variable, or a Hub token.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum, IntEnum
from typing import Any

from sllm_vllm.node.protocol import NodeReport
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.controller import Controller
from sllm_vllm.router.core.cluster import Node, Replica, ReplicaState
from sllm_vllm.router.core.events import Action, Event
from sllm_vllm.router.core.facts import Estimate, Term
from sllm_vllm.router.core.model_state import ModelState, Prediction
from sllm_vllm.router.core.placement import Plan, best_plan, fits_somewhere

Record = dict[str, Any]
_SECRET_OPTIONS = ("--hf-token", "--hf_token")
_HIDDEN = "…"
ITEMS_SHOWN_MAX = 64
"""Longest mapping shown in an event; a node with thousands of models reports them every few seconds."""


def plain(value: object) -> object:
    """Convert a core record to JSON types.

    Enums become their value (an ``IntEnum`` its name), non-finite numbers null, and long mappings only their length.
    """
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name if isinstance(value, IntEnum) else value.value
    if isinstance(value, Mapping):
        if len(value) > ITEMS_SHOWN_MAX:
            return f"{len(value)} entries"
        return {str(plain(key)): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------- models


def model_views(controller: Controller) -> Iterator[Record]:
    """Yield a view of each deployed model; models may change between two steps."""
    newest = _newest_predictions(controller)
    for name in list(controller.models):
        if name in controller.models:
            yield model_view(controller, name, newest)


def model_view(controller: Controller, name: str, newest: Mapping[str, Prediction] | None = None) -> Record:
    """Return the view of a deployed model. ``newest``: the last prediction of each model, if the caller has it."""
    core, now_s = controller.core, controller.now_s()
    state = core.models[name]
    counted = Counter(replica.state for replica in core.cluster.replicas_of(name))
    prediction = (_newest_predictions(controller) if newest is None else newest).get(name)
    return {
        "name": name,
        **_engine_view(controller.models[name]),
        "spec": plain(state.spec),
        "replicas": {one.value: counted[one] for one in ReplicaState},
        "ongoing": state.num_ongoing,
        "waiting": core.queues.waiting(name),
        "back_off": _back_off(state, now_s),
        "prediction": None if prediction is None else prediction_view(prediction, now_s),
    }


def _engine_view(model: ModelConfig) -> Record:
    return {
        "source": model.source,
        "revision": model.revision,
        "engine_arguments": list(_without_secrets(model.engine_arguments)),
        "environment": sorted(model.environment),
    }


def _without_secrets(words: Iterable[str]) -> Iterator[str]:
    is_secret = False
    for word in words:
        option, equals, _ = word.partition("=")
        yield _HIDDEN if is_secret else f"{option}={_HIDDEN}" if equals and option in _SECRET_OPTIONS else word
        is_secret = not equals and option in _SECRET_OPTIONS


def _back_off(state: ModelState, now_s: float) -> Record | None:
    back_off = state.back_off
    if not back_off.num_failures:
        return None
    left_s = max(0.0, back_off.until_s - now_s)
    return {"num_failures": back_off.num_failures, "left_s": left_s, "reason": back_off.reason}


def _newest_predictions(controller: Controller) -> dict[str, Prediction]:
    """Return the prediction of each model's last start, whether that is complete or not."""
    newest: dict[str, Prediction] = {}
    for prediction in controller.core.scaling.predictions.values():
        known = newest.get(prediction.model)
        if known is None or prediction.decided_s >= known.decided_s:
            newest[prediction.model] = prediction
    return newest


def prediction_view(prediction: Prediction, now_s: float) -> Record:
    """Compare what a start was expected to take with what it took, which is null until its first answer."""
    expected, actual = prediction.expected, prediction.actual
    return {
        "replica": prediction.replica,
        "node": prediction.node,
        "kind": prediction.kind,
        "tier": prediction.tier,
        "is_warm": prediction.is_warm,
        "ago_s": now_s - prediction.decided_s,
        "terms": [_compared(term, expected, actual) for term in Term],
        "expected_s": expected.total_s,
        "actual_s": None if actual is None else actual.total_s,
    }


def _compared(term: Term, expected: Estimate, actual: Estimate | None) -> Record:
    took_s = None if actual is None else actual.terms.get(term, 0.0)
    return {"term": term.value, "expected_s": expected.terms.get(term, 0.0), "actual_s": took_s}


# ------------------------------------------------------------------------------------------------ replicas and nodes


def replicas_view(controller: Controller) -> Record:
    """Return what the router knows about each replica, and its agent's report. Placeholders of slots are left out."""
    replicas = controller.core.cluster.replicas.values()
    return {"replicas": [_replica(controller, replica) for replica in replicas if replica.model]}


def _replica(controller: Controller, replica: Replica) -> Record:
    now_s = controller.now_s()
    report = controller.report_of(replica.id)
    is_coming = replica.state is ReplicaState.ORDERED
    return {
        "id": replica.id,
        "model": replica.model,
        "node": replica.node,
        "generation": replica.generation,
        "num_slots": replica.num_slots,
        "state": replica.state.value,
        "in_state_s": now_s - replica.state_since_s,
        "age_s": now_s - replica.ordered_s,
        "ready_in_s": max(0.0, replica.ready_at_s - now_s) if is_coming else None,
        "idle_s": None if replica.idle_since_s is None else now_s - replica.idle_since_s,
        "ongoing": len(replica.ongoing),
        "is_movable": replica.is_movable,
        "is_pinned": replica.is_pinned,
        "report": None if report is None else report.model_dump(mode="json", exclude={"api_key"}),
    }


def requests_view(controller: Controller, num_max: int) -> Record:
    """Return up to ``num_max`` requests that have not ended, oldest first."""
    now_s = controller.now_s()
    requests = itertools.islice(controller.core.requests.values(), num_max)
    return {
        "requests": [
            {
                "id": one.facts.id,
                "model": one.facts.model,
                "replica": one.replica,
                "target": one.target,
                "age_s": now_s - one.arrived_s,
                "is_answered": one.is_answered,
            }
            for one in requests
        ]
    }


def nodes_view(controller: Controller) -> Record:
    """Return what the router knows about each node, and its agent's report."""
    return {"nodes": [_node(controller, node) for node in controller.core.cluster.nodes.values()]}


def _node(controller: Controller, node: Node) -> Record:
    report = controller.node_reports().get(node.id)
    return {
        "id": node.id,
        "num_slots": node.num_slots,
        "num_free": node.num_free,
        "is_warm": node.is_warm,
        "warm_in_s": max(0.0, node.warm_at_s - controller.now_s()) if node.is_warm else 0.0,
        "is_drained": node.is_cordoned,
        "load_s": max(0.0, node.load_until_s - controller.now_s()),
        "tiers": {model: tier.name for model, tier in node.tiers.items()},
        "replicas": [replica.id for replica in node.replicas.values() if replica.model],
        "report": None if report is None else _node_report(report),
    }


def _node_report(report: NodeReport) -> Record:
    fields = {"version", "pid", "uptime_s", "platform", "slots", "warm", "timings"}
    return report.model_dump(mode="json", include=fields)


def stores_view(controller: Controller) -> Record:
    """Return checkpoints and hops from the nodes' last reports. ``problem``: why a store does not answer, or empty."""
    return {
        "stores": [
            {"node": name, "problem": report.store, **report.model_dump(mode="json", include={"checkpoints", "hops"})}
            for name, report in controller.node_reports().items()
        ]
    }


# ---------------------------------------------------------------------------------------------------------- stories


def events_view(story: Sequence[tuple[float, Event | Action]], now_s: float) -> Record:
    """Return events and actions as records, oldest first."""
    return {
        "events": [{"ago_s": now_s - at_s, "kind": type(what).__name__, "fields": plain(what)} for at_s, what in story]
    }


# ------------------------------------------------------------------------------------------------------ explaining


def explain_view(controller: Controller, name: str) -> Record:
    """Return what the router would do for the model now, and how good its last prediction was."""
    core, now_s = controller.core, controller.now_s()
    state = core.models[name]
    plans = core.scaling.plans_for(state, now_s)
    best = best_plan(plans, slack_s=core.scaling.limits.slack_s)
    last = core.scaling.predictions.get(name)
    return {
        "model": name,
        "request": _request_now(controller, state, best),
        "plans": [_plan(plan, is_best=plan is best) for plan in plans],
        "under_way": [
            prediction_view(one, now_s)
            for one in core.scaling.predictions.values()
            if one.model == name and one.actual is None
        ],
        "last": None if last is None or last.actual is None else prediction_view(last, now_s),
    }


def _plan(plan: Plan, *, is_best: bool) -> Record:
    return {
        "kind": plan.kind.value,
        "node": plan.node,
        "tier": plan.tier.name,
        "is_warm": plan.is_warm,
        "is_best": is_best,
        "victims": list(plan.victims),
        "moved": list(plan.moved),
        "terms": {term.value: plan.estimate.terms.get(term, 0.0) for term in Term},
        "total_s": plan.estimate.total_s,
    }


def _request_now(controller: Controller, state: ModelState, best: Plan | None) -> Record:
    """Return what would happen to one more request. The branches mirror the core's, in the same order."""
    core, spec, now_s = controller.core, state.spec, controller.now_s()
    ready = core.cluster.least_busy(spec.name, 1)
    # 1. Its starts fail and no replica is ready.
    if state.back_off.is_hopeless and state.back_off.is_resting(now_s) and not ready:
        return _met("refused", why=state.back_off.reason)
    # 2. A replica has room, and no request waits.
    waiting = core.queues.waiting(spec.name)
    if not waiting and ready and len(ready[0].ongoing) < spec.ongoing_max:
        first_token_s = core.estimator.prefill_s(spec.name, ready[0].node, 0)
        return _met("replica", expected_s=first_token_s, replica=ready[0].id)
    # 3. The queue is full.
    if waiting >= spec.queue_max or len(core.queues) >= core.queues.total_max:
        return _met("refused", why="the queue is full")
    # 4. It waits for a replica to have room, or 5. for a start.
    return _met("queue", why="every replica is full") if ready else _start_now(controller, state, best)


def _start_now(controller: Controller, state: ModelState, best: Plan | None) -> Record:
    """Return what one more request would wait for, given that no replica is ready."""
    core, name, now_s = controller.core, state.spec.name, controller.now_s()
    if coming := core.cluster.replicas_of(name, ReplicaState.ORDERED):
        first = min(coming, key=lambda replica: replica.ready_at_s)
        return _met("starting", expected_s=max(0.0, first.ready_at_s - now_s), replica=first.id)
    if pending := core.scaling.pending.of_model(name):
        return _met("starting", replica=pending[0].replica, why="it waits for slots to come free")
    if state.back_off.is_resting(now_s):
        return _met("queue", why=f"the last start failed: {state.back_off.reason}")
    if best is None:
        is_possible = fits_somewhere(core.cluster, state.spec.accelerators)
        why = (
            "no node has the slots, or can free them now" if is_possible else "no node that takes starts has the slots"
        )
        return _met("queue", why=why)
    return _met("start", expected_s=best.estimate.total_s)


def _met(what: str, *, expected_s: float | None = None, replica: str | None = None, why: str = "") -> Record:
    return {"what": what, "replica": replica, "expected_s": expected_s, "why": why}
