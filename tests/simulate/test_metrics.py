"""What runs come to, as figures, tables, JSON and curves."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from math import isnan, nan
from pathlib import Path

import pytest

from sllm_vllm.errors import ConfigError
from sllm_vllm.simulate.metrics import (
    COSTS,
    WAITS,
    Spread,
    figures,
    percentile,
    ranges,
    ratios,
    record,
    shown,
    spread,
    table,
)
from sllm_vllm.simulate.plot import write_cdfs
from sllm_vllm.simulate.run import End, RequestOutcome, Run
from tests.simulate.scripted import asked
from tests.support.cases import every_case


def outcome(
    number: int, *, dispatched_s: float, end: End | None = End.ANSWERED, is_cold: bool = False
) -> RequestOutcome:
    """Arrived at 10; its first token 1 s after it was sent, its end 2 s after that."""
    return RequestOutcome(
        asked(number, at_s=10.0),
        dispatched_s=dispatched_s,
        first_s=dispatched_s + 1.0,
        ended_s=dispatched_s + 3.0,
        end=end,
        is_cold=is_cold,
    )


def run_of(*outcomes: RequestOutcome) -> Run:
    return Run({one.request.id: one for one in outcomes}, accelerator_s=42.0, num_starts=3)


def test_percentile_is_a_value_of_the_sample() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.95, 0.99, 1.0)] == [1.0, 50.0, 95.0, 99.0, 100.0]
    assert isnan(percentile([], 0.5))


def test_figures_of_a_run() -> None:
    run = run_of(
        outcome(0, dispatched_s=10.0),
        outcome(1, dispatched_s=14.0, is_cold=True),
        outcome(2, dispatched_s=18.0, is_cold=True, end=End.BROKEN),
        RequestOutcome(asked(3, at_s=10.0), ended_s=70.0, end=End.REJECTED),
        RequestOutcome(asked(4, at_s=10.0)),
    )
    found = figures(run)
    assert found["ttft_mean_s"] == pytest.approx((1.0 + 5.0 + 9.0) / 3)
    assert found["ttft_p99_s"] == 9.0
    assert found["startup_mean_s"] == pytest.approx((0.0 + 4.0 + 8.0) / 3)
    assert found["startup_cold_mean_s"] == 6.0
    assert found["total_mean_s"] == pytest.approx((3.0 + 7.0) / 2)
    assert found["cold_share"] == pytest.approx(2 / 3)
    assert [found[f"num_{name}"] for name in ("rejected", "broken", "lost", "left")] == [1, 1, 1, 0]
    assert (found["accelerator_s"], found["num_starts"]) == (42.0, 3)


def test_run_without_requests_has_no_times() -> None:
    assert isnan(figures(Run())["ttft_mean_s"])
    assert record({"ours": [figures(Run())]})["ours"]["seeds"][0]["ttft_mean_s"] is None  # type: ignore[index]


def test_spread_is_over_seeds() -> None:
    runs = [figures(run_of(outcome(0, dispatched_s=at_s))) for at_s in (10.0, 12.0, 17.0)]
    assert spread(runs)["startup_mean_s"] == Spread(3.0, 0.0, 7.0)
    assert ranges({"ours": runs}, {"wait": "startup_mean_s"}) == [{"policy": "ours", "wait": "0–7"}]


@every_case("value, text", [(3.0, "3"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234"), (nan, "nan")])
def test_values_are_shown_with_three_figures(value: float, text: str) -> None:
    assert shown(value) == text


def test_table_has_a_row_a_policy_and_every_shown_metric() -> None:
    runs = {"ours": [figures(run_of(outcome(0, dispatched_s=12.0)))], "other": [figures(Run())]}
    rows = table(runs, WAITS)
    assert [row["policy"] for row in rows] == ["ours", "other"]
    assert list(rows[0]) == ["policy", *WAITS]
    assert list(table(runs, COSTS)[0]) == ["policy", *COSTS]
    assert rows[0]["TTFT mean"] == "3"


def test_ratios_are_of_the_same_seeds() -> None:
    ours = [figures(run_of(outcome(0, dispatched_s=at_s))) for at_s in (11.0, 12.0, 14.0)]
    other = [figures(run_of(outcome(0, dispatched_s=at_s))) for at_s in (14.0, 12.0, 12.0)]
    (row,) = ratios({"ours": ours, "other": other}, "startup_p99_s", "ours")
    assert row == {"policy": "other", "least": "0.50", "25 %": "0.50", "median": "1.00", "75 %": "4.00", "most": "4.00"}


def test_slowest_hundredth_tells_what_it_waited_for() -> None:
    slow = replace(outcome(0, dispatched_s=40.0), ordered_s=15.0, ready_s=35.0)
    early = replace(outcome(1, dispatched_s=12.0), ordered_s=3.0, ready_s=5.0)
    found = figures(run_of(early, slow))
    assert [found[f"slowest_{part}_s"] for part in ("slots", "start", "room")] == [5.0, 20.0, 5.0]
    assert early.waits_s == (0.0, 0.0, 2.0)


def test_record_is_json() -> None:
    told = json.loads(json.dumps(record({"ours": [figures(run_of(outcome(0, dispatched_s=12.0)))]})))
    assert told["ours"]["spread"]["ttft_mean_s"] == {"mean": 3.0, "min": 3.0, "max": 3.0}


def test_request_that_was_moved_back_counts_from_its_arrival() -> None:
    again = replace(outcome(0, dispatched_s=12.0), dispatched_s=20.0)
    assert again.startup_s == 10.0


def test_curves_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_cdfs(tmp_path / "curves.png", "a title", {"startup": {"ours": [1.0, 2.0], "other": []}})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="needs matplotlib"):
        write_cdfs(tmp_path / "curves.png", "a title", {})
