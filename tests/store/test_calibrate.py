"""What is measured of a device, what is chosen from it, and what is kept."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from sllm_vllm.errors import ConfigError, WriteError
from sllm_vllm.store.calibrate import (
    CALIBRATION_NAME,
    Figure,
    MeasurePlan,
    largest_partition,
    measure_device,
    plan_depth,
    read_calibration,
)
from sllm_vllm.units import KIB, MIB
from tests.support.cases import every_case

PLAN = MeasurePlan(
    sample_nbytes=256 * KIB,
    read_depths=(1, 2),
    read_chunks=(4 * KIB, 16 * KIB),
    write_depths=(1, 2),
    write_chunk=16 * KIB,
    rounds=2,
)


def figures(*bps: float, depths: Sequence[int] = (1, 2, 4, 8)) -> list[Figure]:
    return [Figure(depth=depth, chunk_nbytes=MIB, bps=rate) for depth, rate in zip(depths, bps, strict=True)]


@every_case(
    "bps, depth",
    [
        ((100, 100, 100, 100), 1),
        ((97, 100, 99, 98), 1),
        ((96.9, 100, 99, 98), 2),
        ((10, 20, 40, 80), 8),
        ((10, 78, 80, 60), 2),
    ],
)
def test_the_smallest_depth_within_three_percent_is_chosen(bps: tuple[float, ...], depth: int) -> None:
    assert plan_depth(figures(*bps)) == depth


def test_a_depth_counts_with_its_best_chunk_size() -> None:
    slow = figures(50, 60, depths=(1, 2))
    fast = [Figure(depth=depth, chunk_nbytes=4 * MIB, bps=bps) for depth, bps in ((1, 99), (2, 100))]
    assert plan_depth(slow + fast) == 1


def test_a_temporary_file_is_measured_and_gone(tmp_path: Path) -> None:
    state_dir = tmp_path / "store" / ".store"
    measured = measure_device(state_dir, None, PLAN)
    assert [(figure.depth, figure.chunk_nbytes) for figure in measured.reads] == [
        (1, 4 * KIB),
        (1, 16 * KIB),
        (2, 4 * KIB),
        (2, 16 * KIB),
    ]
    assert [(figure.depth, figure.chunk_nbytes) for figure in measured.writes] == [(1, 16 * KIB), (2, 16 * KIB)]
    assert (measured.readers, measured.writers) == (plan_depth(measured.reads), plan_depth(measured.writes))
    assert measured.read_bps == max(figure.bps for figure in measured.reads)
    assert measured.write_bps == max(figure.bps for figure in measured.writes)
    assert [path.name for path in state_dir.iterdir()] == [CALIBRATION_NAME]
    assert stat.S_IMODE(state_dir.stat().st_mode) == 0o700


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    measured = measure_device(tmp_path, None, PLAN)
    assert read_calibration(tmp_path) == measured


def test_a_file_of_one_s_own_is_read_and_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * (100 * KIB + 1))
    measured = measure_device(tmp_path / "state", file, PLAN)
    assert measured.file == str(file)
    assert measured.device == file.stat().st_dev
    assert file.read_bytes() == b"x" * (100 * KIB + 1)


def test_a_filesystem_without_direct_io_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def refuse_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument", str(path))
        return really_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse_direct)
    measured = measure_device(tmp_path, None, PLAN)
    assert not measured.is_direct


def test_a_round_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time at all, each thread moves one chunk."""
    moved: list[int] = []
    really_read = os.preadv

    def count(fd: int, buffers: list[memoryview], offset: int) -> int:
        moved.append(offset)
        return really_read(fd, buffers, offset)

    file = tmp_path / "file"
    file.write_bytes(bytes(256 * KIB))
    monkeypatch.setattr(os, "preadv", count)
    plan = MeasurePlan(
        sample_nbytes=256 * KIB,
        read_depths=(1,),
        read_chunks=(4 * KIB,),
        write_depths=(1,),
        write_chunk=4 * KIB,
        rounds=3,
        round_s_max=-1.0,
    )
    measure_device(tmp_path / "state", file, plan)
    assert moved == [0, 0, 0]


@pytest.mark.parametrize("nbytes", [0, 16 * KIB - 1])
def test_a_file_smaller_than_a_chunk_is_refused(tmp_path: Path, nbytes: int) -> None:
    (tmp_path / "file").write_bytes(bytes(nbytes))
    with pytest.raises(ConfigError, match="at least"):
        measure_device(tmp_path / "state", tmp_path / "file", PLAN)
    assert read_calibration(tmp_path / "state") is None


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="must be a file"):
        measure_device(tmp_path / "state", tmp_path / "pipe", PLAN)


def test_a_full_device_is_told(tmp_path: Path) -> None:
    plan = MeasurePlan(sample_nbytes=1 << 60)
    with pytest.raises(WriteError, match="no space is left"):
        measure_device(tmp_path, None, plan)
    assert list(tmp_path.iterdir()) == []


@every_case("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"readers": 4}'])
def test_a_broken_calibration_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CALIBRATION_NAME).write_bytes(content)
    assert read_calibration(tmp_path) is None


@every_case("change", [{"readers": 0}, {"writers": 100}, {"reads": []}, {"surprise": 1}])
def test_a_calibration_with_impossible_values_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    measured = measure_device(tmp_path, None, PLAN)
    broken = measured.model_copy(update=change)
    text = broken.model_dump_json(warnings=False)
    if "surprise" in change:
        text = text[:-1] + ', "surprise": 1}'
    (tmp_path / CALIBRATION_NAME).write_text(text)
    assert read_calibration(tmp_path) is None


def test_without_a_calibration_there_is_none(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None


def test_the_largest_partition_is_found(tmp_path: Path) -> None:
    for name, nbytes in (("a", 10), ("b", 30), ("c", 30), (".staging", 99)):
        folder = tmp_path / name / "partitions"
        folder.mkdir(parents=True)
        (folder / "rank-00000.safetensors").write_bytes(bytes(nbytes))
    assert largest_partition(tmp_path, 1) == tmp_path / "b" / "partitions" / "rank-00000.safetensors"
    assert largest_partition(tmp_path, 31) is None
    assert largest_partition(tmp_path / "nowhere", 1) is None
