"""Writers that are killed at every step, writers that meet, and what a power cut may not tear."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.checkpoint.reader import verify_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.errors import CheckpointMissing
from tests.checkpoint.writers import Job, Writers
from tests.support.checkpoints import (
    CHUNK_NBYTES,
    files_but_locks,
    files_of,
    make_checkpoint,
    make_key,
    write_rank,
)

ROUNDS = 8


def num_steps(writers: Writers, job: Job) -> int:
    """How many steps a job takes when nothing kills it."""
    (told,) = writers.run(job)
    return int(told.removeprefix("steps "))


def reader_finds_all_or_nothing(root: Path, num_partitions: int = 1) -> bool:
    """Whether there is a checkpoint; if so, it must be a whole one."""
    key = make_key(num_partitions)
    try:
        found = CheckpointRepository(root).find(key)
    except CheckpointMissing:
        return False
    assert verify_checkpoint(found) == found.manifest.nbytes
    assert files_of(key) <= files_but_locks(root)
    return True


def next_writer_completes(root: Path, num_partitions: int = 1) -> None:
    """Write what is missing, as the next start would do; only the checkpoint may be there then."""
    key = make_key(num_partitions)
    for rank in range(num_partitions):
        published = write_rank(root, key, rank)
    assert published
    assert reader_finds_all_or_nothing(root, num_partitions)
    assert files_but_locks(root) == files_of(key)


@pytest.mark.parametrize("tears", [False, True], ids=["killed before a step", "killed within a write"])
def test_killed_writer_leaves_all_or_nothing(writers: Writers, memory_dir: Path, tears: bool) -> None:
    steps = num_steps(writers, Job(str(memory_dir / "count"), action="count"))
    assert steps > 15
    found = []
    for step in range(steps):
        root = memory_dir / str(step)
        assert writers.run(Job(str(root), dies_at=step, tears=tears)) == ["killed"]
        found.append(reader_finds_all_or_nothing(root))
        next_writer_completes(root)
    assert found == sorted(found), "once published, it stays so"
    assert True in found
    assert False in found


def test_killed_writer_of_the_last_rank_leaves_all_or_nothing(writers: Writers, memory_dir: Path) -> None:
    first = memory_dir / "first"
    write_rank(first, make_key(2), 0)
    shutil.copytree(first, memory_dir / "count")
    steps = num_steps(writers, Job(str(memory_dir / "count"), 1, 2, action="count"))
    for step in range(steps):
        root = memory_dir / str(step)
        shutil.copytree(first, root)
        assert writers.run(Job(str(root), 1, 2, dies_at=step)) == ["killed"]
        reader_finds_all_or_nothing(root, 2)
        next_writer_completes(root, 2)


def test_killed_after_set_aside_leaves_all_or_nothing(writers: Writers, memory_dir: Path) -> None:
    """A bad checkpoint is set aside, its replacement is killed anywhere, and the next writer replaces it."""
    bad = memory_dir / "bad"
    make_checkpoint(bad)
    rejected = CheckpointRepository(bad).set_aside(make_key().name).relative_to(bad)
    shutil.copytree(bad, memory_dir / "count")
    for step in range(num_steps(writers, Job(str(memory_dir / "count"), action="count"))):
        root = memory_dir / str(step)
        shutil.copytree(bad, root)
        assert writers.run(Job(str(root), dies_at=step)) == ["killed"]
        reader_finds_all_or_nothing(root)
        assert write_rank(root, make_key())
        assert files_but_locks(root) == files_of(make_key()) | {f".rejected/{name}" for name in files_of(make_key())}
        assert (root / rejected).is_dir()


@pytest.mark.parametrize("action", ["set_aside", "remove"])
def test_killed_removal_leaves_all_or_nothing(writers: Writers, memory_dir: Path, action: str) -> None:
    source = memory_dir / "source"
    make_checkpoint(source)
    step, outcome = 0, "killed"
    while outcome == "killed":
        root = memory_dir / str(step)
        shutil.copytree(source, root)
        (outcome,) = writers.run(Job(str(root), dies_at=step, action=action))
        was_there = reader_finds_all_or_nothing(root)
        assert write_rank(root, make_key()), "a writer makes it anew where it is gone"
        assert reader_finds_all_or_nothing(root)
        step += 1
    assert not was_there
    assert step > 4


def test_next_removal_takes_what_a_killed_one_left(writers: Writers, memory_dir: Path) -> None:
    make_checkpoint(memory_dir)
    step = 0
    while not any(memory_dir.glob(".trash/*/*/*")):  # until one dies between moving and deleting
        make_checkpoint(memory_dir)
        assert writers.run(Job(str(memory_dir), dies_at=step, action="remove")) == ["killed"]
        step += 1
    make_checkpoint(memory_dir)
    CheckpointRepository(memory_dir).remove(make_key().name)
    assert files_but_locks(memory_dir) == set()


def test_two_writers_of_one_rank_make_one_good_checkpoint(writers: Writers, memory_dir: Path) -> None:
    for number in range(ROUNDS):
        root = memory_dir / str(number)
        outcomes = writers.run(Job(str(root)), Job(str(root)))
        assert "published" in outcomes
        assert all(outcome == "published" or outcome.startswith("WriterBusy: ") for outcome in outcomes)
        assert reader_finds_all_or_nothing(root)
        assert files_but_locks(root) == files_of(make_key())


def test_two_ranks_at_once_are_published_by_the_last(writers: Writers, memory_dir: Path) -> None:
    for number in range(ROUNDS):
        root = memory_dir / str(number)
        outcomes = writers.run(Job(str(root), 0, 2), Job(str(root), 1, 2))
        assert "published" in outcomes
        assert set(outcomes) <= {"published", "recorded"}
        assert reader_finds_all_or_nothing(root, 2)
        assert files_but_locks(root) == files_of(make_key(2))


def test_publishers_that_meet_all_find_it_published(writers: Writers, memory_dir: Path) -> None:
    for number in range(ROUNDS):
        root = memory_dir / str(number)
        for rank in range(2):
            write_rank(root, make_key(2), rank, publishes=False)
        outcomes = writers.run(*(Job(str(root), rank, 2) for rank in (0, 1, 0, 1)))
        assert all(outcome == "published" or outcome.startswith("WriterBusy: ") for outcome in outcomes)
        assert "published" in outcomes
        assert files_but_locks(root) == files_of(make_key(2))


def test_removals_that_meet_do_no_harm(writers: Writers, memory_dir: Path) -> None:
    for _ in range(ROUNDS):
        make_checkpoint(memory_dir)
        outcomes = writers.run(*(Job(str(memory_dir), action="set_aside") for _ in range(3)))
        assert outcomes == [str(memory_dir / ".rejected" / make_key().name)] * 3
        assert files_but_locks(memory_dir) == {f".rejected/{name}" for name in files_of(make_key())}


def test_writer_that_dies_frees_the_lock(writers: Writers, memory_dir: Path) -> None:
    assert writers.run(Job(str(memory_dir), action="die_with_lock")) == ["killed"]
    next_writer_completes(memory_dir)


class UnsyncedFiles:
    """Follows which files and directories hold what a power cut could take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_rename: Callable[[str, set[str]], None]) -> None:
        self.paths: set[str] = set()
        self._on_rename = on_rename
        for name in ("open", "pwrite", "fsync", "rename", "mkdir", "unlink"):
            monkeypatch.setattr(os, name, getattr(self, name)(getattr(os, name)))

    def open(self, step: Callable[..., int]) -> Callable[..., int]:
        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            fd = step(path, flags, *args, **kwargs)
            if flags & os.O_CREAT:
                self.paths |= {self._of(fd), os.path.dirname(self._of(fd))}
            return fd

        return opened

    def pwrite(self, step: Callable[..., int]) -> Callable[..., int]:
        def written(fd: int, *args: Any) -> int:
            self.paths.add(self._of(fd))
            return step(fd, *args)

        return written

    def fsync(self, step: Callable[[int], None]) -> Callable[[int], None]:
        def synced(fd: int) -> None:
            step(fd)
            self.paths.discard(self._of(fd))

        return synced

    def rename(self, step: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any) -> None:
            self._on_rename(str(source), set(self.paths))
            step(source, target)
            moved = {path for path in self.paths if path == str(source) or path.startswith(f"{source}/")}
            self.paths |= {os.path.dirname(source), os.path.dirname(target)}
            self.paths = self.paths - moved | {str(target) + path.removeprefix(str(source)) for path in moved}

        return renamed

    def mkdir(self, step: Callable[..., None]) -> Callable[..., None]:
        return self._entry(step)

    def unlink(self, step: Callable[..., None]) -> Callable[..., None]:
        return self._entry(step)

    def _entry(self, step: Callable[..., None]) -> Callable[..., None]:
        def changed(path: Any, *args: Any, **kwargs: Any) -> None:
            step(path, *args, **kwargs)
            self.paths.add(os.path.dirname(path))

        return changed

    @staticmethod
    def _of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")


