"""Selects events and actions for the story of a request, replica, model or node. Pure."""

from __future__ import annotations

from sllm_vllm.router.core.events import Action, Event
from sllm_vllm.router.core.facts import ModelSpec, RequestFacts

_FIELDS = ("request", "replica", "model", "node", "target", "source")


def is_about(what: Event | Action, name: str) -> bool:
    """Whether an event or action refers to the request, replica, model or node of this name."""
    if name in (getattr(what, field, None) for field in _FIELDS):
        return True
    facts: RequestFacts | None = getattr(what, "facts", None)
    spec: ModelSpec | None = getattr(what, "spec", None)
    return (facts is not None and name in (facts.id, facts.model)) or (spec is not None and name == spec.name)
