"""When a read or write of a device may begin."""

from __future__ import annotations

import pytest

from sllm_vllm.store.core.schedule import IoSchedule, Urgency
from tests.support.cases import every_case

LOAD, FILL, WRITE = Urgency


def schedule(readers: int = 2, writers: int = 1, *, pauses: bool = True) -> IoSchedule:
    return IoSchedule(readers, writers, starve_s=10.0, pauses=pauses)


def queued(jobs: dict[int, Urgency], *, readers: int = 2, pauses: bool = True) -> IoSchedule:
    """With these jobs added at 0 s."""
    result = schedule(readers, pauses=pauses)
    for job, urgency in jobs.items():
        result.add(job, urgency, 0.0)
    return result


def test_loads_begin_in_order_as_far_as_there_are_readers() -> None:
    assert queued({3: LOAD, 1: LOAD, 2: LOAD}).take(0.0) == [3, 1]


def test_the_next_load_begins_when_one_is_finished() -> None:
    io = queued({1: LOAD, 2: LOAD, 3: LOAD})
    io.take(0.0)
    io.finished(1, 1.0)
    assert io.take(1.0) == [3]
    io.validate()


def test_fills_and_writes_begin_when_no_load_is_there() -> None:
    assert queued({1: FILL, 2: WRITE, 3: FILL, 4: WRITE}).take(0.0) == [1, 3, 2]


def test_a_running_load_pauses_fills_and_writes() -> None:
    io = queued({1: LOAD, 2: FILL, 3: WRITE})
    assert io.take(0.0) == [1]
    assert io.take(9.9) == []


def test_fills_and_writes_go_on_when_the_last_load_is_finished() -> None:
    io = queued({1: LOAD, 2: FILL, 3: WRITE})
    io.take(0.0)
    io.finished(1, 1.0)
    assert io.take(1.0) == [2, 3]


def test_one_of_each_starved_kind_begins_beside_loads() -> None:
    io = queued({1: LOAD, 2: FILL, 3: FILL, 4: WRITE, 5: WRITE})
    io.take(0.0)
    assert io.take(10.0) == [2, 4]
    assert io.take(19.9) == []


def test_a_starved_fill_begins_before_queued_loads() -> None:
    io = queued({1: LOAD, 2: LOAD, 3: FILL}, readers=1)
    io.take(0.0)
    assert io.take(11.0) == [], "no reader is free"
    io.finished(1, 12.0)
    assert io.take(12.0) == [3]


def test_a_kind_starves_from_when_it_was_queued() -> None:
    io = queued({1: LOAD})
    io.take(0.0)
    io.add(2, FILL, 50.0)
    assert io.take(50.0) == []
    assert io.take(60.0) == [2]


def test_without_pauses_fills_and_writes_begin_beside_loads() -> None:
    assert queued({1: FILL, 2: LOAD, 3: WRITE}, pauses=False).take(0.0) == [2, 1, 3]


def test_without_pauses_loads_come_first_nevertheless() -> None:
    assert queued({1: FILL, 2: LOAD}, readers=1, pauses=False).take(0.0) == [2]


def test_a_promoted_fill_is_the_last_load() -> None:
    io = queued({1: FILL, 2: LOAD, 3: LOAD}, readers=3)
    io.promote(1)
    assert io.take(0.0) == [2, 3, 1]


@every_case("job", [1, 2, 3, 9])
def test_a_promotion_of_another_job_changes_nothing(job: int) -> None:
    io = queued({1: FILL})
    io.take(0.0)
    io.add(2, LOAD, 0.0)
    io.add(3, WRITE, 0.0)
    io.promote(job)
    assert io.take(0.0) == [2]


def test_a_cancelled_job_does_not_begin() -> None:
    io = queued({1: LOAD, 2: FILL})
    assert io.cancel(1)
    assert io.take(0.0) == [2]


def test_a_running_job_is_not_cancelled() -> None:
    io = queued({1: LOAD})
    io.take(0.0)
    assert not io.cancel(1)
    io.finished(1, 1.0)


def test_no_timer_is_needed_while_nothing_is_paused() -> None:
    io = queued({1: FILL, 2: WRITE, 3: WRITE})
    io.take(0.0)
    assert io.wakeup_s(0.0) is None


def test_a_timer_is_needed_until_a_paused_kind_starves() -> None:
    io = queued({1: LOAD, 2: FILL})
    io.take(0.0)
    assert io.wakeup_s(4.0) == 6.0
    assert io.wakeup_s(14.0) == 0.0


def test_no_timer_is_needed_while_all_readers_are_busy() -> None:
    io = queued({1: LOAD, 2: FILL}, readers=1)
    io.take(0.0)
    assert io.wakeup_s(4.0) is None


def test_a_number_in_use_is_a_programmers_error() -> None:
    io = queued({1: LOAD})
    with pytest.raises(AssertionError):
        io.add(1, FILL, 0.0)


def test_a_clock_that_goes_back_is_a_programmers_error() -> None:
    io = queued({1: LOAD})
    with pytest.raises(AssertionError, match="went back"):
        io.take(-1.0)


def test_validate_sees_a_schedule_that_holds() -> None:
    io = queued({1: LOAD, 2: FILL, 3: WRITE})
    io.validate()
    io.take(0.0)
    io.validate()
