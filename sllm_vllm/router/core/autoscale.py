"""How many replicas a model should have for what is asked of it now. Pure; asked by the router's core.

Up at once, as somebody waits; down only after fewer have been enough for a while, and then to the most that were
needed in that while. The last replica is never taken here: it idles, and keep-alive decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from sllm_vllm.router.core.facts import ModelSpec

DOWN_DELAY_S = 30.0


@dataclass(slots=True)
class AutoscaleState:
    """What is remembered of one model between two questions."""

    down_delay_s: float = DOWN_DELAY_S
    lower_since_s: float | None = None
    """Since when fewer would have been enough; None: they would not."""
    num_needed: int = 0
    """The most that were needed since then."""


def desired_replicas(
    spec: ModelSpec, *, ongoing: int, waiting: int, num_now: int, now_s: float, state: AutoscaleState
) -> int:
    """How many there should be. ``num_now``: those that take requests or will, so not those that drain or stop."""
    wish = _wish(spec, num_requests=ongoing + waiting, num_now=num_now)
    if wish >= num_now:
        state.lower_since_s = None
        return wish
    if state.lower_since_s is None:
        state.lower_since_s, state.num_needed = now_s, wish
    state.num_needed = max(state.num_needed, wish)
    if now_s - state.lower_since_s < state.down_delay_s:
        return min(num_now, spec.max_replicas)
    needed = min(state.num_needed, num_now)  # some may have died since
    state.lower_since_s, state.num_needed = now_s, wish  # the next step down waits as long
    return min(needed, spec.max_replicas)


def _wish(spec: ModelSpec, *, num_requests: int, num_now: int) -> int:
    """What would do, if it could be had at once. ``max_replicas`` goes before everything."""
    assert spec.target_ongoing >= 1, "a replica has at least one request at once"
    enough = -(-num_requests // spec.target_ongoing)
    return min(max(enough, spec.min_replicas, min(num_now, 1)), spec.max_replicas)
