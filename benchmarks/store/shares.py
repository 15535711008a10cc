"""Results of the store's benchmarks: measurements, their limits, and whether a goal is met. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Rule = Literal["share", "times", "seconds"]
"""What the goal applies to. ``share``: a lower bound on the limit's seconds over ours. ``times``: an upper bound on our
seconds over the limit's. ``seconds``: an upper bound on our seconds.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One measurement and its limit, once per round; each round's measurement is compared with that round's limit."""

    name: str
    rule: Rule
    goal: float
    ours_s: Sequence[float]
    limit_s: Sequence[float] = ()
    note: str = ""

    @property
    def value(self) -> float:
        """The value that the goal applies to: the median over the rounds."""
        match self.rule:
            case "share":
                return statistics.median(limit / ours for ours, limit in self._pairs())
            case "times":
                return statistics.median(ours / limit for ours, limit in self._pairs())
            case "seconds":
                return statistics.median(self.ours_s)

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached."""
        return self.value >= self.goal if self.rule == "share" else self.value <= self.goal

    def line(self) -> str:
        """The verdict, as a line to print."""
        ours = f"{statistics.median(self.ours_s):.4f} s"
        limit = f" beside {statistics.median(self.limit_s):.4f} s" if self.limit_s else ""
        match self.rule:
            case "share":
                said = f"{self.value:.1%} >= {self.goal:.0%}"
            case "times":
                said = f"{self.value:.3f} x <= {self.goal:.2f} x"
            case "seconds":
                said = f"{self.value * 1000:.1f} ms <= {self.goal * 1000:.0f} ms"
        return f"{self.name}: {ours}{limit}: {said}: {'yes' if self.is_met else 'NO'}"

    def as_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {
            "kind": "share",
            "name": self.name,
            "rule": self.rule,
            "value": round(self.value, 4),
            "goal": self.goal,
            "met": self.is_met,
            "ours_s": [round(seconds, 4) for seconds in self.ours_s],
            "limit_s": [round(seconds, 4) for seconds in self.limit_s],
            "note": self.note,
        }

    def _pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.ours_s, self.limit_s, strict=True))
