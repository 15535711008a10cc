"""Which idle replicas to stop for slots. Pure; called by placement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Victim(NamedTuple):
    """A replica that may be stopped, and what that is expected to cost: any unit, never negative."""

    id: str
    num_slots: int
    cost: float


def choose_victims(idle: Sequence[Victim], num_slots_needed: int) -> tuple[str, ...] | None:
    """The ids with the smallest total cost whose slots suffice; None if all of them do not.

    Exact: a dynamic programme over the slots freed so far. Ties: fewer slots freed, fewer victims, then the ids.
    """
    if num_slots_needed <= 0:
        return ()
    if num_slots_needed == 1:
        return (min(idle, key=lambda victim: (victim.cost, victim.num_slots, victim.id)).id,) if idle else None
    best: dict[int, tuple[float, int, tuple[str, ...]]] = {0: (0.0, 0, ())}  # by slots: cost, number, ids
    for victim in sorted(idle):
        for slots, (cost, num, ids) in list(best.items()):
            if slots >= num_slots_needed:
                continue  # costs are not negative: one more than suffices is never better
            freed = slots + victim.num_slots
            more = (cost + victim.cost, num + 1, (*ids, victim.id))
            if freed not in best or more < best[freed]:
                best[freed] = more
    enough = [(cost, slots, num, ids) for slots, (cost, num, ids) in best.items() if slots >= num_slots_needed]
    return min(enough)[3] if enough else None