def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = make_key()
    torn: list[str] = []

    def check(source: str, unsynced: set[str]) -> None:
        torn.extend(path for path in unsynced if path == source or path.startswith(source + "/"))

    unsynced = UnsyncedFiles(monkeypatch, check)
    assert write_rank(tmp_path, key)
    monkeypatch.undo()
    assert torn == []
    assert str(tmp_path) not in unsynced.paths, "the name of the checkpoint is durable when publish returns"
    assert not any(path.startswith(str(tmp_path / key.name)) for path in unsynced.paths)


def test_partition_is_durable_before_its_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = CheckpointRepository(tmp_path).stage(make_key(2), CHUNK_NBYTES)
    seen: list[set[str]] = []

    def check(source: str, unsynced: set[str]) -> None:
        if source.endswith(".json.partial"):
            seen.append({path for path in unsynced if path.startswith(str(staging.path / "partitions"))})

    UnsyncedFiles(monkeypatch, check)
    write_rank(tmp_path, make_key(2), 0)
    assert seen == [set()]


def test_record_is_durable_when_the_writer_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = CheckpointRepository(tmp_path).stage(make_key(2), CHUNK_NBYTES)
    unsynced = UnsyncedFiles(monkeypatch, lambda source, paths: None)
    write_rank(tmp_path, make_key(2), 0)
    assert [path for path in unsynced.paths if path.startswith(str(staging.path))] == []
