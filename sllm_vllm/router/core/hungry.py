"""Models that lack a replica and found no place for it, in the order in which they are served. Pure."""

from __future__ import annotations

import heapq

from sllm_vllm.router.core.facts import ModelSpec
from sllm_vllm.router.core.queues import ModelQueues

Key = tuple[bool, int, float]
"""Whether no request waits, the negated priority, and the arrival of the oldest waiting request."""

SPARE = 64
"""Stale heap entries that are tolerated beyond the number of live ones."""


class Hungry:
    """Higher priority first, then the longest-waiting oldest request; models without waiting requests come last.

    A lazy heap: if a model's oldest request was served, its entry is corrected when popped. A model that gets an older
    request must be added again.
    """

    def __init__(self, queues: ModelQueues) -> None:
        self._queues = queues
        self._specs: dict[str, ModelSpec] = {}
        self._keys: dict[str, Key] = {}
        """Each model's key in the heap."""
        self._heap: list[tuple[Key, str]] = []

    def __contains__(self, model: object) -> bool:
        return model in self._specs

    def add(self, spec: ModelSpec) -> None:
        """Add a model that lacks a replica, or update it."""
        self._specs[spec.name] = spec
        self._push(spec.name)

    def discard(self, model: str) -> None:
        """Remove a model, if it is there."""
        self._specs.pop(model, None)
        self._keys.pop(model, None)

    def first(self, num_max: int) -> list[str]:
        """Return up to ``num_max`` models, in the order in which they are served."""
        found: list[str] = []
        while self._heap and len(found) < num_max:
            key, model = heapq.heappop(self._heap)
            if self._keys.get(model) != key or model in found:
                continue
            if self._key(model) == key:
                found.append(model)
            else:
                self._push(model)
        for model in found:
            heapq.heappush(self._heap, (self._keys[model], model))
        return found

    def _push(self, model: str) -> None:
        key = self._key(model)
        if self._keys.get(model) != key:
            self._keys[model] = key
            heapq.heappush(self._heap, (key, model))
            if len(self._heap) > 2 * len(self._keys) + SPARE:  # stale entries further down may never surface
                self._heap = [(key, model) for model, key in self._keys.items()]
                heapq.heapify(self._heap)

    def _key(self, model: str) -> Key:
        oldest_s = self._queues.oldest_s(model)
        return oldest_s is None, -self._specs[model].priority, oldest_s or 0.0
