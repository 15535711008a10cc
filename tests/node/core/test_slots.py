"""Accelerator slots: the lowest free ones first, one owner each, all back at once."""

from __future__ import annotations

import pytest

from sllm_vllm.node.core.slots import AcceleratorSlots
from tests.support.cases import every_case


def test_the_lowest_free_slots_are_taken() -> None:
    slots = AcceleratorSlots(4)
    assert slots.take("a", 1) == (0,)
    assert slots.take("b", 2) == (1, 2)
    slots.release("a")
    assert slots.take("c", 2) == (0, 3)
    assert slots.num_free == 0


def test_who_owns_what_is_known() -> None:
    slots = AcceleratorSlots(3)
    slots.take("a", 2)
    assert slots.held_by("a") == (0, 1)
    assert [slots.owner_of(slot) for slot in range(3)] == ["a", "a", None]
    assert slots.owners() == {"a": (0, 1)}


def test_all_slots_come_back_at_once() -> None:
    slots = AcceleratorSlots(3)
    slots.take("a", 2)
    assert slots.release("a") == (0, 1)
    assert slots.release("a") == ()
    assert (slots.num_free, slots.owners()) == (3, {})


def test_an_owner_does_not_take_twice() -> None:
    slots = AcceleratorSlots(3)
    slots.take("a", 1)
    with pytest.raises(AssertionError, match=r"a owns slots \(0,\) already"):
        slots.take("a", 1)


@every_case("num_slots", [0, 3])
def test_no_more_than_is_free_is_taken_and_no_less_than_one(num_slots: int) -> None:
    slots = AcceleratorSlots(3)
    slots.take("a", 1)
    with pytest.raises(AssertionError, match=f"b wants {num_slots} slots, 2 are free"):
        slots.take("b", num_slots)


def test_a_slot_that_is_not_there_is_a_programmers_error() -> None:
    with pytest.raises(AssertionError, match="slot 3 of 3"):
        AcceleratorSlots(3).owner_of(3)
