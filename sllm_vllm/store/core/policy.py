"""Eviction policies: decide which partition's spans are worth least. Pure: uses and evictions in, a number out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Usage:
    """How a partition was used. ``span_s``: seconds to read one of its spans again."""

    span_s: float
    uses: int = 0
    last_used_s: float | None = None
    stamp: float = 0.0
    """Written and read only by the policy."""


class EvictionPolicy(Protocol):
    """Orders partitions by worth, and says from which end the spans of one are evicted."""

    tail_first: bool
    """Whether a partition's last spans are evicted first; otherwise its first spans are."""

    def touch(self, usage: Usage, now_s: float) -> None:
        """Record that a load of the partition begins or is expected."""

    def worth(self, usage: Usage) -> float:
        """Return the worth of a span of the partition, comparable only with worths from the same policy."""

    def evicted(self, worth: float) -> None:
        """Record that a span of this worth was evicted."""


class CostAware:
    """GreedyDual-Size-Frequency: spans that are slow to read again stay longer, and unused ones lose worth.

    Spans are of equal size, so the paper's cost divided by size is the seconds to read one again. The head of a
    partition stays longest, because the rest can be read while it is loaded. (Cherkasova, HP Labs 1998.)
    """

    tail_first = True

    def __init__(self) -> None:
        self._floor = 0.0

    def touch(self, usage: Usage, now_s: float) -> None:
        """Set the stamp to the current floor."""
        usage.stamp = self._floor

    def worth(self, usage: Usage) -> float:
        """Return the floor at its last use plus the cost of its uses. A partition never used counts as used once."""
        return usage.stamp + max(1, usage.uses) * usage.span_s

    def evicted(self, worth: float) -> None:
        """Raise the floor to ``worth``. It never falls, though a span that was in use for long may be cheaper."""
        self._floor = max(self._floor, worth)


class Lru:
    """Least recently used: evicts from the partition that was used longest ago, starting at its head."""

    tail_first = False

    def touch(self, usage: Usage, now_s: float) -> None:
        """Set the stamp to the current time."""
        usage.stamp = now_s

    def worth(self, usage: Usage) -> float:
        """Return when the partition was last touched."""
        return usage.stamp

    def evicted(self, worth: float) -> None:
        """Do nothing: worth depends on time only."""


_POLICIES: dict[str, type[CostAware | Lru]] = {"cost": CostAware, "lru": Lru}


def policy_named(name: str) -> EvictionPolicy:
    """Make the policy called ``cost`` or ``lru``.

    Raises:
        ValueError: no policy has this name.
    """
    if name not in _POLICIES:
        raise ValueError(f"no eviction policy is called {name!r}; there are {', '.join(_POLICIES)}")
    return _POLICIES[name]()
