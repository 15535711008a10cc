"""Writing a partition: what lies in the file, and what is left when the device refuses."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.checkpoint.checksum import checksum
from sllm_vllm.checkpoint.core.layout import TensorSpec
from sllm_vllm.checkpoint.core.manifest import partition_path
from sllm_vllm.checkpoint.reader import verify_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.checkpoint.writer import WrittenPartition, write_errors, write_file_durably, write_partition
from sllm_vllm.errors import DiskFull, NotConvertible, WriteError
from tests.checkpoint.conftest import Mount, Mounted
from tests.support.cases import every_case
from tests.support.checkpoints import (
    CHUNK_NBYTES,
    TENSORS,
    Blob,
    as_nobody,
    assert_says_where_and_mend,
    blob,
    files_below,
    files_but_locks,
    files_of,
    make_checkpoint,
    make_key,
    write_rank,
)

MIB = 1 << 20
PARTITION = partition_path(0)


@dataclass(frozen=True, slots=True)
class Watched:
    """A tensor that calls a function before each of its pieces. Implements `TensorData`."""

    inner: Blob
    before_piece: Callable[[], object]

    @property
    def spec(self) -> TensorSpec:
        return self.inner.spec

    def pieces(self, nbytes_max: int) -> Iterator[memoryview]:
        for piece in self.inner.pieces(nbytes_max):
            self.before_piece()
            yield piece


def write(directory: Path, tensors: Sequence[Any] = TENSORS, **options: Any) -> WrittenPartition:
    return write_partition(directory, 0, tensors, **({"chunk_nbytes": CHUNK_NBYTES} | options))


def write_synced(directory: Path, tensors: Sequence[Any] = TENSORS) -> WrittenPartition:
    written = write(directory, tensors)
    written.sync()
    return written


def fill_up(directory: Path) -> Path:
    """Take all the space that is left on a file system."""
    hog = directory / "hog"
    with hog.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert os.statvfs(directory).f_bavail == 0
    return hog


def failing(number: int) -> Callable[..., Any]:
    def step(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return step


def test_data_is_that_of_the_records(tmp_path: Path) -> None:
    written = write_synced(tmp_path)
    raw = (tmp_path / PARTITION).read_bytes()
    data = raw[written.partition.header_nbytes :]
    by_name = {tensor.spec.name: tensor.data for tensor in TENSORS}
    assert {record.name: data[record.offset : record.end] for record in written.partition.tensors} == by_name
    assert len(raw) == written.partition.nbytes
    assert written.partition.header_nbytes % 4096 == 0


def test_large_tensors_keep_their_order_and_the_tail_is_last(tmp_path: Path) -> None:
    names = [record.name for record in write(tmp_path).partition.tensors]
    assert names == ["embed", "exact", "small", "scale", "bias", "nothing"]


@every_case("nbytes", [0, 1, CHUNK_NBYTES - 1, CHUNK_NBYTES, CHUNK_NBYTES + 1, 3 * CHUNK_NBYTES, 50_001])
@every_case("lead", [0, 256])
def test_every_chunk_has_the_checksum_of_its_bytes(tmp_path: Path, nbytes: int, lead: int) -> None:
    partition = write_synced(tmp_path, [blob("lead", lead), blob("t", nbytes)]).partition
    raw = (tmp_path / PARTITION).read_bytes()
    data = raw[partition.header_nbytes :]
    assert partition.header_checksum == checksum(raw[: partition.header_nbytes])
    assert partition.chunks == [checksum(data[i : i + CHUNK_NBYTES]) for i in range(0, len(data), CHUNK_NBYTES)]


def test_partition_without_tensors_has_a_header_alone(tmp_path: Path) -> None:
    partition = write_synced(tmp_path, []).partition
    assert (partition.nbytes, partition.tensors, partition.chunks) == (4096, [], [])


def test_partition_has_its_name_only_after_sync(tmp_path: Path) -> None:
    written = write(tmp_path)
    assert files_below(tmp_path) == {f"{PARTITION}.partial"}
    written.sync()
    assert files_below(tmp_path) == {PARTITION}


def test_progress_adds_up_to_the_data(tmp_path: Path) -> None:
    steps: list[int] = []
    partition = write(tmp_path, on_progress=steps.append).partition
    assert sum(steps) == partition.data_nbytes
    assert max(steps) <= CHUNK_NBYTES


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    short = write_synced(tmp_path / "short").partition
    monkeypatch.undo()
    assert short == write_synced(tmp_path / "whole").partition
    assert (tmp_path / "short" / PARTITION).read_bytes() == (tmp_path / "whole" / PARTITION).read_bytes()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o644)])
def test_files_are_as_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        checkpoint = make_checkpoint(tmp_path)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in checkpoint.path.rglob("*") if path.is_file()}
    folders = {path.stat().st_mode & 0o777 for path in (checkpoint.path, checkpoint.path / "partitions")}
    assert modes == {mode}
    assert folders == {0o777 & ~umask}


UNTELLABLE: dict[str, tuple[list[Blob], str]] = {
    "name twice": ([blob("a", 5), blob("a", 7)], "tensor 'a' is there twice"),
    "name and alias": ([blob("a", 5), blob("b", 7, aliases=("a",))], "tensor 'a' is there twice"),
    "name of safetensors' own": ([blob("__metadata__", 5)], "keeps for itself"),
    "name too long": ([blob("x" * 5000, 5)], "at most 4096 characters"),
    "alias no Unicode": ([blob("a", 5, aliases=("\udcff",))], "valid string"),
}


@every_case("kind", UNTELLABLE)
def test_tensors_that_no_manifest_may_hold_are_refused_unwritten(tmp_path: Path, kind: str) -> None:
    tensors, told = UNTELLABLE[kind]
    with pytest.raises(NotConvertible, match=told) as refused:
        write(tmp_path, tensors)
    assert_says_where_and_mend(refused.value, PARTITION)
    assert files_below(tmp_path) == set()


def test_header_that_safetensors_would_refuse_is_refused_unwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sllm_vllm.checkpoint.writer.build_header", lambda records: bytes(100_003_840))
    with pytest.raises(NotConvertible, match="header_nbytes"):
        write(tmp_path, [])
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("change", [-1, 1])
def test_tensor_that_gives_other_bytes_than_it_says_is_a_mistake(tmp_path: Path, change: int) -> None:
    wrong = replace(blob("a", 100), data=bytes(100 + change))
    with pytest.raises(ValueError, match=f"a: gave {100 + change} bytes of 100"):
        write(tmp_path, [wrong])
    assert files_below(tmp_path) == set()


def test_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [Watched(TENSORS[0], interrupt)])
    assert files_below(tmp_path) == set()


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "partitions").mkdir()
    (tmp_path / f"{PARTITION}.partial").write_bytes(b"x" * 999_999)
    assert write_synced(tmp_path).partition.nbytes == (tmp_path / PARTITION).stat().st_size


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: os.symlink("/dev/full", path)], ids=["FIFO", "link"])
def test_temporary_name_that_is_no_file_is_replaced(tmp_path: Path, plant: Callable[[str], None]) -> None:
    (tmp_path / "partitions").mkdir()
    plant(f"{tmp_path / PARTITION}.partial")
    plant(str(tmp_path / "record.partial"))
    write_synced(tmp_path)
    write_file_durably(tmp_path / "record", b"new")
    assert (tmp_path / "record").read_bytes() == b"new"
    assert not (tmp_path / PARTITION).is_symlink()


def test_small_file_is_replaced_whole(tmp_path: Path) -> None:
    for content in (b"first, and longer", b"second"):
        write_file_durably(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert files_below(tmp_path) == {"file"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_missing_space_or_quota_is_a_full_disk(tmp_path: Path, number: int) -> None:
    with pytest.raises(DiskFull, match="free some") as refused, write_errors(tmp_path):
        failing(number)()
    assert_says_where_and_mend(refused.value, str(tmp_path))


@pytest.mark.parametrize("step", ["fsync", "rename"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_device_that_refuses_to_sync_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    written = write(tmp_path)
    monkeypatch.setattr(os, step, failing(number))
    with pytest.raises(DiskFull if number == errno.ENOSPC else WriteError):
        written.sync()
    with pytest.raises(WriteError):
        write_file_durably(tmp_path / "record", b"new")
    assert files_below(tmp_path) == set()


@pytest.fixture
def small(mount: Mount) -> Mounted:
    """A file system of 1 MiB that holds an earlier checkpoint."""
    mounted = mount("tmpfs", "size=1m")
    make_checkpoint(mounted.path, key=make_key(fingerprint="earlier"))
    return mounted


def assert_earlier_checkpoint_is_intact(root: Path) -> None:
    earlier = make_key(fingerprint="earlier")
    verify_checkpoint(CheckpointRepository(root).find(earlier))
    assert files_but_locks(root) - {"hog"} == files_of(earlier)


def test_partition_that_can_not_fit_is_refused_unwritten(small: Mounted) -> None:
    started: list[int] = []
    with pytest.raises(DiskFull, match="no space is left") as refused:
        write_rank(small.path, make_key(), tensors=[Watched(blob("large", MIB), lambda: started.append(1))])
    assert started == []
    assert_says_where_and_mend(refused.value, PARTITION)
    assert_earlier_checkpoint_is_intact(small.path)


def test_space_that_vanishes_while_writing_leaves_nothing(small: Mounted) -> None:
    tensor = Watched(blob("large", MIB // 2), lambda: fill_up(small.path))
    with pytest.raises(DiskFull, match="no space is left"):
        write_rank(small.path, make_key(), tensors=[tensor])
    assert_earlier_checkpoint_is_intact(small.path)


def test_space_that_vanishes_before_the_record_leaves_nothing(small: Mounted) -> None:
    staging = CheckpointRepository(small.path).stage(make_key(), CHUNK_NBYTES)
    with staging.writer(0):
        written = write(staging.path)
        fill_up(small.path)
        with pytest.raises(DiskFull):
            staging.commit(written)
    assert_earlier_checkpoint_is_intact(small.path)


def test_space_that_vanishes_before_publishing_loses_no_work(small: Mounted) -> None:
    staging = CheckpointRepository(small.path).stage(make_key(), CHUNK_NBYTES)
    write_rank(small.path, make_key(), publishes=False)
    before = files_but_locks(small.path)
    hog = fill_up(small.path)
    with pytest.raises(DiskFull):
        staging.publish()
    assert files_but_locks(small.path) - {"hog"} == before
    hog.unlink()
    assert staging.publish()


def test_space_of_what_a_killed_writer_left_counts_as_free(small: Mounted) -> None:
    key = make_key()
    partial = CheckpointRepository(small.path).stage(key, CHUNK_NBYTES).path / f"{PARTITION}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(MIB * 6 // 10))
    assert write_rank(small.path, key, tensors=[blob("large", MIB * 6 // 10)])


def test_space_of_a_partition_for_other_chunks_counts_as_free(small: Mounted) -> None:
    large = [blob("large", MIB * 6 // 10)]
    write_rank(small.path, make_key(), tensors=large, publishes=False)
    assert write_rank(small.path, make_key(), tensors=large, chunk_nbytes=4096)


def test_read_only_store_is_named(small: Mounted) -> None:
    small.make_read_only()
    repository, earlier = CheckpointRepository(small.path), make_key(fingerprint="earlier").name
    for step in (
        lambda: write_rank(small.path, make_key()),
        lambda: write(small.path / "deep"),
        lambda: repository.remove(earlier),
        lambda: repository.set_aside(earlier),
    ):
        with pytest.raises(WriteError, match="Read-only file system") as refused:
            step()
        assert_says_where_and_mend(refused.value, str(small.path))
    assert_earlier_checkpoint_is_intact(small.path)


def test_store_of_another_user_is_named(open_dir: Path) -> None:
    make_checkpoint(open_dir)
    with as_nobody(), pytest.raises(WriteError, match="Permission denied"):
        write_rank(open_dir, make_key(fingerprint="other"))
    with as_nobody(), pytest.raises(WriteError, match="Permission denied"):
        CheckpointRepository(open_dir).remove(make_key().name)
    assert files_but_locks(open_dir) == files_of(make_key())
