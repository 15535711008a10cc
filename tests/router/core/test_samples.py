"""How samples are believed: the weighted median of numbers, the line through points; what lies leads nowhere."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm_vllm.router.core.estimator import POINTS_MAX, SAMPLE_WEIGHTS, fit_line, weighted_median
from tests.support.cases import every_case

on_any_machine = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SECONDS = st.floats(0, 1e4)


# ------------------------------------------------------------------------------------------------------------ median


@on_any_machine
@given(st.lists(SECONDS, min_size=1, max_size=20))
def test_median_is_one_of_the_newest_samples(samples: list[float]) -> None:
    assert weighted_median(samples) in samples[-len(SAMPLE_WEIGHTS) :]


@on_any_machine
@given(st.lists(st.floats(9, 11), min_size=2, max_size=8), SECONDS, st.data())
def test_one_strange_sample_among_three_leaves_the_median_among_the_others(
    samples: list[float], strange: float, data: st.DataObject
) -> None:
    samples.insert(data.draw(st.integers(0, len(samples))), strange)
    assert 9 <= weighted_median(samples) <= 11


@every_case("num_before", list(range(1, 12)))
def test_one_slow_sample_never_moves_the_median(num_before: int) -> None:
    assert weighted_median([5.0] * num_before + [50.0]) == 5.0


@every_case("new", [0.5, 50.0])
@every_case("num_before", list(range(6, 12)))
def test_two_strange_samples_do_not_move_a_full_median_and_three_do(num_before: int, new: float) -> None:
    assert weighted_median([5.0] * num_before + [new] * 2) == 5.0
    assert weighted_median([5.0] * num_before + [new] * 3) == new


# -------------------------------------------------------------------------------------------------------------- line


@on_any_machine
@given(
    slope=st.floats(0, 0.01),
    offset=st.floats(0, 2),
    strange=st.dictionaries(st.integers(0, POINTS_MAX - 1), st.floats(0, 1e3), max_size=4),
)
def test_line_is_found_although_four_of_sixteen_points_lie(
    slope: float, offset: float, strange: dict[int, float]
) -> None:
    xs = [2000 * (index + 1) for index in range(POINTS_MAX)]  # neighbours are too near to each other to count
    points = [(x, strange.get(index, slope * x + offset)) for index, x in enumerate(xs)]
    found_slope, found_offset = fit_line(points, guess=(0.0, 0.0))
    assert found_slope == pytest.approx(slope, abs=1e-9)
    assert found_offset == pytest.approx(offset, abs=1e-4)


@on_any_machine
@given(st.lists(st.tuples(st.integers(0, 10**6), SECONDS), min_size=1, max_size=POINTS_MAX), st.floats(0, 10))
def test_line_never_falls_and_is_never_negative(points: list[tuple[int, float]], fixed: float) -> None:
    slope, offset = fit_line(points, guess=(0.0, fixed))
    assert slope >= 0
    assert offset >= 0


def test_points_at_one_place_are_taken_as_proportional_above_the_fixed_part() -> None:
    assert fit_line([(1000, 1.5), (1001, 1.5), (1000, 9.0)], guess=(7.0, 0.5)) == pytest.approx((0.001, 0.5), rel=1e-2)


def test_points_that_the_fixed_part_explains_say_nothing_of_the_slope() -> None:
    assert fit_line([(1000, 0.2), (1001, 0.3), (1000, 0.2)], guess=(1e-5, 0.5)) == pytest.approx((1e-5, 0.19))


def test_points_at_nought_are_an_offset() -> None:
    assert fit_line([(0, 1.0), (0, 2.0), (0, 9.0)], guess=(0.25, 0.5)) == (0.25, 2.0)


def test_line_that_would_begin_below_nought_goes_through_it() -> None:
    assert fit_line([(1000, 0.0), (2000, 1.0), (3000, 2.0)], guess=(0.0, 0.0)) == (0.0005, 0.0)
