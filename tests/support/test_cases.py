"""A table that is one test runs whole, and says which cases failed."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from tests.support.cases import every_case


def test_every_combination_runs_with_the_fixtures_that_are_left() -> None:
    seen = []

    @every_case("number", [1, 2])
    @every_case("word, size", [("a", 3), ("b", 4)])
    def looped(fixture: str, number: int, word: str, size: int) -> None:
        seen.append((fixture, number, word, size))

    assert list(inspect.signature(looped).parameters) == ["fixture"]
    looped(fixture="f")
    assert seen == [("f", 1, "a", 3), ("f", 1, "b", 4), ("f", 2, "a", 3), ("f", 2, "b", 4)]


def test_all_failures_are_told_with_their_cases() -> None:
    @every_case("number", [1, 2, 3])
    def looped(number: int) -> None:
        if number == 3:
            pytest.fail("no")
        assert number == 2

    with pytest.raises(AssertionError) as caught:
        looped()
    title, first, last = str(caught.value).splitlines()
    assert title == "2 of 3 cases failed"
    assert first.startswith("number=1: AssertionError: ")
    assert last == "number=3: Failed: no"


async def test_a_coroutine_is_awaited() -> None:
    @every_case("number", [1, 2])
    async def looped(number: int) -> None:
        assert number == 2

    with pytest.raises(AssertionError, match=r"1 of 2 cases failed\nnumber=1: "):
        await looped()


@every_case("name", ["first", "second"])
def test_each_case_has_a_path_of_its_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch(exist_ok=False)
    assert name
