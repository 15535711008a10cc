"""The simulator of the store: deterministic, honest about broken invariants, and cost-aware eviction pays."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks.store import sim as store_sim
from benchmarks.store.sim import Result, Settings, simulate
from sllm_vllm.store.core.cache import Cache
from sllm_vllm.units import GIB

SMALL = Settings(seed=7, num_models=20, num_requests=250, pool_nbytes=64 * GIB, validate_every=500)
SMALL_COMMAND = ["--seed", "7", "--models", "5", "--requests", "30", "--pool-gib", "16", "--validate-every", "100"]


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return simulate(SMALL)


def test_the_same_seed_gives_the_same_output(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for _ in range(2):
        assert store_sim.main(SMALL_COMMAND) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("seed 7, ")


def test_every_request_is_served(results: list[Result]) -> None:
    assert [len(result.waits_s) for result in results] == [SMALL.num_requests] * 2


def test_cost_aware_eviction_loads_no_slower_than_lru(results: list[Result]) -> None:
    cost, lru = results
    assert statistics.fmean(cost.load_times_s) <= statistics.fmean(lru.load_times_s)


def test_a_trace_gives_the_pattern_of_arrivals_and_the_settings_the_rate(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    stamps = ["18:15:46.0000000", "18:15:47.0000000", "18:15:50.0000000"]
    rows = "".join(f"2023-11-16 {stamp},374,44\n" for stamp in stamps)
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    assert list(store_sim.traced_arrivals(trace, Settings(0, rate_hz=0.5))) == pytest.approx([0.0, 1.5, 6.0])
    assert store_sim.main([*SMALL_COMMAND, "--trace", str(trace)]) == 0


def test_a_broken_invariant_ends_it_with_the_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def validate(self: Cache) -> None:
        raise AssertionError("a given span went")

    monkeypatch.setattr(Cache, "validate", validate)
    assert store_sim.main(SMALL_COMMAND) == 1
    assert "with seed 7: AssertionError('a given span went')" in capsys.readouterr().err
