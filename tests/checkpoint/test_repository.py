"""Keys and their names, staging and resuming, publishing, listing, setting aside and removing."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, partition_path
from sllm_vllm.checkpoint.reader import Checkpoint, verify_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository, Staging
from sllm_vllm.errors import (
    CheckpointInvalid,
    CheckpointMissing,
    CheckpointUnreadable,
    NotConvertible,
    WriteError,
    WriterBusy,
)
from tests.support.cases import every_case
from tests.support.checkpoints import (
    CHUNK_NBYTES,
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

NAME = make_key().name


def needs_rank(root: Path, rank: int, *, num_partitions: int = 2, chunk_nbytes: int = CHUNK_NBYTES) -> bool:
    with CheckpointRepository(root).stage(make_key(num_partitions), chunk_nbytes).writer(rank) as needed:
        return needed


@every_case(
    "model, slug",
    [
        ("org/tiny", "org--tiny"),
        ("/models/deep/er/tiny/", "er--tiny"),
        ("tiny", "tiny"),
        ("a b\n\x1b[2Jc/../é", "model"),
        ("a b\n\x1b[2Jc/é.x", "a-b-2Jc---.x"),
        ("..", "model"),
        ("/", "model"),
        ("", "model"),
        ("-rf", "rf"),
        ("x" * 300, "x" * 60),
        ("." + "y" * 59, "y" * 59),
        ("z" * 10 + "." + "-" * 3 + "y" * 57, "y" * 57),
    ],
)
def test_name_is_safe_as_a_file_name_and_an_argument(model: str, slug: str) -> None:
    name = make_key(model=model).name
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,80}", name)
    assert re.fullmatch(r"[0-9a-f]{20}", name.rpartition("-")[2])
    assert name[:-20] == f"{slug}-"


def test_keys_that_differ_have_names_that_differ() -> None:
    keys = [make_key(), make_key(2), make_key(fingerprint="f1"), make_key(model="org/other")]
    assert len({key.name for key in keys}) == len(keys)
    assert make_key().name == make_key().name


def test_published_checkpoint_is_found_whole(tmp_path: Path) -> None:
    found = make_checkpoint(tmp_path, key=make_key(3))
    assert found.manifest.source == make_key(3).source
    assert found.manifest.layout == make_key(3).layout
    assert verify_checkpoint(found) == found.manifest.nbytes
    assert files_but_locks(tmp_path) == files_of(make_key(3))


def test_nothing_is_found_before_the_last_rank(tmp_path: Path) -> None:
    assert not write_rank(tmp_path, make_key(2), 1)
    with pytest.raises(CheckpointMissing) as missing:
        CheckpointRepository(tmp_path).find(make_key(2))
    assert_says_where_and_mend(missing.value, make_key(2).name)
    assert write_rank(tmp_path, make_key(2), 0)


def test_published_rank_need_not_be_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, key=make_key(2))
    assert not needs_rank(tmp_path, 0)


def test_recorded_rank_need_not_be_written(tmp_path: Path) -> None:
    write_rank(tmp_path, make_key(2), 0)
    assert not needs_rank(tmp_path, 0)
    assert needs_rank(tmp_path, 1)


def staged(root: Path) -> Path:
    return CheckpointRepository(root).stage(make_key(2), CHUNK_NBYTES).path


def edit_record(root: Path, change: Callable[[Any], object]) -> None:
    path = staged(root) / "rank-00000.json"
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


UNSOUND: dict[str, Callable[[Path], object]] = {
    "partition truncated": lambda root: os.truncate(staged(root) / partition_path(0), 4096),
    "partition missing": lambda root: (staged(root) / partition_path(0)).unlink(),
    "record missing": lambda root: (staged(root) / "rank-00000.json").unlink(),
    "record half written": lambda root: os.truncate(staged(root) / "rank-00000.json", 100),
    "record empty": lambda root: os.truncate(staged(root) / "rank-00000.json", 0),
    "record no object": lambda root: (staged(root) / "rank-00000.json").write_text("[1]"),
    "record deep": lambda root: (staged(root) / "rank-00000.json").write_text("[" * 100_000),
    "record broken": lambda root: edit_record(root, lambda value: value["partition"].pop("chunks")),
    "record of other chunks": lambda root: edit_record(root, lambda value: value.update(chunk_nbytes=4096)),
    "record lacks a chunk": lambda root: edit_record(root, lambda value: value["partition"]["chunks"].pop()),
    "record of another rank": lambda root: edit_record(
        root, lambda value: value["partition"].update(rank=1, path=partition_path(1))
    ),
}


@every_case("how", UNSOUND)
def test_unsound_rank_is_written_again(tmp_path: Path, how: str) -> None:
    write_rank(tmp_path, make_key(2), 0)
    write_rank(tmp_path, make_key(2), 1, publishes=False)
    UNSOUND[how](tmp_path)
    assert not CheckpointRepository(tmp_path).stage(make_key(2), CHUNK_NBYTES).publish()
    assert write_rank(tmp_path, make_key(2), 0)
    verify_checkpoint(CheckpointRepository(tmp_path).find(make_key(2)))
    assert files_but_locks(tmp_path) == files_of(make_key(2))


def test_ranks_of_different_chunk_sizes_are_not_mixed(tmp_path: Path) -> None:
    write_rank(tmp_path, make_key(2), 0)
    assert not write_rank(tmp_path, make_key(2), 1, chunk_nbytes=4096)
    assert write_rank(tmp_path, make_key(2), 0, chunk_nbytes=4096)
    found = CheckpointRepository(tmp_path).find(make_key(2))
    assert found.manifest.chunk_nbytes == 4096
    verify_checkpoint(found)


def test_rank_that_is_written_anew_is_not_published_meanwhile(tmp_path: Path) -> None:
    """A writer with other chunks takes the record away first, so nobody publishes what it is about to replace."""
    for rank in range(2):
        write_rank(tmp_path, make_key(2), rank, publishes=False)
    repository = CheckpointRepository(tmp_path)
    with repository.stage(make_key(2), 4096).writer(0) as needed:
        assert needed
        assert not repository.stage(make_key(2), CHUNK_NBYTES).publish()


def is_locked(root: Path, name: str) -> bool:
    with (root / ".locks" / name).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_nobody_can_publish_while_a_writer_looks_whether_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks the checkpoint could be published, and the rank be written for nobody."""
    locked: list[bool] = []

    def watch(name: str) -> None:
        real = getattr(Staging, name)

        def watched(*args: Any) -> Any:
            locked.append(is_locked(tmp_path, make_key(2).name))
            return real(*args)

        monkeypatch.setattr(Staging, name, watched)

    for name in ("_is_published", "_record", "_discard"):
        watch(name)
    assert needs_rank(tmp_path, 0)
    assert locked == [True] * 3


