"""What the estimator learns, from whom it borrows, and what does not lead it astray."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm_vllm.router.core.estimator import (
    DEFAULTS,
    RECORD_KEYS_MAX,
    Estimator,
    StartDefaults,
)
from sllm_vllm.router.core.facts import ModelSpec, PrefillSample, StartSample, Term, Tier
from tests.support.cases import every_case

on_any_machine = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SPEC = ModelSpec("m", nbytes=8_000_000_000)
SECONDS = st.floats(0, 1e4)


def start(
    model: str = "m",
    node: str = "n",
    *,
    seconds: float = 5.0,
    nbytes: int = 8_000_000_000,
    tier: Tier = Tier.DISK,
    is_warm: bool = True,
) -> StartSample:
    """One whose three terms all took ``seconds``."""
    return StartSample(model, node, is_warm, tier, nbytes, process_s=seconds, init_s=seconds, weights_s=seconds)


def taught(samples: Iterable[StartSample]) -> Estimator:
    estimator = Estimator()
    for sample in samples:
        estimator.observe_start(sample)
    return estimator


def terms(estimator: Estimator, node: str = "n", *, is_warm: bool = True, tier: Tier = Tier.DISK) -> dict[Term, float]:
    return dict(estimator.estimate_start(SPEC, node, tier, is_warm=is_warm).terms)


# ------------------------------------------------------------------------------------------------------------ starts


def test_loads_of_small_models_do_not_make_a_large_one_look_as_quick() -> None:
    estimator = taught([start(model="small", seconds=0.14, nbytes=4_000_000)] * 8)
    guessed_s = estimator.weights_s(ModelSpec("large", nbytes=14_000_000_000), "n", Tier.DISK)
    assert guessed_s == pytest.approx(7.1, abs=0.1)  # at the default's 2 GB/s


def test_before_the_first_start_everything_is_the_defaults() -> None:
    estimate = Estimator().estimate_start(SPEC, "n", Tier.DISK, is_warm=False, prompt_tokens=1000, queue_s=7.0)
    assert list(estimate.terms) == list(Term)
    assert estimate.terms == {
        Term.QUEUE: 7.0,
        Term.PROCESS: DEFAULTS.process_cold_s,
        Term.INIT: DEFAULTS.init_s,
        Term.WEIGHTS: DEFAULTS.weights_fixed_s + 4.0,
        Term.PREFILL: pytest.approx(DEFAULTS.prefill_fixed_s + 0.2),
    }


def test_same_model_on_the_same_node_is_believed_before_all_others() -> None:
    estimator = taught([start(seconds=3.0), start("m", "other", seconds=9.0), start("other", "n", seconds=6.0)])
    assert terms(estimator)[Term.PROCESS] == 3.0
    assert terms(estimator)[Term.INIT] == 3.0
    assert terms(estimator)[Term.WEIGHTS] == 3.0


def test_one_slow_start_hardly_speaks_against_its_node() -> None:
    estimator = taught([start(node="slow", seconds=9.0), *(start(node="other", seconds=3.0) for _ in range(4))])
    slow_s, other_s = (terms(estimator, node)[Term.INIT] for node in ("slow", "other"))
    assert pytest.approx(other_s) == 3.0
    assert slow_s == pytest.approx((9.0 + 2 * 3.0) / 3)
    for _ in range(8):
        estimator.observe_start(start(node="slow", seconds=9.0))
    assert terms(estimator, "slow")[Term.INIT] == pytest.approx(9.0)


def test_where_a_model_starts_on_one_node_alone_that_is_what_it_takes_there() -> None:
    estimator = taught([start(seconds=seconds) for seconds in (3.0, 4.0, 5.0)])
    assert terms(estimator)[Term.INIT] == terms(estimator, "another")[Term.INIT] == 4.0


def test_same_model_elsewhere_comes_before_another_model_here() -> None:
    estimator = taught([start("m", "other", seconds=9.0), start("other", "n", seconds=6.0)])
    assert terms(estimator)[Term.PROCESS] == 9.0
    assert terms(estimator)[Term.INIT] == 9.0


def test_another_model_here_comes_before_the_defaults() -> None:
    estimator = taught([start("other", "n", seconds=6.0)])
    assert terms(estimator)[Term.PROCESS] == 6.0
    assert terms(estimator)[Term.INIT] == 6.0


def test_warm_starts_say_nothing_about_cold_processes() -> None:
    estimator = taught([start(seconds=3.0, is_warm=True)])
    assert terms(estimator, is_warm=False)[Term.PROCESS] == DEFAULTS.process_cold_s


def test_one_start_of_ten_times_the_time_changes_nothing_and_a_lasting_change_is_followed() -> None:
    estimator = taught([start(seconds=3.0)] * 8)
    before = terms(estimator)
    for num_slow in range(1, 4):
        estimator.observe_start(start(seconds=30.0))
        assert (terms(estimator) == before) is (num_slow < 3)
    assert terms(estimator)[Term.INIT] == 30.0


# ----------------------------------------------------------------------------------------------------------- weights


def test_loads_of_other_models_here_tell_the_rate_and_the_fixed_part() -> None:
    sizes = [1_000_000_000, 4_000_000_000, 16_000_000_000]
    estimator = taught(start(f"o{size}", "n", seconds=1.0 + size / 1e9, nbytes=size) for size in sizes)
    assert estimator.weights_s(SPEC, "n", Tier.DISK) == pytest.approx(9.0)


def test_one_load_of_another_model_here_comes_before_what_the_node_measured() -> None:
    estimator = taught([start("other", "n", seconds=8.3, nbytes=4_000_000_000)])
    estimator.observe_hops("n", {Tier.DISK: 8e9, Tier.HOST: 80e9})
    assert estimator.weights_s(SPEC, "n", Tier.DISK) == pytest.approx(16.3)
    assert estimator.weights_s(SPEC, "n", Tier.HOST) == pytest.approx(0.4)


def test_a_load_that_was_never_seen_takes_no_longer_than_one_from_farther() -> None:
    estimator = taught([start(seconds=0.1, tier=Tier.REMOTE)])
    assert [terms(estimator, tier=tier)[Term.WEIGHTS] for tier in Tier] == pytest.approx([0.1, 0.1, 0.1])
    estimator.observe_start(start(seconds=0.3, tier=Tier.DISK))
    assert [terms(estimator, tier=tier)[Term.WEIGHTS] for tier in Tier] == pytest.approx([0.3, 0.3, 0.1])


def test_tiers_are_learned_apart() -> None:
    estimator = taught([start(seconds=3.0, tier=Tier.DISK), start(seconds=1.0, tier=Tier.HOST)])
    assert [estimator.weights_s(SPEC, "n", tier) for tier in (Tier.DISK, Tier.HOST)] == [3.0, 1.0]


def test_what_the_node_measured_comes_before_the_same_load_elsewhere() -> None:
    estimator = taught([start("m", "other", seconds=9.0)])
    assert estimator.weights_s(SPEC, "n", Tier.DISK) == 9.0
    estimator.observe_hops("n", {Tier.DISK: 8e9})
    assert estimator.weights_s(SPEC, "n", Tier.DISK) == pytest.approx(1.3)


def test_other_loads_elsewhere_come_before_the_default_rate() -> None:
    estimator = taught([start("other", "other", seconds=8.3, nbytes=4_000_000_000)])
    assert estimator.weights_s(SPEC, "n", Tier.DISK) == pytest.approx(16.3)


def test_a_size_that_nobody_knows_is_guessed() -> None:
    estimator = taught([start("other", "n", seconds=8.3, nbytes=0)])
    assert estimator.weights_s(ModelSpec("m"), "n", Tier.DISK) == pytest.approx(8.3)


def test_a_size_that_was_not_deployed_is_learned_from_starts() -> None:
    estimator = taught([start("m", "other", seconds=8.3, nbytes=4_000_000_000, tier=Tier.REMOTE)])
    assert estimator.weights_s(ModelSpec("m"), "n", Tier.DISK) == pytest.approx(2.3)


# ------------------------------------------------------------------------------------------------- prefill, stop, all


def test_prefill_is_a_line_of_the_tokens() -> None:
    estimator = Estimator()
    for tokens in (100, 1000, 2000, 4000):
        estimator.observe_prefill(PrefillSample("m", "n", tokens, 0.1 + tokens / 1000))
    estimator.observe_prefill(PrefillSample("m", "n", 3000, 60.0))
    assert estimator.prefill_s("m", "n", 8000) == pytest.approx(8.1)
    assert estimator.prefill_s("m", "other", 0) == pytest.approx(0.1)
    assert estimator.prefill_s("other", "n", 1000) == pytest.approx(1.1)


@on_any_machine
@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.floats(0, 100)), max_size=20),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_prefill_never_takes_less_for_more_tokens(samples: list[tuple[int, float]], few: int, more: int) -> None:
    estimator = Estimator()
    for tokens, seconds in samples:
        estimator.observe_prefill(PrefillSample("m", "n", tokens, seconds))
    assert 0 <= estimator.prefill_s("m", "n", few) <= estimator.prefill_s("m", "n", few + more)


def test_prefill_follows_what_came_last() -> None:
    estimator = Estimator()
    for round_s in (1.0, 2.0):
        for tokens in range(1000, 17_000, 1000):
            estimator.observe_prefill(PrefillSample("m", "n", tokens, round_s * tokens / 1000))
        assert estimator.prefill_s("m", "n", 5000) == pytest.approx(5 * round_s)


def test_stops_are_learned() -> None:
    estimator = Estimator()
    assert estimator.stop_s("m", "n") == DEFAULTS.stop_s
    estimator.observe_stop("m", "n", 1.5)
    assert [estimator.stop_s("m", "n"), estimator.stop_s("m", "other"), estimator.stop_s("other", "n")] == [1.5] * 3


def test_startup_is_what_the_models_starts_took_anywhere() -> None:
    estimator = Estimator(StartDefaults(process_warm_s=1.0, init_s=2.0, weights_fixed_s=0.5))
    assert estimator.startup_s(SPEC) == pytest.approx(7.5)
    assert estimator.startup_s(ModelSpec("m")) == pytest.approx(11.5)
    for node, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        estimator.observe_start(start(node=node, seconds=seconds))
    assert estimator.startup_s(SPEC) == 6.0


# ------------------------------------------------------------------------------------------------- rubbish and bounds


@every_case("seconds", [-1.0, float("nan"), float("inf"), 1e300])
def test_samples_that_can_not_be_are_passed_over(seconds: float) -> None:
    estimator = taught([start(seconds=seconds)])
    estimator.observe_stop("m", "n", seconds)
    estimator.observe_prefill(PrefillSample("m", "n", 100, seconds))
    estimator.observe_prefill(PrefillSample("m", "n", -100, 1.0))
    estimator.observe_hops("n", {Tier.DISK: seconds, Tier.HOST: 0.0})
    new = Estimator()
    assert terms(estimator) == terms(new)
    assert terms(estimator, tier=Tier.HOST) == terms(new, tier=Tier.HOST)
    assert estimator.stop_s("m", "n") == new.stop_s("m", "n")


def test_least_recently_used_is_forgotten() -> None:
    estimator = Estimator(keys_max=6)
    estimator.observe_stop("a", "n", 1.0)
    estimator.observe_stop("b", "n", 2.0)
    assert estimator.stop_s("a", "n") == 1.0  # used, so it outlives b
    estimator.observe_stop("c", "x", 4.0)
    assert estimator.stop_s("a", "n") == 1.0
    assert estimator.stop_s("b", "y") == estimator.stop_s("nobody", "y") == 2.0


@st.composite
def histories(draw: st.DrawFn) -> Estimator:
    names, estimator = st.sampled_from("abc"), Estimator()
    for _ in range(draw(st.integers(0, 12))):
        model, node, seconds = draw(names), draw(names), draw(st.floats(0, 100))
        nbytes, tier, is_warm = draw(st.integers(0, 10**11)), draw(st.sampled_from(Tier)), draw(st.booleans())
        estimator.observe_start(start(model, node, seconds=seconds, nbytes=nbytes, tier=tier, is_warm=is_warm))
        estimator.observe_prefill(PrefillSample(model, node, nbytes % 1000, seconds))
        estimator.observe_stop(model, node, seconds)
        estimator.observe_hops(node, {tier: seconds})
    return estimator


@on_any_machine
@given(histories())
def test_record_holds_all_that_was_learned(estimator: Estimator) -> None:
    record = json.dumps(estimator.to_record())
    restored = Estimator.from_record(json.loads(record))
    assert json.dumps(restored.to_record()) == record
    for model in "abcd":
        spec = ModelSpec(model)
        assert restored.startup_s(spec) == estimator.startup_s(spec)
        for node in "abcd":
            assert restored.stop_s(model, node) == estimator.stop_s(model, node)
            for tier in Tier:
                estimates = [
                    e.estimate_start(spec, node, tier, is_warm=True, prompt_tokens=50) for e in (restored, estimator)
                ]
                assert estimates[0] == estimates[1]


def test_record_is_bounded_and_keeps_the_most_recent() -> None:
    estimator = Estimator()
    for index in range(RECORD_KEYS_MAX):
        estimator.observe_stop(f"m{index}", "n", 1.0)
    tables: Any = estimator.to_record()["tables"]
    assert len(tables["stop"]) == RECORD_KEYS_MAX
    assert tables["stop"][-2:] == [[None, "n", [1.0] * 8], [None, None, [1.0] * 8]]


def test_record_of_a_larger_estimator_is_cut() -> None:
    estimator = Estimator()
    for model in "abc":
        estimator.observe_stop(model, "n", 1.0)
    restored = Estimator.from_record(estimator.to_record(), keys_max=2)
    tables: Any = restored.to_record()["tables"]
    assert [row[:2] for row in tables["stop"]] == [[None, "n"], [None, None]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["m", "n", "version", "tables", "stop"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["version", "tables"]), inner),
    max_leaves=8,
)


@on_any_machine
@given(JSON)
def test_rubbish_is_no_record(record: object) -> None:
    assert terms(Estimator.from_record(record)) == terms(Estimator())


@pytest.mark.parametrize(
    "table",
    ["stop", "prefill", "hop_disk", "nbytes", "weights_line_disk"],
)
@on_any_machine
@given(samples=JSON)
def test_rubbish_in_a_table_is_passed_over(table: str, samples: object) -> None:
    rows: list[object] = [["m", "n", samples], ["m", None, samples], [None, "n", samples], ["m"], [1, 2, []], samples]
    estimator = Estimator.from_record({"version": 1, "tables": {table: rows, "stop ": rows}})
    for spec in (SPEC, ModelSpec("m")):
        assert all(
            0 <= value < float("inf")
            for value in estimator.estimate_start(spec, "n", Tier.DISK, is_warm=True).terms.values()
        )
    assert 0 <= estimator.stop_s("m", "n") < float("inf")


def test_sound_samples_beside_rubbish_are_kept() -> None:
    rows = [["m", "n", [True, "x", -1.0, 2.5, float("nan"), None]], 7]
    points = [["m", "n", [[1000, 1.05], [1.5, 2.0], [1], "x", [True, False], [2000, -1]]]]
    estimator = Estimator.from_record({"version": 1, "tables": {"stop": rows, "prefill": points}})
    assert estimator.stop_s("m", "n") == 2.5
    assert estimator.prefill_s("m", "n", 2000) == pytest.approx(2.05)
