"""The fingerprint of source weights, and the marks of partitions that were verified."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.fingerprint import fingerprint_directory, has_weight_files
from sllm_vllm.checkpoint.repository import VerifiedMarks
from sllm_vllm.errors import ConfigError
from tests.checkpoint.builders import as_nobody
from tests.checkpoint.conftest import Mount

CONTENT = bytes(range(256)) * 8192  # 2 MiB: the samples do not touch all of it


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model-1.safetensors").write_bytes(CONTENT)
    (path / "model-2.safetensors").write_bytes(CONTENT)
    (path / "model.safetensors.index.json").write_text("{}")
    return path


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """As Hugging Face's cache has it: names that link to blobs, which are named by their content's hash."""
    blobs, path = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    path.mkdir(parents=True)
    (blobs / "abcd").write_bytes(CONTENT)
    (path / "model.safetensors").symlink_to("../../blobs/abcd")
    return path


def rewrite(path: Path, offset: int) -> None:
    """Change a byte and put the times back."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5\x5a")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def set_time(path: Path) -> None:
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def test_copy_that_keeps_times_has_the_same_fingerprint(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copy2)
    assert fingerprint_directory(tmp_path / "copy") == fingerprint_directory(str(model))


CHANGES: dict[str, Callable[[Path], object]] = {
    "size": lambda path: os.truncate(path / "model-1.safetensors", len(CONTENT) - 1),
    "head": lambda path: rewrite(path / "model-1.safetensors", 100),
    "middle": lambda path: rewrite(path / "model-2.safetensors", len(CONTENT) // 2),
    "end": lambda path: rewrite(path / "model-2.safetensors", len(CONTENT) - 2),
    "time": lambda path: set_time(path / "model-1.safetensors"),
    "name": lambda path: (path / "model-1.safetensors").rename(path / "model-0.safetensors"),
    "removed": lambda path: (path / "model-1.safetensors").unlink(),
    "added": lambda path: (path / "model-3.safetensors").write_bytes(b""),
    "other kind": lambda path: (path / "model-3.gguf").write_bytes(b""),
    "index": lambda path: (path / "model.safetensors.index.json").write_text("{ }"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_have_another_fingerprint(model: Path, change: str) -> None:
    before = fingerprint_directory(model)
    CHANGES[change](model)
    assert fingerprint_directory(model) != before


def test_other_files_do_not_count(model: Path) -> None:
    before = fingerprint_directory(model)
    (model / "config.json").write_text('{"changed": 1}')
    (model / "README.md").write_text("new")
    (model / "folder.bin").mkdir()
    assert fingerprint_directory(model) == before


def test_cached_snapshot_is_known_by_its_blobs_wherever_it_lies(snapshot: Path, tmp_path: Path) -> None:
    before = fingerprint_directory(snapshot)
    moved = tmp_path / "moved"
    shutil.copytree(snapshot.parents[1], moved, symlinks=True, copy_function=shutil.copy)
    assert fingerprint_directory(moved / "snapshots" / "1234") == before


def test_cached_snapshot_with_another_blob_has_another_fingerprint(snapshot: Path) -> None:
    before = fingerprint_directory(snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "../../blobs/ef01").write_bytes(CONTENT)
    (snapshot / "model.safetensors").symlink_to("../../blobs/ef01")
    assert fingerprint_directory(snapshot) != before


def test_link_elsewhere_is_known_by_what_it_links_to(snapshot: Path) -> None:
    target = snapshot.parents[1] / "plain.safetensors"
    target.write_bytes(CONTENT)
    (snapshot / "more.safetensors").symlink_to(target)
    before = fingerprint_directory(snapshot)
    set_time(target)
    assert fingerprint_directory(snapshot) != before


def test_pipe_of_a_weights_name_does_not_hang(model: Path) -> None:
    before = fingerprint_directory(model)
    os.mkfifo(model / "pipe.safetensors")
    assert fingerprint_directory(model) == before


def test_link_to_a_blob_that_is_gone_is_refused(snapshot: Path) -> None:
    (snapshot / "../../blobs/abcd").unlink()
    with pytest.raises(ConfigError, match="No such file"):
        fingerprint_directory(snapshot)


def test_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gone: its weights can't be read"):
        fingerprint_directory(tmp_path / "gone")


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="there are no weight files"):
        fingerprint_directory(tmp_path)


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_weights_that_can_not_be_read_are_refused(open_dir: Path, name: str) -> None:
    model = open_dir / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(CONTENT)
    os.chmod(model / name, 0)
    with as_nobody(), pytest.raises(ConfigError, match="Permission denied") as refused:
        fingerprint_directory(model)
    assert "\n" not in str(refused.value)


def test_weight_files_are_told_by_their_names(model: Path, tmp_path: Path) -> None:
    assert has_weight_files(model)
    assert not has_weight_files(tmp_path)
    assert not has_weight_files(tmp_path / "gone")


@pytest.fixture
def marked(tmp_path: Path) -> tuple[VerifiedMarks, Path]:
    marks, file = VerifiedMarks(tmp_path / "store"), tmp_path / "partition"
    file.write_bytes(CONTENT)
    assert not marks.is_marked(file)
    assert marks.mark(file, file.stat())
    return marks, file


def test_mark_is_remembered_by_others(marked: tuple[VerifiedMarks, Path], tmp_path: Path) -> None:
    marks, file = marked
    assert marks.is_marked(file)
    assert VerifiedMarks(tmp_path / "store").is_marked(file)
    assert len(list((tmp_path / "store" / ".verified").iterdir())) == 1


def replaced(file: Path) -> None:
    copy = file.with_name("copy")
    shutil.copy2(file, copy)
    copy.rename(file)


VOIDING: dict[str, Callable[[Path], object]] = {
    "a byte, its size and time kept": lambda file: rewrite(file, 7),
    "its time": set_time,
    "its size": lambda file: os.truncate(file, 5),
    "replaced by a copy": replaced,
    "removed": Path.unlink,
}


@pytest.mark.parametrize("change", VOIDING)
def test_mark_is_void_after_a_change(marked: tuple[VerifiedMarks, Path], change: str) -> None:
    marks, file = marked
    VOIDING[change](file)
    assert not marks.is_marked(file)


def test_file_that_was_replaced_while_it_was_read_is_not_marked(tmp_path: Path) -> None:
    marks, file = VerifiedMarks(tmp_path / "store"), tmp_path / "partition"
    file.write_bytes(b"read")
    status = file.stat()
    file.with_name("new").write_bytes(b"else")
    file.with_name("new").rename(file)
    assert marks.mark(file, status)
    assert not marks.is_marked(file)


def test_mark_is_of_one_file_alone(marked: tuple[VerifiedMarks, Path]) -> None:
    marks, file = marked
    os.link(file, file.with_name("other"))
    assert not marks.is_marked(file.with_name("other"))


def test_file_can_be_marked_again_after_a_change(marked: tuple[VerifiedMarks, Path]) -> None:
    marks, file = marked
    set_time(file)
    assert marks.mark(file, file.stat())
    assert marks.is_marked(file)


def test_broken_mark_is_void(marked: tuple[VerifiedMarks, Path], tmp_path: Path) -> None:
    marks, file = marked
    for mark in (tmp_path / "store" / ".verified").iterdir():
        mark.write_bytes(b"\xff\xfe")
    assert not marks.is_marked(file)


def test_read_only_store_takes_no_mark(mount: Mount, tmp_path: Path) -> None:
    mounted = mount()
    mounted.make_read_only()
    (tmp_path / "partition").write_bytes(b"")
    assert not VerifiedMarks(mounted.path).mark(tmp_path / "partition", tmp_path.stat())
