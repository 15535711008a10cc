"""The requests that wait for a replica of their model. Pure; owned by the router's core.

Each model's queue, and the order of the models, are sorted lists. An insertion shifts pointers; with at most a few
thousand requests that is faster than removing early leavers from a heap. Deadlines are a heap in which early leavers
stay until they are popped or outnumber the live entries.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from sllm_vllm.errors import SllmError
from sllm_vllm.router.core.facts import ModelSpec, RequestFacts

STALE_DEADLINES_MAX = 64
"""Stale deadlines, of requests that left, that are tolerated beyond the number of waiting requests."""

Rank = tuple[int, float, int]
"""Negated priority, arrival time, push number: the smallest is served first."""


class QueueFull(SllmError):
    """A queue is full. ``reason`` says which one, and what would help."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class _Entry:
    facts: RequestFacts
    rank: Rank
    deadline_s: float

    @property
    def age_key(self) -> tuple[float, int]:
        return self.rank[1:]


@dataclass(slots=True)
class _Queue:
    """One model's queue; never empty except during a change."""

    ranks: list[tuple[Rank, str]] = field(default_factory=list)
    """Ranks and request ids, sorted."""
    ages: list[tuple[float, int]] = field(default_factory=list)
    """Arrival times and push numbers, sorted."""
    head: tuple[Rank, str] | None = None
    """Its entry in the models' order: the first rank, and the model."""


