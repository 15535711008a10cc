"""What a second look at source weights costs, and which changes it sees without being told."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sllm_vllm.checkpoint import source_records
from sllm_vllm.checkpoint.fingerprint import FileState, fingerprint_directory, scan_source
from sllm_vllm.checkpoint.source_records import Identified, SourceRecords
from tests.checkpoint.test_fingerprint import BLOB, COMMIT, CONTENT, rewrite
from tests.support.cases import every_case

NUM_FILES = 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (path / name).write_bytes(CONTENT)
    return path


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "models--org--name" / "snapshots" / COMMIT
    path.mkdir(parents=True)
    (path.parents[1] / "blobs").mkdir()
    (path.parents[1] / "blobs" / BLOB).write_bytes(CONTENT)
    (path / "model.safetensors").symlink_to(f"../../blobs/{BLOB}")
    return path


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceRecords:
    """Records that believe in files of this very moment."""
    monkeypatch.setattr(source_records, "_SETTLED_NS", -1)
    return SourceRecords(tmp_path / "store")


def known(records: SourceRecords, directory: Path) -> Identified | None:
    return records.known(directory, scan_source(directory))


def identify(records: SourceRecords, directory: Path) -> Identified:
    return records.identify(directory, scan_source(directory))


def test_second_look_reads_nothing(records: SourceRecords, model: Path) -> None:
    assert known(records, model) is None
    first = identify(records, model)
    assert first.nbytes_read == 2 * len(CONTENT)
    assert first.fingerprint == fingerprint_directory(model)
    second = known(records, model)
    assert second is not None
    assert (second.files, second.nbytes_read, second.changed) == (first.files, 0, ())


def test_look_of_another_process_finds_what_was_seen(records: SourceRecords, model: Path, tmp_path: Path) -> None:
    identify(records, model)
    assert known(SourceRecords(tmp_path / "store"), model) is not None
    assert SourceRecords(tmp_path / "store").folders() == {model: fingerprint_directory(model)}


def replaced_by_a_copy(file: Path) -> None:
    """As ``rsync -t`` and ``cp -p`` do: other bytes, the size and the times of before."""
    copy = file.with_name("copy")
    shutil.copy2(file, copy)
    rewrite(copy, 1_000_001)
    shutil.copystat(file, copy)
    copy.rename(file)


EDITS: dict[str, Callable[[Path], object]] = {
    "in place, size and times kept": lambda file: rewrite(file, 1_000_001),
    "replaced, size and times kept": replaced_by_a_copy,
    "halved": lambda file: os.truncate(file, len(CONTENT) // 2),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edit_is_seen_and_only_that_file_is_read(records: SourceRecords, model: Path, edit: str) -> None:
    before = identify(records, model)
    EDITS[edit](model / "model-2.safetensors")
    assert known(records, model) is None
    after = identify(records, model)
    assert after.fingerprint == fingerprint_directory(model) != before.fingerprint
    assert after.changed == ("model-2.safetensors",)
    assert after.nbytes_read == (model / "model-2.safetensors").stat().st_size


def test_new_times_alone_are_no_change(records: SourceRecords, model: Path) -> None:
    before = identify(records, model)
    os.utime(model / "model-1.safetensors")
    assert known(records, model) is None
    after = identify(records, model)
    assert (after.fingerprint, after.changed) == (before.fingerprint, ())


def test_file_written_to_a_moment_ago_is_read_at_each_look(model: Path, tmp_path: Path) -> None:
    records = SourceRecords(tmp_path / "store")
    identify(records, model)
    assert known(records, model) is None


def test_files_from_the_future_are_read_at_each_look(model: Path, tmp_path: Path) -> None:
    records, later_ns = SourceRecords(tmp_path / "store"), time.time_ns() + 10**12
    for file in model.iterdir():
        os.utime(file, ns=(later_ns, later_ns))
    identify(records, model)
    assert known(records, model) is None


def test_first_sight_of_a_hub_cache_reads_nothing(records: SourceRecords, snapshot: Path) -> None:
    found = known(records, snapshot)
    assert found is not None
    assert [file.digest for file in found.files] == [f"sha256:{BLOB}"]


@pytest.mark.parametrize("edit", EDITS)
def test_blob_that_was_edited_in_place_is_seen(records: SourceRecords, snapshot: Path, edit: str) -> None:
    before = known(records, snapshot)
    EDITS[edit](snapshot.parents[1] / "blobs" / BLOB)
    assert known(records, snapshot) is None
    after = identify(records, snapshot)
    assert before is not None
    assert after.fingerprint != before.fingerprint


def test_blob_of_another_revision_is_the_same_file(records: SourceRecords, snapshot: Path) -> None:
    known(records, snapshot)
    rewrite(snapshot.parents[1] / "blobs" / BLOB, 1_000_001)
    other = snapshot.with_name("1" * 40)
    shutil.copytree(snapshot, other, symlinks=True)
    assert known(records, other) is None


def test_blob_that_was_written_to_before_its_first_sight_is_found_when_it_is_read(
    records: SourceRecords, snapshot: Path
) -> None:
    rewrite(snapshot.parents[1] / "blobs" / BLOB, 1_000_001)
    link = snapshot / "model.safetensors"
    link.unlink()
    link.symlink_to(f"../../blobs/{BLOB}")  # a link that is younger than the write
    named = known(records, snapshot)
    read = records.identify(snapshot, scan_source(snapshot), effort="named")
    assert named is not None
    assert read.fingerprint != named.fingerprint
    assert known(records, snapshot) is not None


def test_blob_is_read_once_to_make_sure_of_its_name(records: SourceRecords, snapshot: Path) -> None:
    first, second = (records.identify(snapshot, scan_source(snapshot), effort="named") for _ in range(2))
    assert (first.nbytes_read, second.nbytes_read) == (len(CONTENT), 0)


def test_everything_is_read_where_that_is_asked_for(records: SourceRecords, model: Path) -> None:
    identify(records, model)
    assert records.identify(model, scan_source(model), effort="all").nbytes_read == 2 * len(CONTENT)


def test_broken_record_makes_no_name_trusted(records: SourceRecords, snapshot: Path, tmp_path: Path) -> None:
    known(records, snapshot)
    for path in (tmp_path / "store" / ".sources").glob("*.json"):
        path.write_text("{")
    rewrite(snapshot.parents[1] / "blobs" / BLOB, 1_000_001)
    assert known(records, snapshot) is None
    identify(records, snapshot)
    assert known(records, snapshot) is not None


def test_without_a_place_for_records_sources_are_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    records = SourceRecords(tmp_path / "file" / "store")
    assert identify(records, model).fingerprint == fingerprint_directory(model)
    assert known(records, model) is None


def test_look_at_40_files_of_100_gb_is_cheap(
    records: SourceRecords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "large"
    model.mkdir()
    for i in range(NUM_FILES):
        (model / f"model-{i:05d}-of-{NUM_FILES:05d}.safetensors").touch()
        os.truncate(model / f"model-{i:05d}-of-{NUM_FILES:05d}.safetensors", 2_500_000_000)  # sparse
    with monkeypatch.context() as patch:
        patch.setattr(source_records, "read_digests", lambda files: ["xxh3:0"] * len(files))
        identify(records, model)
    best_s = min(_look_s(records, model) for _ in range(5))
    assert best_s < 0.25, "five times the limit of a quiet machine"


def _look_s(records: SourceRecords, model: Path) -> float:
    """In processor time, which other processes change little."""
    start = time.process_time()
    assert known(records, model) is not None
    return time.process_time() - start


def test_mtime_of_the_future_is_no_write_of_this_moment(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive packed under a wrong clock: its files would be read at each start."""
    for file in model.iterdir():
        os.utime(file, (4e9, 4e9))
    monkeypatch.setattr(source_records, "_SETTLED_NS", 0)
    records = SourceRecords(tmp_path / "store")
    identify(records, model)
    assert known(records, model) is not None


