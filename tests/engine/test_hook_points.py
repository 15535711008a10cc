"""Hooks: each module of vLLM is hooked when it is imported, or its problem is noted."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sllm_vllm.engine.hook_points import HookMissing, HookPoints, require, require_type
from tests.support.cases import every_case

NAME = "sllm_hooked_sample"


@pytest.fixture(autouse=True)
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / f"{NAME}.py").write_text("class Thing:\n    def act(self, one, two=0): return one + two\nvalue = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    sys.modules.pop(NAME, None)


def doubled(module: ModuleType) -> None:
    thing = require_type(module, "Thing")
    stock = require(thing, "act", "one", "two")
    thing.act = lambda self, one, two=0: (stock(self, one, two), "hooked")  # type: ignore[attr-defined]


def test_a_module_is_hooked_when_it_is_imported_and_not_before() -> None:
    points = HookPoints()
    points.register({NAME: doubled})
    assert NAME not in sys.modules
    assert importlib.import_module(NAME).Thing().act(1, 2) == (3, "hooked")
    assert (points.installed, points.problems) == ([NAME], [])


def test_a_module_that_is_there_already_is_hooked_at_once() -> None:
    module = importlib.import_module(NAME)
    HookPoints().register({NAME: doubled})
    assert module.Thing().act(1) == (1, "hooked")


def test_a_plugin_that_is_loaded_twice_hooks_once() -> None:
    for _ in range(2):
        HookPoints().register({NAME: doubled})
    assert importlib.import_module(NAME).Thing().act(1) == (1, "hooked")


def test_what_is_missing_is_a_problem_and_changes_nothing() -> None:
    def install(module: ModuleType) -> None:
        require(require_type(module, "Thing"), "act", "one", "three")

    points = HookPoints()
    points.register({NAME: install})
    assert importlib.import_module(NAME).Thing().act(1, 2) == 3
    assert points.problems == [f"{NAME}: act does not take three"]
    assert points.installed == []


@every_case("name, told", [("other", "there is no other"), ("value", "there is no value")])
def test_a_function_that_is_none_is_named(name: str, told: str) -> None:
    with pytest.raises(HookMissing, match=told):
        require(importlib.import_module(NAME), name)


def test_a_class_that_is_none_is_named() -> None:
    with pytest.raises(HookMissing, match="there is no class value"):
        require_type(importlib.import_module(NAME), "value")
