"""Waiting for a warm parent against starting cold beside it, by what imports and cold starts took here before."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.node.core.parent_wait import IMPORT_S, ParentForecast
from tests.support.cases import every_case


def learned(*, imports: tuple[float, ...] = (), cold: tuple[float, ...] = (), num_cpus: int = 2) -> ParentForecast:
    forecast = ParentForecast(num_cpus)
    for seconds in imports:
        forecast.note_import(seconds)
    for seconds in cold:
        forecast.note_cold(seconds)
    return forecast


def test_a_start_right_after_the_agents_waits_as_the_parent_is_sooner() -> None:
    """The order to fix: the parent was ready after 50 s, the cold start beside it after 117 s."""
    forecast = learned(imports=(50.0,), cold=(67.0,))
    assert forecast.ready_in_s(2.0) == 48.0
    assert forecast.cold_s(2.0) == 67.0 + 48.0
    assert forecast.wait_s(2.0, wait_s_max=120.0) == 115.0


@every_case("importing_s", [0.0, 10.0, 29.0])
def test_before_anything_was_seen_it_waits(importing_s: float) -> None:
    assert learned().wait_s(importing_s, wait_s_max=120.0) > 0


def test_a_cold_start_that_is_known_to_be_sooner_begins_at_once() -> None:
    assert learned(imports=(60.0,), cold=(20.0,), num_cpus=16).wait_s(5.0, wait_s_max=120.0) == 0
    assert learned(imports=(60.0,), cold=(20.0,), num_cpus=16).wait_s(50.0, wait_s_max=120.0) > 0


def test_on_few_processors_a_cold_start_beside_the_parent_is_priced_with_what_the_parent_takes() -> None:
    few, many = (learned(imports=(50.0,), cold=(40.0,), num_cpus=num) for num in (2, 16))
    assert (few.cold_s(10.0), many.cold_s(10.0)) == (80.0, 40.0)
    assert few.wait_s(10.0, wait_s_max=120.0) > 0
    assert many.wait_s(10.0, wait_s_max=120.0) == 0


def test_a_parent_that_is_very_late_is_not_waited_for() -> None:
    forecast = learned(imports=(20.0,), cold=(60.0,))
    assert forecast.wait_s(25.0, wait_s_max=120.0) > 0
    assert learned(imports=(20.0,), cold=(60.0,), num_cpus=16).wait_s(100.0, wait_s_max=120.0) == 0


def test_an_operators_limit_counts() -> None:
    assert learned().wait_s(0.0, wait_s_max=0.0) == 0
    assert learned().wait_s(0.0, wait_s_max=7.0) == 7.0


def test_one_strange_import_changes_nothing() -> None:
    assert learned(imports=(30.0, 500.0, 31.0)).ready_in_s(0.0) == 31.0


def test_what_was_learned_comes_back_from_json() -> None:
    forecast = learned(imports=(41.0, 43.0), cold=(99.0,))
    again = ParentForecast(2)
    again.restore(json.loads(json.dumps(forecast.to_record())))
    assert again.to_record() == forecast.to_record()


NUMBERS = st.none() | st.text() | st.booleans() | st.floats() | st.integers()


@given(st.dictionaries(st.sampled_from(["version", "import_s", "cold_s"]), st.just(1) | st.lists(NUMBERS)) | NUMBERS)
def test_no_record_breaks_it(record: object) -> None:
    forecast = ParentForecast(2)
    forecast.restore(record)
    assert 0 <= forecast.ready_in_s(0.0) < 1e6
    assert 0 <= forecast.wait_s(IMPORT_S, wait_s_max=120.0) <= 120.0
