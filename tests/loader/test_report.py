"""The load report: what a line and a file of it say, and how hops add up against their limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sllm_vllm.loader.limits import LIMITS_NAME, measure_limits, read_limits
from sllm_vllm.loader.report import Hop, HopCounter, LoadReport
from sllm_vllm.units import MIB
from tests.support.cases import every_case


def test_hops_add_up_over_threads() -> None:
    counter = HopCounter({"read_disk": 50.0})
    counter.add("read_disk", 100, start_s=1.0, end_s=3.0)
    counter.add("read_disk", 100, start_s=2.0, end_s=5.0)
    hop = counter.hops["read_disk"]
    assert (hop.nbytes, hop.busy_s, hop.span_s) == (200, 5.0, 4.0)
    assert hop.share_of_limit == 1.0


def test_without_a_limit_there_is_no_share() -> None:
    assert Hop(nbytes=5, busy_s=1, span_s=1).share_of_limit is None


def test_the_line_has_every_field_and_is_one_line() -> None:
    report = LoadReport(checkpoint="/store/x", rank=1, outcome="loaded", nbytes=2_000_000_000, weights_s=2.0)
    report.hops["verify"] = Hop(nbytes=7, busy_s=0.5, span_s=0.5, limit_bps=28.0)
    line = report.line()
    assert "\n" not in line
    for field in ("outcome=loaded", "rank=1", "rate=1.00 GB/s", "verify=7B/0.500s/50%", "checkpoint=/store/x"):
        assert field in line


def test_each_rank_writes_its_own_file(tmp_path: Path) -> None:
    first = LoadReport(outcome="loaded").write(tmp_path / "report.json")
    second = LoadReport(outcome="converted", rank=1).write(tmp_path / "report.json")
    assert [first.name, second.name] == ["report.json", "report.rank-1.json"]
    assert json.loads(second.read_text())["outcome"] == "converted"


def test_measured_limits_are_kept_for_the_store(tmp_path: Path) -> None:
    file = tmp_path / "partition"
    file.write_bytes(bytes(32 * MIB))
    limits = measure_limits(file, tmp_path, num_threads=2)
    hops = {"read_disk", "read_cache", "verify"} | ({"copy"} if torch.cuda.is_available() else set())
    assert set(limits) == hops
    assert min(limits.values()) > 0
    assert read_limits(tmp_path) == limits


def test_a_file_smaller_than_a_chunk_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "partition"
    file.write_bytes(b"small")
    with pytest.raises(OSError, match="smaller than a chunk"):
        measure_limits(file, tmp_path, num_threads=1)


@every_case("content", [None, "", "[]", '{"read_disk": "fast"}', "{"])
def test_limits_that_cannot_be_read_are_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / LIMITS_NAME).write_text(content)
    assert read_limits(tmp_path) == {}