@pytest.mark.parametrize(("action", "lock"), [("set_aside", NAME), ("remove", ".trash")])
def test_only_one_at_a_time_moves_a_checkpoint(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, action: str, lock: str
) -> None:
    root, real, locked = checkpoint.path.parent, os.rename, []

    def rename(source: Path, target: Path) -> None:
        locked.append(is_locked(root, lock))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    getattr(CheckpointRepository(root), action)(NAME)
    assert locked == [True]


def test_second_writer_of_a_rank_is_told_to_wait(tmp_path: Path) -> None:
    staging = CheckpointRepository(tmp_path).stage(make_key(2), CHUNK_NBYTES)
    with staging.writer(0):
        with pytest.raises(WriterBusy, match="another process") as busy, staging.writer(0):
            pytest.fail("two writers")
        with staging.writer(1) as needed:
            assert needed
    assert_says_where_and_mend(busy.value, ".locks")
    assert needs_rank(tmp_path, 0)


def test_lock_ends_with_its_writer_even_if_a_forked_child_lives_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    staging = CheckpointRepository(tmp_path).stage(make_key(2), CHUNK_NBYTES)
    receiver, sender = context.Pipe(duplex=False)
    with staging.writer(0):
        child = context.Process(target=receiver.recv)
        child.start()
    try:
        assert needs_rank(tmp_path, 0)
    finally:
        sender.send("end")
        child.join()


