"""Directories of engines: private, short, gone with the engine or cleared by the next agent."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sllm_vllm.node.sockets import Scratch


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scratch:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Scratch(tmp_path / "node")


def test_each_is_private_and_its_own_and_goes_with_what_is_in_it(scratch: Scratch, tmp_path: Path) -> None:
    first, second = scratch.make(), scratch.make()
    assert first != second
    for path in (first, second, first.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    (first / "socket").touch()
    scratch.remove(first)
    assert not first.exists()
    assert second.exists()
    scratch.remove(second)
    assert list(tmp_path.iterdir()) == []


def test_paths_leave_room_for_a_sockets_name() -> None:
    assert len(str(Scratch(Path("/a/very/long/" + "path/" * 50)).make())) < 107 - 37


def test_the_next_agent_clears_what_was_left(scratch: Scratch, tmp_path: Path) -> None:
    (scratch.make() / "file").touch()
    Scratch(tmp_path / "node").clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_a_root_that_others_could_use_is_neither_used_nor_cleared(scratch: Scratch, tmp_path: Path, kind: str) -> None:
    root = scratch.make().parent
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    os.rename(root, tmp_path / "old")
    if kind == "link":
        root.symlink_to(elsewhere)
    elif kind == "file":
        root.touch()
    else:
        root.mkdir()
        root.chmod(0o777)
    scratch.clear()
    assert (elsewhere / "kept").exists()
    assert root.exists()
    made = scratch.make()
    assert made.parent == tmp_path
    scratch.remove(made)
