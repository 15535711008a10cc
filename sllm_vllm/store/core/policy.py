"""Which partition's spans are worth least. Pure: told of uses and evictions, it answers with a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Usage:
    """What is remembered of a partition's use. ``span_s``: seconds to get one span back."""

    span_s: float
    uses: int = 0
    last_used_s: float | None = None
    stamp: float = 0.0
    """Written and read by the policy alone."""


class Policy(Protocol):
    """An order of partitions by worth, and of the spans in one."""

    tail_first: bool
    """Whether a partition's last spans go first; else its first ones do."""

    def touch(self, usage: Usage, now_s: float) -> None:
        """A load of the partition begins, or is expected."""

    def worth(self, usage: Usage) -> float:
        """What a span of the partition is worth; comparable with other worths of the same policy alone."""

    def evicted(self, worth: float) -> None:
        """A span of this worth went."""


class CostAware:
    """GreedyDual-Size-Frequency: a span that is slow to get back stays longer, and what is not used grows cheap.

    Spans are of one size, so the paper's cost by size is the seconds to get one back. The head of a partition stays
    longest, because loading it hides the reading of the rest. (Cherkasova, HP Labs 1998.)
    """

    tail_first = True

    def __init__(self) -> None:
        self._floor = 0.0

    def touch(self, usage: Usage, now_s: float) -> None:
        """Raise it to today's floor."""
        usage.stamp = self._floor

    def worth(self, usage: Usage) -> float:
        """The floor at its last use, and what its uses would have cost. One that is expected counts as used once."""
        return usage.stamp + max(1, usage.uses) * usage.span_s

    def evicted(self, worth: float) -> None:
        """Raise the floor; never lower it, as a span that was in use for long may be cheaper than the last victim."""
        self._floor = max(self._floor, worth)


class Lru:
    """The partition used longest ago goes first, from the span it used longest ago."""

    tail_first = False

    def touch(self, usage: Usage, now_s: float) -> None:
        """It is the latest now."""
        usage.stamp = now_s

    def worth(self, usage: Usage) -> float:
        """When it was touched last."""
        return usage.stamp

    def evicted(self, worth: float) -> None:
        """Nothing grows old but by time."""


_POLICIES: dict[str, type[CostAware | Lru]] = {"cost": CostAware, "lru": Lru}


def policy_named(name: str) -> Policy:
    """A new policy, ``cost`` or ``lru``.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in _POLICIES:
        raise ValueError(f"no eviction policy is called {name!r}; there are {', '.join(_POLICIES)}")
    return _POLICIES[name]()
