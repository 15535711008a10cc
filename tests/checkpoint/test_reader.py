"""Opening and verifying: what is wrong with a checkpoint is found, named, and never read into memory."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, PARTITION_DIR
from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint, verify_checkpoint
from sllm_vllm.config import MANIFEST_NBYTES_MAX
from sllm_vllm.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointInvalid,
    CheckpointMissing,
    CheckpointUnreadable,
)
from tests.support.checkpoints import (
    CHUNK_NBYTES,
    as_nobody,
    assert_says_where_and_mend,
    blob,
    make_checkpoint,
    make_key,
    manifest_value,
    with_manifest,
)

MANIFEST, PARTITION = MANIFEST_NAME, f"{PARTITION_DIR}/rank-00000.safetensors"
Change = Callable[[Path], object]


def open_and_verify(path: Path) -> int:
    return verify_checkpoint(open_checkpoint(path))


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def replace_by_link(path: Path) -> None:
    """The same content, behind a symbolic link."""
    moved = path.with_name(f"{path.name}.moved")
    path.rename(moved)
    path.symlink_to(moved)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as unix, contextlib.chdir(path.parent):
        unix.bind(path.name)  # a whole path may be longer than a socket's can be


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


def resize(change: int) -> Change:
    return lambda path: os.truncate(path, path.stat().st_size + change)


def test_whole_checkpoint_is_verified(checkpoint: Checkpoint) -> None:
    steps: list[int] = []
    assert verify_checkpoint(checkpoint, steps.append) == checkpoint.manifest.nbytes == sum(steps)


def test_every_partition_is_verified(tmp_path: Path) -> None:
    several = make_checkpoint(tmp_path, key=make_key(2))
    flip_bit(several.partition(1).path, several.partition(1).record.nbytes - 1)
    with pytest.raises(CheckpointCorrupt, match="rank-00001"):
        verify_checkpoint(several)


def test_partition_without_tensors_is_verified(tmp_path: Path) -> None:
    empty = make_checkpoint(tmp_path, tensors=[])
    assert verify_checkpoint(empty) == 4096


REGIONS = {
    "first chunk": (0, 0, ("embed",)),
    "middle": (2 * CHUNK_NBYTES + 17, 2, ("embed",)),
    "start of a chunk": (3 * CHUNK_NBYTES, 3, ("exact",)),
    "end of a chunk": (4 * CHUNK_NBYTES - 1, 3, ("exact",)),
    "tail": (4 * CHUNK_NBYTES + 512 + 3, 4, ("small", "scale", "bias")),
    "last byte": (4 * CHUNK_NBYTES + 512 + 12 + 9, 4, ("small", "scale", "bias")),
}


@pytest.mark.parametrize("region", REGIONS)
def test_flipped_bit_is_found_and_named(checkpoint: Checkpoint, region: str) -> None:
    offset, chunk, tensors = REGIONS[region]
    flip_bit(checkpoint.path / PARTITION, checkpoint.partition(0).record.header_nbytes + offset)
    with pytest.raises(CheckpointCorrupt, match=f"chunk {chunk} differs") as found:
        verify_checkpoint(checkpoint)
    assert found.value.tensors == tensors
    assert all(repr(name) in str(found.value) for name in tensors)
    assert_says_where_and_mend(found.value, PARTITION)


@pytest.mark.parametrize("offset", [0, 7, 8, 100, 4095])
def test_flipped_bit_in_the_header_is_found(checkpoint: Checkpoint, offset: int) -> None:
    flip_bit(checkpoint.path / PARTITION, offset)
    with pytest.raises(CheckpointCorrupt, match="its header differs from its checksum") as found:
        verify_checkpoint(checkpoint)
    assert_says_where_and_mend(found.value, PARTITION)


def test_corrupt_chunk_of_many_tensors_names_some_on_one_line(tmp_path: Path) -> None:
    many = make_checkpoint(tmp_path, tensors=[blob(f"layer\n\x1b[2J{number}" + "x" * 300, 5) for number in range(9)])
    flip_bit(many.path / PARTITION, many.partition(0).record.header_nbytes)
    with pytest.raises(CheckpointCorrupt, match="and 5 more") as found:
        verify_checkpoint(many)
    assert len(found.value.tensors) == 9
    assert len(str(found.value)) < 1500
    assert_says_where_and_mend(found.value, PARTITION)


DAMAGES: dict[str, tuple[str, Change, type[CheckpointError], str]] = {
    "no directory": ("", shutil.rmtree, CheckpointMissing, "there is no such file"),
    "no manifest": (MANIFEST, Path.unlink, CheckpointMissing, "there is no such file"),
    "manifest empty": (MANIFEST, lambda path: os.truncate(path, 0), CheckpointInvalid, "not valid JSON"),
    "manifest half written": (MANIFEST, lambda path: os.truncate(path, 300), CheckpointInvalid, "not valid JSON"),
    "manifest a link": (MANIFEST, replace_by_link, CheckpointInvalid, "symbolic link"),
    "manifest a FIFO": (MANIFEST, replace_by_fifo, CheckpointInvalid, "not a regular file"),
    "manifest a socket": (MANIFEST, replace_by_socket, CheckpointUnreadable, "can't be opened"),
    "manifest a directory": (MANIFEST, replace_by_directory, CheckpointInvalid, "not a regular file"),
    "no partitions": (PARTITION_DIR, shutil.rmtree, CheckpointMissing, "there is no such file"),
    "partitions a link": (PARTITION_DIR, replace_by_link, CheckpointInvalid, "symbolic link or not a directory"),
    "partitions a file": (PARTITION_DIR, replace_by_file, CheckpointInvalid, "symbolic link or not a directory"),
    "no partition": (PARTITION, Path.unlink, CheckpointMissing, "there is no such file"),
    "partition a link": (PARTITION, replace_by_link, CheckpointInvalid, "symbolic link"),
    "partition a FIFO": (PARTITION, replace_by_fifo, CheckpointInvalid, "not a regular file"),
    "partition a directory": (PARTITION, replace_by_directory, CheckpointInvalid, "not a regular file"),
    "partition empty": (PARTITION, lambda path: os.truncate(path, 0), CheckpointCorrupt, "it has 0 bytes"),
    "partition one byte short": (PARTITION, resize(-1), CheckpointCorrupt, "the manifest says"),
    "partition one byte long": (PARTITION, resize(1), CheckpointCorrupt, "the manifest says"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused(checkpoint: Checkpoint, damage: str) -> None:
    place, change, kind, told = DAMAGES[damage]
    change(checkpoint.path / place)
    with pytest.raises(kind, match=told) as refused:
        open_and_verify(checkpoint.path)
    assert type(refused.value) is kind
    assert_says_where_and_mend(refused.value, str(checkpoint.path / place))


def test_file_in_place_of_the_directory_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointMissing, match="it is not a directory"):
        open_checkpoint(tmp_path / "file")


def test_link_to_a_checkpoint_is_followed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint.path)
    assert open_and_verify(tmp_path / "link") == checkpoint.manifest.nbytes


def test_huge_manifest_is_refused_without_reading_it(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(checkpoint.path / MANIFEST, 1 << 30)
    monkeypatch.setattr("sllm_vllm.checkpoint.reader.parse_manifest", pytest.fail)
    with pytest.raises(CheckpointInvalid, match="too large for a manifest") as refused:
        open_checkpoint(checkpoint.path)
    assert str(MANIFEST_NBYTES_MAX) in str(refused.value)


@pytest.mark.parametrize("place", ["", MANIFEST, PARTITION_DIR, PARTITION])
def test_what_permissions_forbid_is_unreadable(open_dir: Path, place: str) -> None:
    checkpoint = make_checkpoint(open_dir)
    os.chmod(checkpoint.path / place, 0)
    with as_nobody(), pytest.raises(CheckpointUnreadable, match="Permission denied") as refused:
        open_and_verify(checkpoint.path)
    assert_says_where_and_mend(refused.value, str(checkpoint.path / place))


def test_checkpoint_of_another_user_is_read(open_dir: Path) -> None:
    checkpoint = make_checkpoint(open_dir)
    with as_nobody():
        assert open_and_verify(checkpoint.path) == checkpoint.manifest.nbytes


def failing_read(*_: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("num_good", [0, 1], ids=["header", "chunk"])
def test_device_that_fails_makes_it_unreadable(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, num_good: int
) -> None:
    results = [os.preadv] * num_good
    monkeypatch.setattr(os, "preadv", lambda *args: (results.pop() if results else failing_read)(*args))
    with pytest.raises(CheckpointUnreadable, match="Input/output error") as refused:
        verify_checkpoint(checkpoint)
    assert_says_where_and_mend(refused.value, PARTITION)


def test_header_that_disagrees_with_the_manifest_is_refused(checkpoint: Checkpoint) -> None:
    """Its checksum is right, so it was written like that."""
    value = manifest_value(checkpoint)
    value["partitions"][0]["tensors"][0]["name"] = "renamed"
    with pytest.raises(CheckpointInvalid, match="tensor 'renamed' is not as the manifest says"):
        verify_checkpoint(with_manifest(checkpoint, value))


def test_open_leaks_no_descriptor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for place, change, _, _ in DAMAGES.values():
        copy = tmp_path / "copy"
        shutil.copytree(checkpoint.path, copy)
        change(copy / place)
        with pytest.raises(CheckpointError):
            open_and_verify(copy)
        shutil.rmtree(copy, ignore_errors=True)
    open_and_verify(checkpoint.path)
    assert os.listdir("/proc/self/fd") == before


def test_rank_partition_knows_its_chunks(checkpoint: Checkpoint) -> None:
    partition = checkpoint.partition(0)
    header, data = partition.record.header_nbytes, partition.record.data_nbytes
    ranges = [partition.chunk_range(index) for index in range(len(partition.record.chunks))]
    assert ranges[0] == (header, CHUNK_NBYTES)
    assert ranges[-1] == (header + 4 * CHUNK_NBYTES, data - 4 * CHUNK_NBYTES)
    assert sum(nbytes for _, nbytes in ranges) == data


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CheckpointCorrupt("/a/b", "it is torn", "convert it again")))
    assert type(error) is CheckpointCorrupt
    assert str(error) == "/a/b: it is torn; convert it again"
