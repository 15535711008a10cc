"""How many replicas a model should have for its current load. Pure; called by the router's core.

Scales up at once, because requests are waiting. Scales down only after fewer replicas have been enough for
``DOWN_DELAY_S``, and then to the most that were needed during that time. The last replica is never removed here: it
idles, and keep-alive decides when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from sllm_vllm.router.core.facts import ModelSpec

DOWN_DELAY_S = 30.0


@dataclass(slots=True)
class AutoscaleState:
    """What is remembered about one model between two calls."""

    down_delay_s: float = DOWN_DELAY_S
    lower_since_s: float | None = None
    """Since when fewer replicas would have been enough; None if all are needed."""
    num_needed: int = 0
    """The most replicas needed since then."""


def desired_replicas(
    spec: ModelSpec, *, ongoing: int, waiting: int, num_now: int, now_s: float, state: AutoscaleState
) -> int:
    """Return the number of replicas the model should have.

    ``num_now`` counts the replicas that take requests or will once they are ready, not those that drain or stop.
    """
    wish = _wish(spec, num_requests=ongoing + waiting, num_now=num_now)
    if wish >= num_now:
        state.lower_since_s = None
        return wish
    if state.lower_since_s is None:
        state.lower_since_s, state.num_needed = now_s, wish
    state.num_needed = max(state.num_needed, wish)
    if now_s - state.lower_since_s < state.down_delay_s:
        return min(num_now, spec.max_replicas)
    needed = min(state.num_needed, num_now)  # replicas may have died since
    state.lower_since_s, state.num_needed = now_s, wish  # restart the delay for the next step down
    return min(needed, spec.max_replicas)


def _wish(spec: ModelSpec, *, num_requests: int, num_now: int) -> int:
    """Return the number needed now, without the delay. ``max_replicas`` overrides everything else."""
    assert spec.target_ongoing >= 1, "a replica has at least one request at once"
    enough = -(-num_requests // spec.target_ongoing)
    return min(max(enough, spec.min_replicas, min(num_now, 1)), spec.max_replicas)