def test_writer_that_fails_frees_the_lock_and_its_error_is_its_own(tmp_path: Path) -> None:
    staging = CheckpointRepository(tmp_path).stage(make_key(2), CHUNK_NBYTES)
    with pytest.raises(OSError, match="the caller's own"), staging.writer(0):
        raise OSError("the caller's own")
    assert needs_rank(tmp_path, 0)


def test_publishing_nothing_is_not_published(tmp_path: Path) -> None:
    assert not CheckpointRepository(tmp_path).stage(make_key(), CHUNK_NBYTES).publish()


def test_directory_without_a_manifest_gives_way(tmp_path: Path) -> None:
    """As a copy that was broken off leaves it; it is kept among the rejected."""
    make_checkpoint(tmp_path)
    (tmp_path / NAME / MANIFEST_NAME).unlink()
    assert write_rank(tmp_path, make_key())
    verify_checkpoint(CheckpointRepository(tmp_path).find(make_key()))
    assert files_but_locks(tmp_path) == files_of(make_key()) | {f".rejected/{NAME}/{partition_path(0)}"}


def test_link_to_nothing_gives_way(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "unmounted")
    assert write_rank(tmp_path, make_key())
    assert (tmp_path / ".rejected" / NAME).is_symlink()


def test_rest_of_a_staging_goes_when_the_checkpoint_came_from_elsewhere(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "elsewhere", key=make_key(2))
    write_rank(tmp_path / "here", make_key(2), 0)
    name = make_key(2).name
    shutil.copytree(tmp_path / "elsewhere" / name, tmp_path / "here" / name)
    assert write_rank(tmp_path / "here", make_key(2), 1)
    assert files_but_locks(tmp_path / "here") == files_of(make_key(2))


def test_manifest_that_no_reader_would_take_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm_vllm.checkpoint.repository.MANIFEST_NBYTES_MAX", 500)
    with pytest.raises(NotConvertible, match="set larger chunk_bytes") as refused:
        write_rank(tmp_path, make_key())
    assert_says_where_and_mend(refused.value, NAME)
    assert CheckpointRepository(tmp_path).list() == []


def test_list_tells_of_good_and_bad_ones_by_name(tmp_path: Path) -> None:
    for model in ("org/b", "org/a", "org/c"):
        make_checkpoint(tmp_path, key=make_key(model=model))
    os.truncate(tmp_path / make_key(model="org/b").name / MANIFEST_NAME, 9)
    write_rank(tmp_path, make_key(2), 0)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    first, second, third = CheckpointRepository(tmp_path).list()
    assert isinstance(first, Checkpoint)
    assert first.manifest.source.model == "org/a"
    assert isinstance(second, CheckpointInvalid)
    assert isinstance(third, Checkpoint)


def test_list_of_a_store_that_is_not_there_is_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert CheckpointRepository(tmp_path / "none").list() == []
    assert CheckpointRepository(tmp_path / "file").list() == []


def test_store_that_can_not_be_listed_is_named(open_dir: Path) -> None:
    make_checkpoint(open_dir / "store")
    os.chmod(open_dir / "store", 0)
    with as_nobody(), pytest.raises(CheckpointUnreadable, match="Permission denied") as refused:
        CheckpointRepository(open_dir / "store").list()
    assert_says_where_and_mend(refused.value, "store")


