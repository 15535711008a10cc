"""Models that lack a replica and find no place, in the order in which they are to be served. Pure."""

from __future__ import annotations

import heapq

from sllm_vllm.router.core.facts import ModelSpec
from sllm_vllm.router.core.queues import ModelQueues

Key = tuple[bool, int, float]
"""Whether nobody waits, the priority negated, and since when somebody waits."""

SPARE = 64
"""Stale entries that are not worth a tidying."""


class Hungry:
    """Higher priority first, then whose oldest request has waited longest; those nobody waits for come last.

    A lazy heap: a model whose oldest request was served goes back when it comes up; one that got an older one must be
    added again.
    """

    def __init__(self, queues: ModelQueues) -> None:
        self._queues = queues
        self._specs: dict[str, ModelSpec] = {}
        self._keys: dict[str, Key] = {}
        """As they stand in the heap."""
        self._heap: list[tuple[Key, str]] = []

    def __contains__(self, model: object) -> bool:
        return model in self._specs

    def add(self, spec: ModelSpec) -> None:
        """It lacks one."""
        self._specs[spec.name] = spec
        self._push(spec.name)

    def discard(self, model: str) -> None:
        """It lacks none (any more)."""
        self._specs.pop(model, None)
        self._keys.pop(model, None)

    def first(self, num_max: int) -> list[str]:
        """Those to be served first."""
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
            if len(self._heap) > 2 * len(self._keys) + SPARE:  # others may hide what is stale for ever
                self._heap = [(key, model) for model, key in self._keys.items()]
                heapq.heapify(self._heap)

    def _key(self, model: str) -> Key:
        oldest_s = self._queues.oldest_s(model)
        return oldest_s is None, -self._specs[model].priority, oldest_s or 0.0
