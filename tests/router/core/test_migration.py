"""One migration's decisions: rounds that shrink, the switch, and every way it ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.router.core.migration import (
    WAITS_MAX,
    AskSource,
    Fill,
    Filled,
    GiveUp,
    Migration,
    MigrationAction,
    MigrationEvent,
    MigrationLimits,
    MigrationPhase,
    SideFailed,
    SourceEnded,
    SourceTold,
    Switch,
    TakeOver,
    WentOn,
)
from tests.support.cases import every_case

BLOCK = 16
LONGEST = 8192


def migration(**limits: float) -> Migration:
    return Migration(MigrationLimits(**limits), block_tokens=BLOCK, model_tokens_max=LONGEST)  # type: ignore[arg-type]


def told(num_prompt: int, *num_outputs: int, at_s: float = 0.0) -> SourceTold:
    return SourceTold(num_prompt, num_outputs, at_s)


def run(one: Migration, *events: MigrationEvent) -> list[MigrationAction]:
    """What the last of them brings."""
    actions = one.begin()
    for event in events:
        actions = one.handle(event)
    return actions


def test_it_begins_by_asking_the_source() -> None:
    assert migration().begin() == [AskSource()]


def test_the_first_round_is_prompt_and_output_so_far() -> None:
    assert run(migration(), told(100, 40)) == [Fill((140,), num_new=140)]


def test_a_later_round_is_only_what_is_new() -> None:
    assert run(migration(), told(100, 40), Filled(1.0), told(100, 90)) == [Fill((190,), num_new=50)]


def test_what_makes_no_block_whole_is_computed_at_the_switch() -> None:
    assert run(migration(), told(10, 5)) == [Switch()]
    assert run(migration(), told(10, 6)) == [Fill((16,), num_new=16)]
    assert run(migration(), told(10, 6), Filled(1.0), told(10, 21)) == [Switch()]
    assert run(migration(), told(10, 6), Filled(1.0), told(10, 22)) == [Switch()], "a round of 16 made 16 more"


def test_rounds_end_when_the_source_generates_as_fast_as_the_target_computes() -> None:
    """Else they would go on for ever."""
    one = migration()
    assert run(one, told(1000, 40), Filled(9.0), told(1000, 100), Filled(9.0), told(1000, 170)) == [Switch()]
    assert one.num_rounds == 2


def test_there_is_a_last_round() -> None:
    one = migration(rounds_max=2)
    assert run(one, told(1000, 0), Filled(1.0), told(1000, 900), Filled(1.0), told(1000, 1300)) == [Switch()]
    assert one.num_rounds == 2


def test_a_long_round_is_cut_and_spares_others_between() -> None:
    one = migration(round_tokens_max=64, round_pause_s=0.5)
    assert run(one, told(150, 0)) == [Fill((64,), num_new=64)]
    assert one.handle(Filled(1.0)) == [Fill((128,), num_new=64, after_s=0.5)]
    assert one.handle(Filled(1.0)) == [Fill((150,), num_new=22, after_s=0.5)]
    assert one.handle(Filled(1.0)) == [AskSource(0.5)]
    assert (one.num_rounds, one.num_filled) == (1, 150)


# The target takes 0.01 s a token in the first round, the source 0.1 s: ten tokens more meanwhile, in blocks of 16.
SLOW = (told(100, 0, at_s=0.0), Filled(1.0), told(100, 10, at_s=1.0))


def test_the_end_of_a_block_is_waited_for_if_the_target_is_slow_to_compute_an_open_one() -> None:
    """14 tokens of an open block take it longer than a token takes the source; after the wait it is one."""
    one = migration()
    (wait,) = run(one, *SLOW)  # 110 tokens; the block ends at 112
    assert isinstance(wait, AskSource)
    assert wait.after_s == pytest.approx(0.2)
    assert one.handle(told(100, 13, at_s=1.3)) == [Fill((113,), num_new=13)]
    assert one.handle(Filled(0.1)) == [AskSource()]
    assert one.handle(told(100, 14, at_s=1.4)) == [Switch()]


def test_a_block_is_waited_for_once() -> None:
    """What the source generates during the last round is as little as it gets."""
    one = migration()
    run(one, *SLOW, told(100, 13, at_s=1.3), Filled(0.8))
    assert one.handle(told(100, 21, at_s=2.1)) == [Switch()]


def test_an_open_block_that_nobody_notices_is_not_waited_for() -> None:
    """14 tokens at 1 ms are less than a quarter of the 100 ms that the source takes for one."""
    assert run(migration(), told(100, 0, at_s=0.0), Filled(0.1), told(100, 10, at_s=1.0)) == [Switch()]


@every_case(
    "events",
    [
        (told(100, 0, 0, at_s=0.0), Filled(1.0), told(100, 10, 10, at_s=1.0)),
        (told(100, 0, at_s=0.0), Filled(1.0), told(100, 0, at_s=1.0)),
    ],
)
def test_whose_block_does_not_end_alike_or_at_all_is_not_waited_for(events: Sequence[MigrationEvent]) -> None:
    assert run(migration(), *events) == [Switch()]


def test_a_source_that_stops_is_not_waited_for_long() -> None:
    one = migration()
    actions = run(one, *SLOW)
    for _ in range(WAITS_MAX - 1):
        assert [type(action) for action in actions] == [AskSource]
        actions = one.handle(told(100, 11, at_s=2.0))
    assert [type(action) for action in actions] == [AskSource]
    assert one.handle(told(100, 11, at_s=2.0)) == [Switch()]


def test_rounds_that_were_all_made_are_not_waited_beyond() -> None:
    assert run(migration(rounds_max=1), *SLOW) == [Switch()]


def test_choices_share_their_prompt() -> None:
    assert run(migration(), told(100, 10, 20)) == [Fill((110, 120), num_new=130)]


def test_a_choice_that_ends_meanwhile_leaves_the_others_with_the_prompt() -> None:
    assert run(migration(), told(100, 10, 20), Filled(1.0), told(100, 60)) == [Fill((160,), num_new=60)]


@every_case(
    "event, reason, is_lasting",
    [
        (told(LONGEST - 5, 5), f"{LONGEST} tokens fill the target's context", True),
        (told(100), "every choice has ended", False),
        (SideFailed("it has media", is_lasting=True), "it has media", True),
        (SideFailed("no answer"), "no answer", False),
        (SourceEnded(), "its source was done first", False),
    ],
)
def test_it_is_given_up(event: MigrationEvent, reason: str, is_lasting: bool) -> None:
    one = migration()
    assert run(one, event) == [GiveUp(reason, is_lasting)]
    assert one.phase is MigrationPhase.ENDED


def test_the_target_takes_over_once_it_has_gone_on() -> None:
    one = migration()
    assert run(one, told(3, 2), WentOn()) == [TakeOver()]
    assert one.phase is MigrationPhase.MOVED


def test_a_target_that_fails_at_the_switch_changes_nothing() -> None:
    one = migration()
    assert run(one, told(3, 2), SideFailed("queue full")) == [GiveUp("queue full", is_lasting=False)]


@every_case("ending", [[told(3, 2), WentOn()], [SideFailed("no")]])
def test_nothing_follows_its_end(ending: Sequence[MigrationEvent]) -> None:
    one = migration()
    run(one, *ending)
    for event in (told(3, 2), Filled(1.0), WentOn(), SideFailed("no"), SourceEnded()):
        assert one.handle(event) == []


@given(
    prompt=st.integers(1, 4000),
    start=st.integers(0, 200),
    grown=st.lists(st.integers(0, 300), min_size=8, max_size=8),
    most=st.integers(16, 4096),
    token_s=st.sampled_from([0.0, 0.001, 0.1]),
)
def test_rounds_are_bounded_and_never_compute_twice(
    prompt: int, start: int, grown: list[int], most: int, token_s: float
) -> None:
    one = migration(round_tokens_max=most, rounds_max=5)
    actions, output, asked, filled = one.begin(), start, 0, 0
    while actions != [Switch()] and one.phase is not MigrationPhase.ENDED:
        (action,) = actions
        if isinstance(action, AskSource):
            asked += 1
            assert asked <= 1 + 5 + WAITS_MAX
            output += round(action.after_s / token_s) if token_s else 0
            actions = one.handle(told(prompt, output, at_s=output * token_s))
        else:
            assert isinstance(action, Fill)
            assert action.num_new <= most
            filled += action.num_new
            output += grown[min(asked, 7)]
            actions = one.handle(Filled(0.1))
    assert one.num_rounds <= 5
    assert filled == one.num_filled <= prompt + output