def test_store_that_can_not_be_entered_is_named_by_a_writer(open_dir: Path) -> None:
    staging = CheckpointRepository(open_dir).stage(make_key(), CHUNK_NBYTES)
    make_checkpoint(open_dir)
    os.chmod(open_dir / ".locks", 0o777)
    for lock in (open_dir / ".locks").iterdir():
        os.chmod(lock, 0o666)
    os.chmod(open_dir / NAME, 0)
    with as_nobody(), pytest.raises(WriteError, match="Permission denied"), staging.writer(0):
        pytest.fail("it can't know whether it is needed")
    with as_nobody(), pytest.raises(WriteError, match="Permission denied"):
        staging.publish()


def test_removed_checkpoint_is_gone_and_its_bytes_are_told(checkpoint: Checkpoint) -> None:
    root = checkpoint.path.parent
    nbytes = checkpoint.manifest.nbytes + (checkpoint.path / MANIFEST_NAME).stat().st_size
    assert CheckpointRepository(root).remove(NAME) == nbytes
    assert files_but_locks(root) == set()
    with pytest.raises(CheckpointMissing):
        CheckpointRepository(root).remove(NAME)


def test_bad_checkpoint_can_be_removed(checkpoint: Checkpoint) -> None:
    os.truncate(checkpoint.path / MANIFEST_NAME, 3)
    assert CheckpointRepository(checkpoint.path.parent).remove(NAME) > 0


def test_engine_that_has_it_open_reads_on_after_a_removal(checkpoint: Checkpoint) -> None:
    partition = checkpoint.partition(0)
    with partition.open() as file:
        CheckpointRepository(checkpoint.path.parent).remove(NAME)
        partition.check_header(file)


@every_case(
    "name",
    ["", ".", "..", "../outside", "/", "folder", "folder/inside", ".hidden", "link", "none", f"{NAME}/", "a\0b"],
)
def test_what_is_no_checkpoint_of_ours_is_not_removed(tmp_path: Path, name: str) -> None:
    store = tmp_path / "store"
    make_checkpoint(store)
    for folder in ("outside", "store/.hidden", "store/folder/inside"):
        shutil.copytree(store / NAME, tmp_path / folder)
    (store / "link").symlink_to(tmp_path / "outside")
    before = files_below(tmp_path)
    with pytest.raises(CheckpointMissing, match="there is no such checkpoint"):
        CheckpointRepository(store).remove(name)
    assert files_below(tmp_path) == before


def test_removal_follows_no_link_out_of_the_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"precious")
    (checkpoint.path / "link").symlink_to(outside)
    (checkpoint.path / "partitions" / "link").symlink_to(outside / "kept")
    CheckpointRepository(checkpoint.path.parent).remove(NAME)
    assert (outside / "kept").read_bytes() == b"precious"


def test_checkpoint_set_aside_is_kept_but_not_found(checkpoint: Checkpoint) -> None:
    repository = CheckpointRepository(checkpoint.path.parent)
    rejected = repository.set_aside(NAME)
    assert files_below(rejected) == {MANIFEST_NAME, partition_path(0)}
    assert repository.list() == []
    assert write_rank(repository.root, make_key())


def test_second_one_set_aside_replaces_the_first(checkpoint: Checkpoint) -> None:
    repository = CheckpointRepository(checkpoint.path.parent)
    repository.set_aside(NAME)
    write_rank(repository.root, make_key(), tensors=[blob("second", 5)])
    rejected = repository.set_aside(NAME)
    assert b"second" in (rejected / MANIFEST_NAME).read_bytes()


def test_setting_aside_what_is_aside_already_keeps_it(checkpoint: Checkpoint) -> None:
    """As each rank of an engine does, which all find the same checkpoint to be bad."""
    repository = CheckpointRepository(checkpoint.path.parent)
    rejected = repository.set_aside(NAME)
    assert repository.set_aside(NAME) == rejected
    assert files_below(rejected) == {MANIFEST_NAME, partition_path(0)}
