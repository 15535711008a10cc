"""Ids in sorted groups, with which the cluster finds the best few without scanning all. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

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
