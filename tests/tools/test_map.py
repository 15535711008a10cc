"""Pages that tell where something is in the code: every file, class and function that they name exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAP_LINES_MAX = 200
_PLACE = re.compile(r"`([\w/]+\.py)(?::([\w.]+))?`")
_MEMBER = re.compile(r"`([A-Z]\w*[a-z]\w*)\.(\w+)`")
_FOLDER = re.compile(r"`([\w/]+/)`")
_HOMES = (ROOT / "sllm_vllm", ROOT)


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Module-level names of a file, and ``Class.member`` for each member of its classes."""
    found = set[str]()
    for node in ast.parse(path.read_text()).body:
        names = named_by(node)
        found |= names
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member}" for inner in node.body for member in named_by(inner)}
    return frozenset(found)


def named_by(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def file_of(name: str) -> Path | None:
    return next((home / name for home in _HOMES if (home / name).is_file()), None)


def missing(text: str) -> list[str]:
    """What a page names that is not there."""
    found = [name for name in _FOLDER.findall(text) if not any((home / name).is_dir() for home in _HOMES)]
    for name, place in _PLACE.findall(text):
        path = file_of(name)
        if path is None or (place and place not in names_in(path)):
            found.append(f"{name}:{place}")
    everything = frozenset[str]().union(*(names_in(path) for path in (ROOT / "sllm_vllm").rglob("*.py")))
    return found + [f"{one}.{member}" for one, member in _MEMBER.findall(text) if f"{one}.{member}" not in everything]


@pytest.mark.parametrize("page", ["docs/ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_place_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(_PLACE.findall(text)) > 10
    assert missing(text) == []


def test_a_place_that_is_not_there_is_found() -> None:
    text = (
        "`router/no_such.py`, `router/gate.py:NoSuch`, `Gate.no_such`, `node/nowhere/`, `router/gate.py:Gate.acquire`"
    )
    assert missing(text) == ["node/nowhere/", "router/no_such.py:", "router/gate.py:NoSuch", "Gate.no_such"]


@pytest.mark.parametrize("package", ["loader", "store", "node", "router", "engine"])
def test_every_file_in_the_table_of_a_design_page_exists(package: str) -> None:
    folder = ROOT / "sllm_vllm" / package
    cells = re.findall(r"^\| (`.+?`) \|", (folder / "DESIGN.md").read_text(), re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`([\w./]+(?:\.py|/))`", cell)]
    assert len(named) > 5
    assert [name for name in named if not (folder / name).exists()] == []


def test_the_map_is_one_page() -> None:
    assert len((ROOT / "docs/ARCHITECTURE.md").read_text().splitlines()) <= MAP_LINES_MAX
