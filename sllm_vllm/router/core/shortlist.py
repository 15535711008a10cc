"""Nodes that hold a model in a tier and have room, soonest free to load first. Pure; owned by ``Cluster``."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, TypeVar

from sllm_vllm.router.core.facts import Tier

Group = TypeVar("Group", bound=Hashable)


class Ranking(Generic[Group]):
    """Each member is in one group; a group is sorted by (key, member). Empty groups are removed.

    A group is one sorted list. A change takes two bisections and shifts 8 bytes for each member behind it; with the
    thousands of members here the shift takes less time than the bisections.
    """

    def __init__(self) -> None:
        self._groups: dict[Group, list[tuple[float, str]]] = {}
        self._places: dict[str, tuple[Group, float]] = {}

    def put(self, member: str, group: Group, key: float) -> None:
        """Put a member into a group with a key, moving it from its previous place, if any."""
        if self._places.get(member) == (group, key):
            return
        self.discard(member)
        self._places[member] = (group, key)
        insort(self._groups.setdefault(group, []), (key, member))

    def discard(self, member: str) -> None:
        """Remove a member, if it is there."""
        place = self._places.pop(member, None)
        if place is None:
            return
        group, key = place
        entries = self._groups[group]
        del entries[bisect_left(entries, (key, member))]
        if not entries:
            del self._groups[group]

    def groups(self) -> Collection[Group]:
        """Return the groups that have members."""
        return self._groups.keys()

    def first(self, groups: Iterable[Group], num_max: int) -> list[str]:
        """Return up to ``num_max`` members of these groups with the smallest (key, member), in that order."""
        heads = [entry for group in groups for entry in self._groups.get(group, ())[:num_max]]
        heads.sort()
        return [member for _, member in heads[:num_max]]

    def validate(self, expected: Mapping[str, tuple[Group, float]]) -> None:
        """Assert that the ranking holds exactly the expected members."""
        assert self._places == expected, "ranked is not what it should be"
        entries = sorted((group, *entry) for group, entries in self._groups.items() for entry in entries)
        assert entries == sorted((group, key, member) for member, (group, key) in expected.items()), "lists differ"
        assert all(entries and entries == sorted(entries) for entries in self._groups.values()), "a list is unordered"


Holding = tuple[str, Tier]
"""A model in a tier."""

RUBBISH_MAX = 64
"""A heap with more entries than this plus twice its members is dropped, and rebuilt when it is needed."""


@dataclass(slots=True)
class _Heap:
    """``filed``: each node's current key. Entries with another key are stale."""

    num_slots: int
    entries: list[tuple[float, str]] = field(default_factory=list)
    filed: dict[str, float] = field(default_factory=dict)

    def file(self, node: str, key: float) -> None:
        self.filed[node] = key
        heappush(self.entries, (key, node))


class Shortlist:
    """A lazy heap for each holding that was ever searched; holdings that are never searched cost nothing.

    Heap keys are lower bounds, corrected when popped: a node whose load queue has grown keeps its old key until it
    comes to the top. A node that does not fit is parked when it comes to the top, and filed again when the cluster
    reports, by ``offer``, that it changed. So each step of a search is paid for by one change, and popular models on
    full nodes cost nothing.

    ``holders`` is only read. ``rank``: when a node's loads end. ``fits``: whether a start that needs ``num_slots`` may
    use the node.
    """

    def __init__(
        self,
        holders: Mapping[Holding, AbstractSet[str]],
        *,
        rank: Callable[[str], float],
        fits: Callable[[str, int], bool],
    ) -> None:
        self._holders = holders
        self._rank = rank
        self._fits = fits
        self._heaps: dict[Holding, _Heap] = {}
        self._parked: dict[str, set[Holding]] = {}

    def first(self, holding: Holding, num_slots: int, num_max: int) -> list[str]:
        """Return up to ``num_max`` holders that fit, ordered by (rank, id)."""
        holders = self._holders.get(holding)
        if not holders:
            return []
        heap = self._heap(holding, num_slots, holders)
        found: list[tuple[float, str]] = []
        while heap.entries and len(found) < num_max:
            key, node = heap.entries[0]
            if heap.filed.get(node) != key:
                heappop(heap.entries)
            elif (right := self._rank(node)) != key:
                heap.filed[node] = right
                heapreplace(heap.entries, (right, node))
            else:
                heappop(heap.entries)
                del heap.filed[node]
                if self._fits(node, num_slots):
                    found.append((key, node))
                else:
                    self._parked.setdefault(node, set()).add(holding)
        for key, node in found:
            heap.file(node, key)
        return [node for _, node in found]

    def fastest(self, model: str, num_slots: int, num_max: int) -> list[str]:
        """Return holders that fit, HOST before DISK.

        A quarter are on DISK, if there are that many, because those in HOST may have loads waiting.
        """
        host = self.first((model, Tier.HOST), num_slots, num_max)
        num_disk = max(num_max - len(host), num_max // 4)
        disk = self.first((model, Tier.DISK), num_slots, num_disk) if num_disk else []
        return [*host[: num_max - len(disk)], *disk]

    def add(self, holding: Holding, node: str) -> None:
        """Note that the node now holds it."""
        if (heap := self._heaps.get(holding)) is not None:
            self._file(holding, heap, node)

    def discard(self, holding: Holding, node: str) -> None:
        """Note that the node no longer holds it."""
        if (heap := self._heaps.get(holding)) is not None:
            heap.filed.pop(node, None)
            if holding not in self._holders:
                del self._heaps[holding]
        if node in self._parked:
            self._parked[node].discard(holding)

    def offer(self, node: str) -> None:
        """Note that the node changed: it is filed again wherever it was parked, as it may fit now."""
        for holding in self._parked.pop(node, ()):
            heap = self._heaps.get(holding)
            if heap is not None and node not in heap.filed:
                self._file(holding, heap, node)

    def lower(self, holding: Holding, node: str) -> None:
        """Note that the node's rank decreased. Increases need not be reported."""
        heap = self._heaps.get(holding)
        if heap is not None and node in heap.filed:
            self._file(holding, heap, node)

    def validate(self) -> None:
        """Assert that every holder is either filed with a key no higher than its rank, or parked and does not fit."""
        for holding, heap in self._heaps.items():
            for node in self._holders[holding]:
                if node in heap.filed:
                    assert (heap.filed[node], node) in heap.entries, f"{node} is not in the heap of {holding}"
                    assert heap.filed[node] <= self._rank(node), f"{node} is filed too high for {holding}"
                else:
                    assert holding in self._parked[node], f"{node} is lost for {holding}"
                    assert not self._fits(node, heap.num_slots), f"{node} is parked, but fits {holding}"
            assert heap.filed.keys() <= self._holders[holding], f"{holding} is filed for nodes that do not hold it"

    def _file(self, holding: Holding, heap: _Heap, node: str) -> None:
        if len(heap.entries) > 2 * len(heap.filed) + RUBBISH_MAX:
            del self._heaps[holding]
        else:
            heap.file(node, self._rank(node))

    def _heap(self, holding: Holding, num_slots: int, holders: AbstractSet[str]) -> _Heap:
        heap = self._heaps.get(holding)
        if heap is None or heap.num_slots != num_slots:
            heap = self._heaps[holding] = _Heap(num_slots, filed={node: self._rank(node) for node in holders})
            heap.entries = [(key, node) for node, key in heap.filed.items()]
            heapify(heap.entries)
        return heap
