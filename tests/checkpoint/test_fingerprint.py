"""The fingerprint of source weights, and the marks of partitions that were verified."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.fingerprint import fingerprint_directory, has_weight_files, read_digests, scan_source
from sllm_vllm.checkpoint.repository import VerifiedMarks
from sllm_vllm.errors import ConfigError
from tests.checkpoint.conftest import Mount
from tests.support.checkpoints import as_nobody

CONTENT = bytes(range(256)) * 8192  # 2 MiB: the samples do not touch all of it
BLOB = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
    repository = tmp_path / "models--org--name"
    blobs, path = repository / "blobs", repository / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    path.mkdir(parents=True)
    (blobs / BLOB).write_bytes(CONTENT)
    (path / "model.safetensors").symlink_to(f"../../blobs/{BLOB}")
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


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


CHANGES: dict[str, Callable[[Path], object]] = {
    "size": lambda path: os.truncate(path / "model-1.safetensors", len(CONTENT) - 1),
    "head": lambda path: rewrite(path / "model-1.safetensors", 100),
    "middle": lambda path: rewrite(path / "model-2.safetensors", len(CONTENT) // 2),
    "end": lambda path: rewrite(path / "model-2.safetensors", len(CONTENT) - 2),
    "anywhere": lambda path: rewrite(path / "model-2.safetensors", 123_456),
    "name": lambda path: (path / "model-1.safetensors").rename(path / "model-0.safetensors"),
    "removed": lambda path: (path / "model-1.safetensors").unlink(),
    "added": lambda path: (path / "model-3.safetensors").write_bytes(b""),
    "other kind": lambda path: (path / "model-3.gguf").write_bytes(b""),
    "index": lambda path: (path / "model.safetensors.index.json").write_text("{ }"),
    "a module's weights": lambda path: write(path / "2_Dense" / "model.safetensors", b"x"),
    "which modules there are": lambda path: write(path / "modules.json", b"[]"),
    "code": lambda path: write(path / "modeling_x.py", b""),
    "quantisation": lambda path: write(path / "hf_quant_config.json", b"{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_have_another_fingerprint(model: Path, change: str) -> None:
    before = fingerprint_directory(model)
    CHANGES[change](model)
    assert fingerprint_directory(model) != before


def test_times_and_places_do_not_count(model: Path, tmp_path: Path) -> None:
    before = fingerprint_directory(model)
    set_time(model / "model-1.safetensors")
    shutil.copytree(model, tmp_path / "elsewhere", copy_function=shutil.copy)
    assert fingerprint_directory(model) == fingerprint_directory(tmp_path / "elsewhere") == before


def test_other_files_do_not_count(model: Path) -> None:
    before = fingerprint_directory(model)
    (model / "config.json").write_text('{"changed": 1}')
    (model / "README.md").write_text("new")
    (model / "tokenization_x.py").write_text("")
    (model / "folder.bin").mkdir()
    write(model / ".cache" / "model.safetensors", b"")
    assert fingerprint_directory(model) == before


def test_link_that_leads_back_up_is_followed_once(model: Path) -> None:
    before = fingerprint_directory(model)
    (model / "again").symlink_to(".")
    assert fingerprint_directory(model) == before


def test_file_of_a_cached_snapshot_is_known_by_its_name(snapshot: Path) -> None:
    (file,) = scan_source(snapshot)
    assert file.blob == f"sha256:{BLOB}"
    assert read_digests([file]) == [file.blob]


def test_small_file_of_a_cached_snapshot_is_named_as_git_does(snapshot: Path) -> None:
    name = hashlib.sha1(b"blob 2\0{}", usedforsecurity=False).hexdigest()
    write(snapshot / "../../blobs" / name, b"{}")
    (snapshot / "model.safetensors.index.json").symlink_to(f"../../blobs/{name}")
    file = scan_source(snapshot)[1]
    assert file.blob == f"git-sha1:{name}"
    assert read_digests([file]) == [file.blob]


def other_commit(snapshot: Path) -> Path:
    return snapshot.rename(snapshot.with_name("0" * 40))


def other_parent(snapshot: Path) -> Path:
    (snapshot.parents[1] / "other").mkdir()
    return snapshot.rename(snapshot.parents[1] / "other" / COMMIT)


def plain_file(snapshot: Path) -> Path:
    file = snapshot / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    return snapshot


def link_to(snapshot: Path, target: Path) -> Path:
    write(target, CONTENT)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(target)
    return snapshot


NO_HUB_CACHE: dict[str, Callable[[Path], Path]] = {
    "all zeros for a commit": other_commit,
    "not below snapshots": other_parent,
    "no link": plain_file,
    "blobs of another folder": lambda path: link_to(path, path.parents[2] / "blobs" / BLOB),
    "a name that is no hash": lambda path: link_to(path, path.parents[1] / "blobs" / "abcd"),
    "all zeros for a hash": lambda path: link_to(path, path.parents[1] / "blobs" / ("0" * 64)),
    "capitals": lambda path: link_to(path, path.parents[1] / "blobs" / BLOB.upper()),
}


@pytest.mark.parametrize("case", NO_HUB_CACHE)
def test_only_a_hub_cache_names_files_by_their_content(snapshot: Path, case: str) -> None:
    directory = NO_HUB_CACHE[case](snapshot)
    (file,) = scan_source(directory)
    assert file.blob is None
    before = fingerprint_directory(directory)
    rewrite(file.path.resolve(), 1_000_001)
    assert fingerprint_directory(directory) != before


def test_pipe_of_a_weights_name_does_not_hang(model: Path) -> None:
    before = fingerprint_directory(model)
    os.mkfifo(model / "pipe.safetensors")
    assert fingerprint_directory(model) == before


def test_link_to_a_blob_that_is_gone_is_refused(snapshot: Path) -> None:
    (snapshot / "../../blobs" / BLOB).unlink()
    with pytest.raises(ConfigError, match="no weight files"):
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
