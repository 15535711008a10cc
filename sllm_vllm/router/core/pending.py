"""A start that waits until slots are free, and what replicas are called. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from sllm_vllm.router.core.placement import Plan

SLUG_MAX = 40


@dataclass(slots=True)
class PendingStart:
    """A plan whose victims have not all ended. ``holds``: placeholders of slots that are free and promised to it."""

    replica: str
    model: str
    generation: int
    plan: Plan
    victims: set[str]
    holds: list[str] = field(default_factory=list)


def slug_of(model: str) -> str:
    """What a replica's name begins with: the model's last word, without what a name may not hold."""
    last = model.rpartition("/")[2]
    kept = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in last)
    return kept.strip("-._")[:SLUG_MAX] or "model"
