"""Which replicas to stop to free slots, at the least cost. Pure; called by placement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Victim(NamedTuple):
    """A replica that may be stopped, and the expected cost of that: in any unit, never negative."""

    id: str
    num_slots: int
    cost: float


def choose_victims(idle: Sequence[Victim], num_slots_needed: int) -> tuple[str, ...] | None:
    """Return the ids of the cheapest victims whose slots suffice; None if even all of them do not.

    Exact: dynamic programming over the slots freed so far. Ties: fewer slots freed, fewer victims, then the ids.
    """
    if num_slots_needed <= 0:
        return ()
    if num_slots_needed == 1:
        return (min(idle, key=lambda victim: (victim.cost, victim.num_slots, victim.id)).id,) if idle else None
    best: dict[int, tuple[float, int, tuple[str, ...]]] = {0: (0.0, 0, ())}  # by slots: cost, number, ids
    for victim in sorted(idle):
        for slots, (cost, num, ids) in list(best.items()):
            if slots >= num_slots_needed:
                continue  # enough already: costs are not negative, so another victim is never better
            freed = slots + victim.num_slots
            more = (cost + victim.cost, num + 1, (*ids, victim.id))
            if freed not in best or more < best[freed]:
                best[freed] = more
    enough = [(cost, slots, num, ids) for slots, (cost, num, ids) in best.items() if slots >= num_slots_needed]
    return min(enough)[3] if enough else None
