"""Paths of engines' sockets: short enough, in a folder that is private, gone with the engine or cleared by the next."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sllm_vllm.daemon.unix_listener import socket_of_url, url_of_socket
from sllm_vllm.node.sockets import PATH_NBYTES_MAX, EngineSockets
from tests.support.cases import every_case


@pytest.fixture
def node_dir() -> Iterator[Path]:
    """Of an agent, with a short path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory) / "node"


def listen(path: Path) -> None:
    """Leave a socket there, as a killed engine does."""
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(path))
        engine.listen()


def test_a_socket_is_in_the_agents_folder_and_no_other_user_gets_there(node_dir: Path) -> None:
    node_dir.mkdir(mode=0o755)
    sockets = EngineSockets(node_dir)
    first, second = sockets.reserve(), sockets.reserve()
    assert first.path != second.path
    assert first.path.parent == second.path.parent == node_dir / "sockets"
    assert stat.S_IMODE(first.path.parent.stat().st_mode) == 0o700
    assert (first.port, socket_of_url(first.url)) == (None, str(first.path))
    assert first.place((0,), "secret").options == ("--uds", str(first.path))


def test_an_engines_socket_goes_with_it_and_no_other(node_dir: Path) -> None:
    node_dir.mkdir()
    sockets = EngineSockets(node_dir)
    first, second = sockets.reserve(), sockets.reserve()
    for reservation in (first, second):
        listen(reservation.path)
    first.close()
    assert not first.path.exists()
    listen(first.path)  # another one's by now: it is not removed again
    first.close()
    assert first.path.exists()
    assert second.path.exists()


def test_the_next_agent_clears_what_was_left(node_dir: Path) -> None:
    node_dir.mkdir()
    listen(EngineSockets(node_dir).reserve().path)
    (node_dir / "kept").touch()
    EngineSockets(node_dir).clear()
    assert list(node_dir.iterdir()) == [node_dir / "kept"]


@pytest.mark.parametrize("spare", [-1, 0, 1, 100])
def test_a_path_that_is_too_long_is_elsewhere_and_as_private(
    node_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """``spare``: bytes by which the path in the agent's folder is longer than an address holds."""
    monkeypatch.setattr("tempfile.tempdir", str(node_dir.parent))
    missing = PATH_NBYTES_MAX + spare - len(str(node_dir / "x" / "sockets" / "12345678")) + 1
    long = node_dir / ("ü" * (missing // 2) + "x" * (missing % 2))
    long.mkdir(parents=True)
    path = EngineSockets(long).reserve().path
    assert (path.parent == long / "sockets") == (spare <= 0)
    assert len(os.fsencode(path)) <= PATH_NBYTES_MAX
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    listen(path)
    EngineSockets(long).clear()
    assert not path.parent.exists()


def test_a_long_temporary_directory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("t" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    sockets = EngineSockets(long)
    listen(sockets.reserve().path)
    sockets.clear()


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_a_folder_that_others_could_use_is_neither_used_nor_cleared(
    node_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(node_dir.parent))
    elsewhere, folder = node_dir / "elsewhere", node_dir / "sockets"
    elsewhere.mkdir(parents=True, mode=0o700)
    listen(elsewhere / "kept")
    if kind == "link":
        folder.symlink_to(elsewhere)
    elif kind == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)
        listen(folder / "kept")
    sockets = EngineSockets(node_dir)
    sockets.clear()
    assert (elsewhere / "kept").exists()
    assert (folder / "kept").exists() == (kind != "file")
    path = sockets.reserve().path
    assert path.parent.parent == node_dir.parent
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sockets.reserve().path.parent == path.parent
    sockets.clear()
    assert not path.parent.exists()


@every_case("path", ["/a/b", "/with space/100%/ü#?", "/\udcff"])
def test_a_url_holds_any_path(path: str) -> None:
    url = url_of_socket(Path(path))
    assert url.isascii()
    assert socket_of_url(url) == path
    assert socket_of_url("http://127.0.0.1:1") is None