class ModelQueues:
    """All waiting requests. Within a model: highest priority first, then earliest arrival, then first pushed.

    Every request waits at most once, and every queue's head is in the models' order exactly once.
    """

    def __init__(self, total_max: int) -> None:
        self.total_max = total_max
        self._num_kept = 0
        """Requests that waited when ``total_max`` was last changed; they may exceed it."""
        self._entries: dict[str, _Entry] = {}
        self._queues: dict[str, _Queue] = {}
        self._heads: list[tuple[Rank, str]] = []
        self._deadlines: list[tuple[float, int, str]] = []
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def set_total_max(self, total_max: int) -> None:
        """Change the maximum number of waiting requests; those that wait already stay."""
        self.total_max = total_max
        self._num_kept = len(self)

    def push(self, facts: RequestFacts, now_s: float, *, spec: ModelSpec, away_s: float = 0.0) -> None:
        """Queue a request as waiting since ``now_s``. Pass a returning one's first arrival, to give it its old place.

        ``away_s``: seconds since then that it spent on replicas; its deadline is later by as much.

        Raises:
            QueueFull: its model's queue, or the whole router, has no room.
        """
        self._check_room(spec)
        self.put_back(facts, now_s, spec=spec, away_s=away_s)

    def put_back(self, facts: RequestFacts, now_s: float, *, spec: ModelSpec, away_s: float = 0.0) -> None:
        """Queue a request that was just taken from the queue, without checking for room."""
        assert facts.id not in self._entries, f"{facts.id} waits already"
        assert facts.model == spec.name, f"{facts.id} is for {facts.model}"
        self._num_pushed += 1
        rank = (-(spec.priority + facts.priority), now_s, self._num_pushed)
        deadline_s = now_s + away_s + spec.queue_s_max if facts.deadline_s is None else facts.deadline_s
        entry = self._entries[facts.id] = _Entry(facts, rank, deadline_s)
        queue = self._queues.setdefault(facts.model, _Queue())
        insort(queue.ranks, (rank, facts.id))
        insort(queue.ages, entry.age_key)
        self._place_head(facts.model, queue)
        heappush(self._deadlines, (deadline_s, rank[2], facts.id))

    def pop(self, model: str) -> RequestFacts | None:
        """Remove and return the model's next request; None if none waits."""
        facts = self.peek(model)
        if facts is not None:
            self._take(facts.id)
        return facts

    def peek(self, model: str) -> RequestFacts | None:
        """Return the model's next request without removing it; None if none waits."""
        queue = self._queues.get(model)
        return None if queue is None else self._entries[queue.ranks[0][1]].facts

    def in_order(self, model: str) -> Iterator[RequestFacts]:
        """Yield the model's requests in the order in which they are served. The queue must not change meanwhile."""
        queue = self._queues.get(model)
        for _, request_id in queue.ranks if queue is not None else ():
            yield self._entries[request_id].facts

    def remove(self, request_id: str) -> bool:
        """Remove a request; return False if it does not wait."""
        if request_id not in self._entries:
            return False
        self._take(request_id)
        return True

    def expire(self, now_s: float) -> list[RequestFacts]:
        """Remove and return the requests whose deadline has passed, earliest deadline first."""
        expired: list[RequestFacts] = []
        while (deadline_s := self.next_deadline_s()) is not None and deadline_s <= now_s:
            expired.append(self._take(heappop(self._deadlines)[2]))
        return expired

    def next_deadline_s(self) -> float | None:
        """Return the earliest deadline, when ``expire`` next has something to do; None if no request waits."""
        while self._deadlines and not self._waits(self._deadlines[0]):
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def waiting(self, model: str) -> int:
        """Return how many of the model's requests wait."""
        queue = self._queues.get(model)
        return 0 if queue is None else len(queue.ranks)

    def oldest_s(self, model: str) -> float | None:
        """Return when the model's longest-waiting request arrived; None if none waits."""
        queue = self._queues.get(model)
        return None if queue is None else queue.ages[0][0]

    def models(self) -> Iterator[str]:
        """Yield the models with waiting requests, ordered by the rank of their first request.

        The queues may change between two steps. A model whose first request was taken is yielded again at the rank of
        its next one, unless the iteration is already past that rank.
        """
        index = 0
        while index < len(self._heads):
            head = self._heads[index]
            yield head[1]
            index = bisect_right(self._heads, head)

    def validate(self) -> None:
        """Assert the queues' invariants. Scans everything."""
        ids = [request_id for queue in self._queues.values() for _, request_id in queue.ranks]
        assert sorted(ids) == sorted(self._entries), "a request is in two queues or none"
        assert len(ids) <= max(self.total_max, self._num_kept)
        for model, queue in self._queues.items():
            entries = [self._entries[request_id] for _, request_id in queue.ranks]
            assert entries, f"{model}'s queue is empty"
            assert {entry.facts.model for entry in entries} == {model}
            assert queue.ranks == sorted((entry.rank, entry.facts.id) for entry in entries)
            assert queue.ages == sorted(entry.age_key for entry in entries)
            assert queue.head == (queue.ranks[0][0], model)
        assert self._heads == sorted(queue.head for queue in self._queues.values() if queue.head is not None)
        deadlines = {request_id for item in self._deadlines if self._waits(item) for request_id in item[2:]}
        assert deadlines == set(self._entries), "a request has no deadline"
        assert all(self._deadlines[(index - 1) // 2] <= item for index, item in enumerate(self._deadlines[1:], 1))
        assert len(self._deadlines) <= 2 * len(self._entries) + STALE_DEADLINES_MAX

    def _check_room(self, spec: ModelSpec) -> None:
        waiting = self.waiting(spec.name)
        if waiting >= spec.queue_max:
            raise QueueFull(
                f"{spec.name}: {waiting} requests wait for it, its queue_max; try again later, or let it have more"
                " replicas"
            )
        if len(self._entries) >= self.total_max:
            raise QueueFull(
                f"router: {len(self._entries)} requests wait for all models, the most that may; try again later"
            )

    def _waits(self, item: tuple[float, int, str]) -> bool:
        """Whether this deadline belongs to a waiting request, and not to an earlier stay of it in the queue."""
        entry = self._entries.get(item[2])
        return entry is not None and entry.rank[2] == item[1]

    def _take(self, request_id: str) -> RequestFacts:
        entry = self._entries.pop(request_id)
        model = entry.facts.model
        queue = self._queues[model]
        del queue.ranks[bisect_left(queue.ranks, (entry.rank, request_id))]
        del queue.ages[bisect_left(queue.ages, entry.age_key)]
        self._place_head(model, queue)
        if not queue.ranks:
            del self._queues[model]
        if len(self._deadlines) > 2 * len(self._entries) + STALE_DEADLINES_MAX:
            self._deadlines = [item for item in self._deadlines if self._waits(item)]
            heapify(self._deadlines)
        return entry.facts

    def _place_head(self, model: str, queue: _Queue) -> None:
        """Move the model to its place in the models' order, by its first request."""
        head = (queue.ranks[0][0], model) if queue.ranks else None
        if head == queue.head:
            return
        if queue.head is not None:
            del self._heads[bisect_left(self._heads, queue.head)]
        if head is not None:
            insort(self._heads, head)
        queue.head = head


Key = tuple[bool, int, float]
"""Whether no request waits, the negated priority, and the arrival of the oldest waiting request."""

SPARE = 64
"""Stale heap entries that are tolerated beyond the number of live ones."""


class Hungry:
    """Models that lack a replica and found no place for it, in the order in which they are served.

    Higher priority first, then the longest-waiting oldest request; models without waiting requests come last.

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