@every_case("ctime_ns, is_known", [(5_000_000_001, True), (5_000_000_000, False), (3_000_000_007, False)])
def test_other_device_number_of_an_overlay_or_a_mount(ctime_ns: int, is_known: bool) -> None:
    """It may be another one if the ctime is the kernel's own: not if a file system has none, or shows the mtime."""
    before = FileState(100, 3_000_000_007, ctime_ns, 12, 58)
    assert before._replace(device=61).proves_same_as(before) is is_known
    assert before.proves_same_as(before)
    assert not before._replace(device=61, inode=13).proves_same_as(before)


def test_record_of_a_container_that_has_another_device_number(records: SourceRecords, model: Path) -> None:
    for file in model.iterdir():
        os.utime(file, ns=(1, 1))  # so that ctime is no copy of it
    identify(records, model)
    (record,) = records._root.glob(".sources/*.json")
    content = json.loads(record.read_text())
    for sightings in content["sightings"].values():
        sightings[0]["state"][-1] += 1
    record.write_text(json.dumps(content))
    assert known(records, model) is not None


def test_many_nodes_with_copies_of_their_own_share_the_records(records: SourceRecords, model: Path) -> None:
    """Each node sees the path with its own inodes; the second round of starts reads nothing."""
    for node in ("a", "b", "c", "d", "e", "f", "g", "h"):
        shutil.copytree(model, model.with_name(node))
    shutil.rmtree(model)
    for is_known in (False, True):
        for node in ("a", "b", "c", "d", "e", "f", "g", "h"):
            model.with_name(node).rename(model)
            assert (known(records, model) is not None) is is_known
            identify(records, model)
            model.rename(model.with_name(node))


def test_child_that_was_forked_meanwhile_keeps_no_lock(records: SourceRecords, model: Path) -> None:
    release, hold = os.pipe()
    with records._one_reader(model):
        child = os.fork()
        if child == 0:
            os.close(hold)
            os.read(release, 1)
            os._exit(0)
    try:
        with records._path(model).with_suffix(".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(hold)
        os.waitpid(child, 0)
