"""What a second look at source weights costs, and which changes it sees without being told."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sllm_vllm.checkpoint import source_records
from sllm_vllm.checkpoint.fingerprint import fingerprint_directory, scan_source
from sllm_vllm.checkpoint.source_records import Identified, SourceRecords
from tests.checkpoint.test_fingerprint import BLOB, COMMIT, CONTENT, rewrite

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
    start = time.perf_counter()
    assert known(records, model) is not None
    return time.perf_counter() - start
