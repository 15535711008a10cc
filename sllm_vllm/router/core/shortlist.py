"""Nodes that hold a model in a tier, those that fit and are free to load first. Pure; owned by ``Cluster``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from sllm_vllm.router.core.facts import Tier

Holding = tuple[str, Tier]
"""A model in a tier."""

RUBBISH_MAX = 64
"""A heap of more entries than this and twice its members is forgotten, and built anew when it is asked for."""


@dataclass(slots=True)
class _Heap:
    """``filed``: under which key a node is in it. An entry with another key is rubbish."""

    num_slots: int
    entries: list[tuple[float, str]] = field(default_factory=list)
    filed: dict[str, float] = field(default_factory=dict)

    def file(self, node: str, key: float) -> None:
        self.filed[node] = key
        heappush(self.entries, (key, node))


class Shortlist:
    """A lazy heap for each holding that was ever asked for; what nobody asks for costs nothing.

    Keys are filed lower than they are or right: a node whose load queue has grown is put right when it comes to the
    top. A node that does not fit is parked when it comes to the top, and filed again once its owner says, by ``offer``,
    that it changed. So each step of a search is paid for by one change; popular models on full nodes cost nothing.

    ``holders`` is read, never changed. ``rank``: when a node's loads end. ``fits``: whether it may be found by one who
    needs so many slots.
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
        """The holders that fit, in the order of (rank, id)."""
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
        """Holders that fit, in HOST first; a quarter on DISK if there are, for loads may wait before those in HOST."""
        host = self.first((model, Tier.HOST), num_slots, num_max)
        num_disk = max(num_max - len(host), num_max // 4)
        disk = self.first((model, Tier.DISK), num_slots, num_disk) if num_disk else []
        return [*host[: num_max - len(disk)], *disk]

    def add(self, holding: Holding, node: str) -> None:
        """The node holds it now."""
        if (heap := self._heaps.get(holding)) is not None:
            self._file(holding, heap, node)

    def discard(self, holding: Holding, node: str) -> None:
        """The node does not hold it any more."""
        if (heap := self._heaps.get(holding)) is not None:
            heap.filed.pop(node, None)
            if holding not in self._holders:
                del self._heaps[holding]
        if node in self._parked:
            self._parked[node].discard(holding)

    def offer(self, node: str) -> None:
        """It changed, and may fit now where it did not."""
        for holding in self._parked.pop(node, ()):
            heap = self._heaps.get(holding)
            if heap is not None and node not in heap.filed:
                self._file(holding, heap, node)

    def lower(self, holding: Holding, node: str) -> None:
        """Its rank is less than it was. (That it grew need not be said.)"""
        heap = self._heaps.get(holding)
        if heap is not None and node in heap.filed:
            self._file(holding, heap, node)

    def validate(self) -> None:
        """Assert that every holder is filed, no higher than it ranks, or parked where it does not fit."""
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
