"""Arrivals: their statistics, their order, and traces."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from sllm_vllm.errors import ConfigError
from sllm_vllm.simulate.workload import (
    COLUMNS,
    GSM8K,
    SHAREGPT,
    SimulatedRequest,
    Traffic,
    draw_requests,
    gaps,
    read_trace,
    shares,
)
from tests.support.cases import every_case

MODELS = [f"m{number}" for number in range(10)]


def write_trace(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    return path


@every_case("cv, tolerance", [(0.5, 0.01), (1.0, 0.02), (8.0, 0.05)])
def test_gaps_have_the_rate_and_variation_asked_for(cv: float, tolerance: float) -> None:
    times = list(itertools.islice(gaps(4.0, cv, random.Random(1)), 400_000))
    between = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert fmean(between) == pytest.approx(0.25, rel=tolerance)
    assert pstdev(between) / fmean(between) == pytest.approx(cv, rel=tolerance)


def test_beginning_is_a_moment_like_any_other() -> None:
    """A stationary process has its rate from the beginning; one that begins with an arrival has a burst there."""
    counts = [
        sum(1 for _ in itertools.takewhile(lambda at_s: at_s < 10.0, gaps(1.0, 8.0, random.Random(seed))))
        for seed in range(4000)
    ]
    assert fmean(counts) == pytest.approx(10.0, rel=0.1)


def test_requests_come_in_the_order_of_time() -> None:
    requests = draw_requests(Traffic(rate=5.0), MODELS, 500, seed=1)
    times = [request.at_s for request in requests]
    assert times == sorted(times)
    assert len({request.id for request in requests}) == 500


@every_case("is_per_model", [True, False])
def test_same_seed_draws_the_same_and_another_does_not(is_per_model: bool) -> None:
    traffic = Traffic(rate=5.0, is_per_model=is_per_model)
    assert draw_requests(traffic, MODELS, 200, seed=1) == draw_requests(traffic, MODELS, 200, seed=1)
    assert draw_requests(traffic, MODELS, 200, seed=1) != draw_requests(traffic, MODELS, 200, seed=2)


def test_popularity_follows_the_power_law() -> None:
    parts = sorted(shares(MODELS, 1.0, random.Random(1)).values(), reverse=True)
    assert sum(parts) == pytest.approx(1.0)
    assert parts[0] / parts[4] == pytest.approx(5.0)


def test_models_are_drawn_by_their_shares() -> None:
    traffic = Traffic(rate=5.0, cv=1.0, exponent=0.0, is_per_model=False)
    counts = Counter(request.model for request in draw_requests(traffic, MODELS, 20_000, seed=1))
    assert {model: count / 2000 for model, count in counts.items()} == pytest.approx(
        dict.fromkeys(MODELS, 1.0), rel=0.1
    )


def test_sharegpt_answers_are_longer_by_the_paper_s_factor() -> None:
    rng = random.Random(1)
    ratio = fmean(SHAREGPT.draw(rng)[1] for _ in range(40_000)) / fmean(GSM8K.draw(rng)[1] for _ in range(40_000))
    assert ratio == pytest.approx(3.7, rel=0.05)


def test_trace_keeps_its_times_and_tokens(tmp_path: Path) -> None:
    rows = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:48.1805900,396,109"]
    requests = read_trace(write_trace(tmp_path / "trace.csv", rows), ["only"], 10, seed=1)
    assert requests[0] == SimulatedRequest("r0", 0.0, "only", 374, 44)
    assert (requests[1].prompt_tokens, requests[1].output_tokens) == (396, 109)
    assert requests[1].at_s == pytest.approx(1.5, abs=1e-5)


def test_trace_is_stretched_to_a_rate(tmp_path: Path) -> None:
    rows = [f"2023-11-16 18:15:0{second},10,10" for second in range(5)]
    requests = read_trace(write_trace(tmp_path / "trace.csv", rows), MODELS, 5, seed=1, rate=0.5)
    assert [request.at_s for request in requests] == pytest.approx([0.0, 2.0, 4.0, 6.0, 8.0])


@pytest.mark.parametrize("rows", [[], ["yesterday,1,2"], ["2023-11-16 18:15:46,many,2"]])
def test_trace_that_is_none_is_refused(tmp_path: Path, rows: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"trace\.csv"):
        read_trace(write_trace(tmp_path / "trace.csv", rows), MODELS, 5, seed=1)


def test_trace_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="TIMESTAMP,ContextTokens,GeneratedTokens"):
        read_trace(tmp_path / "trace.csv", MODELS, 5, seed=1)


def test_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        read_trace(tmp_path / "none.csv", MODELS, 5, seed=1)
