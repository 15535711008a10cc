"""The load benchmark: its rows, verdicts and arguments, what it measures by, and a run without vLLM."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.common.disturbance import Disturbance
from benchmarks.common.supervise import ROOT
from benchmarks.loading import __main__ as loading
from benchmarks.loading import claimed_memory, page_cache
from benchmarks.loading.__main__ import BenchFailed, chosen
from benchmarks.loading.formats import PLAIN_REFERENCE, missing, plain_loaders, vllm_loaders
from benchmarks.loading.job import (
    OURS,
    OURS_RESIDENT,
    REFERENCE,
    Answer,
    ChildFailed,
    Job,
    Loader,
    Measurement,
    run_child,
)
from benchmarks.loading.page_cache import COLD_MAX, PageCacheRefused, Tier, prepare, residency
from benchmarks.loading.peak_memory import PeakMemory
from benchmarks.loading.report import limit_of, limits_as_json, rows_of, table_of, verdicts_of
from benchmarks.store.device_limits import Limits, measure_limits, read_direct_s
from sllm_vllm.units import MIB
from tests.support.cases import every_case
from tests.support.process_tree import alive, descendants

NBYTES = 2_000_000_000
RUN_TIMEOUT_S = 240.0


def load(seconds: float, **fields: Any) -> Measurement:
    return Measurement(**({"seconds": seconds, "residency": 1.0, "peak_nbytes": NBYTES} | fields))


def limits(read_s: float = 1.0, copy_bps: float = 4e9) -> Limits:
    return Limits(nbytes=NBYTES, read_s={1: read_s + 1, 4: read_s}, copy_bps=copy_bps)


def samples(*, warm: float = 3.0, cold: float = 3.0, **ours: Any) -> dict[tuple[str, Tier], list[Measurement]]:
    """Three rounds of ours and of the stock loader, which takes 6 s: 3 for weights, 2 for post-processing."""
    stock = load(6.0, weights_s=3.0, process_s=2.0, construct_s=0.1)
    return {
        (OURS, "warm"): [load(warm + delta, **ours) for delta in (0.5, -0.5, 0.0)],
        (REFERENCE, "warm"): [stock] * 3,
        (OURS, "cold"): [load(cold, **ours)] * 3,
        (REFERENCE, "cold"): [load(12.0, weights_s=9.0, process_s=2.0)] * 3,
    }


# ---------------------------------------------------------------------------------------------------- rows, verdicts


def test_parts_add_up_to_the_whole() -> None:
    found = load(5.0, construct_s=0.5, weights_s=1.0, process_s=2.0)
    assert found.construct_s + found.weights_s + found.process_s + found.rest_s == found.seconds


def test_row_tells_minimum_median_and_maximum() -> None:
    row = rows_of(samples(), [limits()], reference=REFERENCE)[0]
    assert (row.loader, row.tier, row.rounds) == (OURS, "warm", 3)
    assert (row.min_s, row.median_s, row.max_s) == (2.5, 3.0, 3.5)
    assert row.bps == NBYTES / 3.0


def test_row_is_compared_with_the_stock_loader_of_its_own_tier() -> None:
    rows = {(row.loader, row.tier): row for row in rows_of(samples(), [limits()], reference=REFERENCE)}
    assert rows[OURS, "warm"].ratio == 0.5
    assert rows[OURS, "cold"].ratio == 0.25
    assert rows[REFERENCE, "cold"].ratio == 1.0


@every_case(
    "tier, read_s, copy_bps, expected_s",
    [
        ("cold", 5.0, 4e9, 5.0),  # the disk
        ("cold", 1.0, 4e9, 2.0),  # post-processing
        ("warm", 5.0, 4e9, 2.0),  # post-processing, as nothing is read
        ("warm", 5.0, 0.5e9, 4.0),  # the copy
    ],
)
def test_limit_is_the_slowest_of_what_must_be_done(
    tier: Tier, read_s: float, copy_bps: float, expected_s: float
) -> None:
    assert limit_of(samples(), [limits(read_s, copy_bps)], tier=tier, reference=REFERENCE) == expected_s


def test_copy_to_a_device_counts_instead_of_the_copy_in_memory() -> None:
    there = Limits(nbytes=NBYTES, read_s={1: 1.0}, copy_bps=1e9, device_copy_bps=50e9)
    assert there.copy_s == pytest.approx(0.04)


def verdicts(found: dict[tuple[str, Tier], list[Measurement]], read_s: float = 1.0) -> list[bool]:
    rows = rows_of(found, [limits(read_s)], reference=REFERENCE)
    told = verdicts_of(rows, read_s=read_s, process_s=2.0, reference=REFERENCE)
    return [verdict.is_met for verdict in told]


def test_warm_load_must_save_nine_tenths_of_the_stock_weights() -> None:
    assert verdicts(samples(warm=3.3))[0]
    assert not verdicts(samples(warm=3.31))[0]


def test_cold_load_may_take_a_tenth_longer_than_the_slower_of_disk_and_post_processing() -> None:
    assert verdicts(samples(cold=2.2))[1]
    assert not verdicts(samples(cold=2.21))[1]
    assert verdicts(samples(cold=5.5), read_s=5.0)[1]


def test_peak_memory_may_exceed_the_model_by_256_mib() -> None:
    assert verdicts(samples(peak_nbytes=NBYTES + 256 * MIB))[2]
    assert not verdicts(samples(peak_nbytes=NBYTES + 256 * MIB + 1))[2]


def test_unknown_peak_memory_is_no_pass() -> None:
    assert not verdicts(samples(peak_nbytes=None))[2]


def test_lines_are_json_and_hold_every_figure() -> None:
    rows = rows_of(samples(), [limits()], reference=REFERENCE)
    line = json.loads(json.dumps(rows[0].as_json()))
    wanted = {"loader", "tier", "nbytes", "rounds", "min_s", "median_s", "max_s", "bps", "limit_share", "ratio"}
    assert wanted | {"construct_s", "weights_s", "process_s", "rest_s", "peak_nbytes", "residency"} <= set(line)
    told = json.loads(json.dumps(limits_as_json([limits()], 2.0)))
    assert told["read_direct_s"] == {"1": 2.0, "4": 1.0}


def test_table_is_sorted_by_tier_and_time() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(table_of(rows_of(samples(), [limits()], reference=REFERENCE)))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split("  ")[0].strip() for line in console.file.getvalue().splitlines() if " GB/s " in line]
    assert lines == [OURS, REFERENCE, OURS, REFERENCE]


# --------------------------------------------------------------------------------------------------------- arguments


def test_too_few_rounds_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["loading.py", "--rounds", "0"])
    with pytest.raises(SystemExit, match="2"):
        loading.main()
    assert "give 1 at least" in capsys.readouterr().err


def test_chosen_formats_keep_ours_and_the_reference(tmp_path: Path) -> None:
    found = chosen(vllm_loaders(tmp_path), ["runai_streamer"], REFERENCE)
    assert [loader.name for loader in found] == [OURS, OURS_RESIDENT, REFERENCE, "runai_streamer"]


def test_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BenchFailed, match=r"unknown: zip; known: auto eager, .*sllm"):
        chosen(vllm_loaders(tmp_path), ["zip"], REFERENCE)


def test_formats_that_need_cuda_are_told_from_those_that_do_not(tmp_path: Path) -> None:
    reasons = {loader.name: missing(loader, has_cuda=False) for loader in vllm_loaders(tmp_path)}
    needy = {name for name, reason in reasons.items() if reason == "needs CUDA"}
    assert needy == {"fastsafetensors", "instanttensor", "sharded_state", "tensorizer"}
    assert reasons[OURS] == reasons[REFERENCE] == ""


def test_format_whose_package_is_missing_is_told() -> None:
    loader = Loader(name="x", load_format="x", needs_module="no_such_package")
    assert missing(loader, has_cuda=True) == "no_such_package is not installed"


def test_every_loader_has_a_name_of_its_own(tmp_path: Path) -> None:
    for loaders in (vllm_loaders(tmp_path), plain_loaders(tmp_path)):
        assert len({loader.name for loader in loaders}) == len(loaders)
        assert loaders[0].name == OURS


# ------------------------------------------------------------------------------------------------------- instruments


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file whose size is no multiple of a page."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4096 * 20 + b"tail")
    return path


def test_file_is_brought_into_the_page_cache_and_out_of_it(file: Path) -> None:
    assert prepare([file], "warm") == residency([file]) == 1.0
    try:
        assert prepare([file], "cold") <= COLD_MAX
    except PageCacheRefused:
        pytest.skip("this file system keeps its pages")


def test_nothing_is_resident_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert residency([tmp_path / "empty"]) == 1.0


def test_free_memory_is_claimed_but_never_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claimed_memory, "_free_nbytes", lambda: 10 * MIB)
    assert claimed_memory.ClaimedMemory(2 * MIB).nbytes == 5 * MIB
    assert claimed_memory.ClaimedMemory(64 * MIB).nbytes == 8 * MIB


def test_claimed_memory_is_held_by_a_process_until_it_is_released() -> None:
    before = descendants(os.getpid())
    with claimed_memory.ClaimedMemory(2 * MIB) as held:
        processes = descendants(os.getpid()) - before
        assert alive(processes)
        held.release()
        assert not alive(processes)


def test_page_cache_that_refuses_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "residency", lambda paths: 0.5)
    for tier in ("warm", "cold"):
        with pytest.raises(PageCacheRefused, match=r"50\.0% of .* is not"):
            prepare([file], tier)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_direct_read_reaches_the_end_of_a_file_of_any_size(file: Path, num_threads: int) -> None:
    try:
        assert read_direct_s(file, num_threads) > 0
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")


def test_limits_are_of_the_whole_file(file: Path) -> None:
    try:
        found = measure_limits(file, with_cuda=False)
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")
    assert found.nbytes == file.stat().st_size
    assert found.best_read_s == min(found.read_s.values())
    assert found.device_copy_bps is None


def test_peak_memory_is_the_growth_from_its_making_on() -> None:
    memory = PeakMemory()
    data = bytes(64 * MIB)  # zeros of which nothing is resident yet
    data = data.replace(b"\0", b"\1")
    del data
    growth = memory.growth()
    if growth is None:
        pytest.skip("this system does not let a process reset its peak")
    assert growth >= 60 * MIB  # the kernel adds up what each thread counted only now and then


def test_disturbance_is_a_share() -> None:
    assert 0.0 <= Disturbance().share() <= 1.0


# ---------------------------------------------------------------------------------------------------------- children


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(action="digest", loader=plain_loaders(tmp_path)[1], model=tmp_path / "no-model", plain=True)


def test_child_that_fails_is_told_by_its_last_line(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match=r"FileNotFoundError: .*no-model"):
        run_child(job, tmp_path, {})


def test_answer_of_an_earlier_child_is_not_taken_for_this_one(job: Job, tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text(Answer(digest="old").model_dump_json())
    with pytest.raises(ChildFailed):
        run_child(job, tmp_path, {})


def test_job_survives_its_way_to_the_child(job: Job) -> None:
    assert Job.model_validate_json(job.model_dump_json()) == job


# ---------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.e2e_long
def test_run_without_vllm(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Children, page cache, digests and rows of a real run, on a tiny model."""
    cache, lines = tmp_path / "cache", tmp_path / "lines.jsonl"
    command = [
        sys.executable,
        "benchmarks/loading/__main__.py",
        "--no-vllm",
        "--model",
        str(model_dir()),
        "--rounds",
        "1",
    ]
    command += ["--cache", str(cache), "--json", str(lines), "--store", "row"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    if "give a --cache on a disk" in done.stdout or "which is not cold" in done.stdout:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    rows = {(line["loader"], line["tier"]) for line in found if line["kind"] == "row"}
    assert rows == {(name, tier) for name in (OURS, OURS_RESIDENT, PLAIN_REFERENCE) for tier in ("warm", "cold")}
    assert [line["kind"] for line in found[:2]] == ["machine", "limits"]
    assert {path.name for path in cache.iterdir()} <= {".lock", "bytecode"}


@pytest.mark.e2e_long
def test_measurement_inside_vllm(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """One child of each kind that a run has: converts, loads what it converted, and the stock loader."""
    loaders = {loader.name: loader for loader in vllm_loaders(tmp_path)}
    first, second, stock = (
        run_child(Job(action="measure", loader=loaders[name], model=model_dir()), tmp_path, {}).measurement
        for name in (OURS, OURS, REFERENCE)
    )
    assert first is not None
    assert second is not None
    assert stock is not None
    assert (first.outcome, second.outcome, stock.outcome) == ("converted", "loaded", "")
    for found in (second, stock):
        assert found.construct_s > 0
        assert found.process_s > 0
        assert found.rest_s >= 0
