"""The node's accelerators as numbered slots: which are free, and who owns the others. Pure.

Owned by one ``AgentCore``. It does not know what a slot is (a GPU, or a share of processors and memory); the agent
does.
"""

from __future__ import annotations


class AcceleratorSlots:
    """Each slot is free or has exactly one owner, which takes all of its slots at once and releases all at once."""

    def __init__(self, num_slots: int) -> None:
        assert num_slots >= 0, f"{num_slots} slots"
        self.num_slots = num_slots
        self._owners: dict[int, str] = {}

    @property
    def num_free(self) -> int:
        """How many slots are free."""
        return self.num_slots - len(self._owners)

    def take(self, owner: str, num_slots: int) -> tuple[int, ...]:
        """Give the lowest free slots to an owner that has none; asserts that enough are free."""
        assert not self.held_by(owner), f"{owner} owns slots {self.held_by(owner)} already"
        assert 1 <= num_slots <= self.num_free, f"{owner} wants {num_slots} slots, {self.num_free} are free"
        free = [slot for slot in range(self.num_slots) if slot not in self._owners]
        taken = tuple(free[:num_slots])
        self._owners.update(dict.fromkeys(taken, owner))
        return taken

    def release(self, owner: str) -> tuple[int, ...]:
        """Release all of an owner's slots and return them; does nothing if it has none."""
        held = self.held_by(owner)
        for slot in held:
            del self._owners[slot]
        return held

    def owner_of(self, slot: int) -> str | None:
        """The slot's owner; None if it is free."""
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        return self._owners.get(slot)

    def held_by(self, owner: str) -> tuple[int, ...]:
        """An owner's slots, ascending."""
        return tuple(sorted(slot for slot, name in self._owners.items() if name == owner))

    def owners(self) -> dict[str, tuple[int, ...]]:
        """Every owner and its slots."""
        return {owner: self.held_by(owner) for owner in sorted(set(self._owners.values()))}
