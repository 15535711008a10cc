"""Chunks that come in any order become the file that was sent, or nothing."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint, verify_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.errors import CheckpointCorrupt, CheckpointInvalid, DiskFull, WriteError, WriterBusy
from sllm_vllm.store.staged_file import StagedCheckpoint, StagedPartition
from tests.checkpoint import conftest
from tests.support.checkpoints import CHUNK_NBYTES, blob, files_but_locks, make_checkpoint, make_key

mount = conftest.mount

NAME = "from-elsewhere"
TENSORS = (blob("large", 6 * CHUNK_NBYTES), blob("odd", 1000, dtype="float32", item_nbytes=4), blob("tail", 77))
FOLDER = f".staging/.received/{NAME}"


@pytest.fixture
def original(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path / "elsewhere", key=make_key(2), tensors=TENSORS)


@pytest.fixture
def repository(tmp_path: Path) -> CheckpointRepository:
    return CheckpointRepository(tmp_path / "store")


def raw_of(checkpoint: Checkpoint) -> bytes:
    return (checkpoint.path / MANIFEST_NAME).read_bytes()


def stage(repository: CheckpointRepository, original: Checkpoint) -> StagedCheckpoint:
    return StagedCheckpoint(repository, NAME, raw_of(original))


def chunk_of(original: Checkpoint, index: int, rank: int = 0) -> memoryview:
    """Its bytes, page-aligned."""
    partition = original.partition(rank)
    offset, nbytes = partition.chunk_range(index)
    buffer = memoryview(mmap.mmap(-1, CHUNK_NBYTES))
    buffer[:nbytes] = partition.path.read_bytes()[offset : offset + nbytes]
    return buffer[:nbytes]


def write_chunk(partition: StagedPartition, original: Checkpoint, index: int) -> None:
    partition.write(range(index, index + 1), chunk_of(original, index, partition.partition.record.rank))


def write_all(staged: StagedCheckpoint, original: Checkpoint, rank: int) -> None:
    with staged.partition(rank) as partition:
        for index in partition.missing:
            write_chunk(partition, original, index)
        partition.finish()


def assert_published(repository: CheckpointRepository, original: Checkpoint) -> None:
    found = open_checkpoint(repository.root / NAME)
    assert verify_checkpoint(found) == original.manifest.nbytes
    for name in (MANIFEST_NAME, *(record.path for record in original.manifest.partitions)):
        assert (found.path / name).read_bytes() == (original.path / name).read_bytes()
    assert {name.partition("/")[0] for name in files_but_locks(repository.root)} == {NAME}


def test_chunks_in_any_order_become_the_same_files(repository: CheckpointRepository, original: Checkpoint) -> None:
    with stage(repository, original) as staged:
        for rank in range(2):
            with staged.partition(rank) as partition:
                order = partition.missing
                random.Random(rank).shuffle(order)
                for index in order:
                    write_chunk(partition, original, index)
                partition.finish()
        assert not (repository.root / NAME).exists()
        assert staged.publish() == repository.root / NAME
    assert_published(repository, original)


def test_spans_from_several_threads(repository: CheckpointRepository, original: Checkpoint) -> None:
    with stage(repository, original) as staged:
        with staged.partition(0) as partition:
            threads = [
                threading.Thread(target=write_chunk, args=(partition, original, index)) for index in partition.missing
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert partition.missing == []
            partition.finish()
        write_all(staged, original, 1)
        staged.publish()
    assert_published(repository, original)


def test_aligned_chunks_go_past_the_page_cache(
    repository: CheckpointRepository, original: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct: list[bool] = []
    pwrite = os.pwrite

    def watched(fd: int, data: memoryview, offset: int) -> int:
        direct.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        return pwrite(fd, data, offset)

    with stage(repository, original) as staged, staged.partition(0) as partition:
        if partition._direct_fd is None:
            pytest.skip("this file system has no O_DIRECT")
        monkeypatch.setattr(os, "pwrite", watched)
        write_chunk(partition, original, 0)
        assert direct == [True]
        partition.write(range(1), memoryview(b"x" + bytes(chunk_of(original, 0)))[1:])
        assert direct == [True, False], "memory that is not aligned goes through it"


def test_device_that_refuses_direct_writes_is_written_through_the_cache(
    repository: CheckpointRepository, original: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def refusing(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return pwrite(fd, data[:1000], offset)  # and it writes less than it is given

    monkeypatch.setattr(os, "pwrite", refusing)
    with stage(repository, original) as staged:
        write_all(staged, original, 0)
        write_all(staged, original, 1)
        staged.publish()
    assert_published(repository, original)


def test_what_a_killed_process_left_is_kept_if_it_is_sound(
    repository: CheckpointRepository, original: Checkpoint
) -> None:
    with stage(repository, original) as staged:
        write_all(staged, original, 1)
        with staged.partition(0) as partition:
            num_chunks = len(partition.missing)
            for index in (0, 2, 3):
                write_chunk(partition, original, index)
    torn = repository.root / FOLDER / (original.manifest.partitions[0].path + ".partial")
    with torn.open("r+b") as file:
        file.seek(original.partition(0).chunk_range(2)[0])
        file.write(b"torn")
    with stage(repository, original) as staged:
        with staged.partition(0) as partition:
            assert partition.missing == [index for index in range(num_chunks) if index not in {0, 3}]
        with staged.partition(1) as partition:
            assert partition.is_complete
            assert partition.missing == []
        write_all(staged, original, 0)
        write_all(staged, original, 1)
        staged.publish()
    assert_published(repository, original)


def test_what_is_left_of_another_checkpoint_goes(
    repository: CheckpointRepository, original: Checkpoint, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", key=make_key(1), tensors=TENSORS)
    with stage(repository, other) as staged:
        write_all(staged, other, 0)
    with stage(repository, original) as staged, staged.partition(0) as partition:
        assert not partition.is_complete
        assert len(partition.missing) == len(partition.partition.record.chunks)


def test_one_receiver_at_a_time(repository: CheckpointRepository, original: Checkpoint) -> None:
    with stage(repository, original), pytest.raises(WriterBusy):
        stage(repository, original)
    stage(repository, original).close()


def test_one_that_was_published_meanwhile_stays(repository: CheckpointRepository, original: Checkpoint) -> None:
    with stage(repository, original) as staged:
        write_all(staged, original, 0)
        write_all(staged, original, 1)
        (repository.root / NAME).mkdir()
        (repository.root / NAME / MANIFEST_NAME).write_bytes(b"first")
        staged.publish()
    assert (repository.root / NAME / MANIFEST_NAME).read_bytes() == b"first"
    assert files_but_locks(repository.root) == {f"{NAME}/{MANIFEST_NAME}"}


def test_partition_is_not_finished_without_all_its_chunks(
    repository: CheckpointRepository, original: Checkpoint
) -> None:
    with stage(repository, original) as staged, staged.partition(0) as partition:
        write_chunk(partition, original, 0)
        with pytest.raises(ValueError, match="chunks are missing"):
            partition.finish()


def test_wrong_header_is_refused(repository: CheckpointRepository, original: Checkpoint) -> None:
    with stage(repository, original) as staged, staged.partition(0) as partition:
        for index in partition.missing:
            write_chunk(partition, original, index)
        header = original.partition(0).path.read_bytes()[: partition.partition.record.header_nbytes]
        with pytest.raises(CheckpointCorrupt, match="header differs"):
            partition.finish(header.replace(b"U8", b"I8"))
        partition.finish(header)
        assert partition.path.read_bytes() == original.partition(0).path.read_bytes()


def test_manifest_that_breaks_the_format_is_refused(repository: CheckpointRepository) -> None:
    with pytest.raises(CheckpointInvalid):
        StagedCheckpoint(repository, NAME, b"{}")
    assert not repository.root.exists()


def test_disk_that_is_too_small_says_so_before_anything_comes(original: Checkpoint, mount: conftest.Mount) -> None:
    mounted = mount(options="size=64k")
    with pytest.raises(DiskFull):
        stage(CheckpointRepository(mounted.path), original)
    assert files_but_locks(mounted.path) == set()


def test_disk_that_fills_up_is_left_without_the_partition(
    repository: CheckpointRepository, original: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    with stage(repository, original) as staged, staged.partition(0) as partition:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFull):
            write_chunk(partition, original, 0)
        assert files_but_locks(repository.root) == {f"{FOLDER}/{MANIFEST_NAME}"}


def test_quota_of_a_file_is_a_write_error(
    repository: CheckpointRepository, original: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "posix_fallocate", refused)
    with stage(repository, original) as staged, pytest.raises(WriteError, match="File too large"):
        staged.partition(0)


def test_file_system_that_can_not_claim_space_is_used_all_the_same(
    repository: CheckpointRepository, original: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    with stage(repository, original) as staged:
        write_all(staged, original, 0)
        write_all(staged, original, 1)
        staged.publish()
    assert_published(repository, original)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before
