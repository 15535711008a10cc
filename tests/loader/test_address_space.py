"""Addresses: what is mapped where, that writes stay private, and that everything goes with the last look at it."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from sllm_vllm.loader.address_space import HUGE_PAGE_NBYTES, AddressSpace
from tests.support.cases import every_case

PAGE = mmap.PAGESIZE


@pytest.fixture
def file() -> Iterator[int]:
    """Four pages of ones, twos, threes and fours, open for reading alone."""
    writable = os.memfd_create("pages")
    os.write(writable, b"".join(bytes([value]) * PAGE for value in (1, 2, 3, 4)))
    readable = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
    os.close(writable)
    yield readable
    os.close(readable)


def permissions_at(address: int) -> str | None:
    """Of the mapping at an address; None if there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions = line.split()[:2]
        first, last = (int(text, 16) for text in addresses.split("-"))
        if first <= address < last:
            return permissions
    return None


@every_case("nbytes", [1, PAGE, HUGE_PAGE_NBYTES, 3 * HUGE_PAGE_NBYTES + PAGE])
def test_memory_is_aligned_zero_and_writable(nbytes: int) -> None:
    space = AddressSpace(nbytes)
    assert space.address % HUGE_PAGE_NBYTES == 0
    array = space.array(0, nbytes)
    assert not array.any()
    array[:] = 7
    assert (space.array(0, nbytes) == 7).all()


def test_pages_of_a_file_lie_where_they_were_put(file: int) -> None:
    space = AddressSpace(4 * PAGE)
    space.map_file(0, PAGE, fd=file, file_offset=2 * PAGE)
    space.map_file(2 * PAGE, 2 * PAGE, fd=file, file_offset=0)
    assert space.array(0, 4 * PAGE)[::PAGE].tolist() == [3, 0, 1, 2]


def test_a_write_stays_in_this_mapping(file: int) -> None:
    space = AddressSpace(PAGE)
    space.map_file(0, PAGE, fd=file, file_offset=0)
    space.array(0, PAGE)[:] = 9
    assert os.pread(file, PAGE, 0) == b"\1" * PAGE


def test_a_shared_mapping_is_read_only(file: int) -> None:
    space = AddressSpace(4 * PAGE)
    space.map_file(0, 4 * PAGE, fd=file, file_offset=0, shared=True)
    assert permissions_at(space.address) == "r--s"


def test_a_part_can_be_taken_away_and_given_back(file: int) -> None:
    space = AddressSpace(3 * PAGE)
    space.map_file(0, 3 * PAGE, fd=file, file_offset=0)
    space.put_nothing(PAGE, PAGE)
    assert permissions_at(space.address + PAGE) == "---p"
    space.put_memory(PAGE, PAGE)
    assert space.array(0, 3 * PAGE)[::PAGE].tolist() == [1, 0, 3]


def test_populating_needs_no_memory_there(file: int) -> None:
    space = AddressSpace(2 * PAGE)
    space.map_file(0, PAGE, fd=file, file_offset=0)
    space.put_nothing(PAGE, PAGE)
    space.populate(0, PAGE)
    space.populate(PAGE, PAGE)
    assert space.array(0, PAGE)[0] == 1


def test_what_is_discarded_is_empty() -> None:
    space = AddressSpace(2 * PAGE)
    space.array(0, 2 * PAGE)[:] = 5
    space.discard(0, PAGE)
    assert space.array(0, 2 * PAGE)[::PAGE].tolist() == [0, 5]


def test_a_bad_file_is_refused_and_the_part_is_as_it_was() -> None:
    space = AddressSpace(PAGE)
    space.array(0, PAGE)[:] = 5
    with pytest.raises(OSError, match="Bad file descriptor"):
        space.map_file(0, PAGE, fd=-1, file_offset=0)
    assert space.array(0, PAGE)[0] == 5


def test_an_array_keeps_the_addresses_and_the_last_one_gives_them_back() -> None:
    space = AddressSpace(PAGE)
    address = space.address
    array = space.array(0, 8)
    view = numpy.frombuffer(array.data, dtype=numpy.uint8)[4:]
    del space, array
    gc.collect()
    assert permissions_at(address) == "rw-p"
    view[:] = 1
    del view
    gc.collect()
    assert permissions_at(address) is None


def test_many_spaces_leave_no_mapping_behind() -> None:
    num_before = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(500):
        AddressSpace(3 * PAGE).array(0, PAGE)[:] = 1
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= num_before + 5
