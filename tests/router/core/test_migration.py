"""One migration's decisions: rounds that shrink, the switch, and every way it ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.router.core.migration import (
    AskSource,
    Fill,
    Filled,
    GiveUp,
    Migration,
    MigrationAction,
    MigrationEvent,
    MigrationLimits,
    Phase,
    Refused,
    SourceEnded,
    SourceTold,
    Switch,
    TakeOver,
    WentOn,
)

BLOCK = 16
LONGEST = 8192


def migration(**limits: float) -> Migration:
    return Migration(MigrationLimits(**limits), block_tokens=BLOCK, model_tokens_max=LONGEST)  # type: ignore[arg-type]


def told(num_prompt: int, *num_outputs: int) -> SourceTold:
    return SourceTold(num_prompt, num_outputs)


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


def test_choices_share_their_prompt() -> None:
    assert run(migration(), told(100, 10, 20)) == [Fill((110, 120), num_new=130)]


def test_a_choice_that_ends_meanwhile_leaves_the_others_with_the_prompt() -> None:
    assert run(migration(), told(100, 10, 20), Filled(1.0), told(100, 60)) == [Fill((160,), num_new=60)]


@pytest.mark.parametrize(
    ("event", "reason", "is_lasting"),
    [
        (told(LONGEST - 5, 5), f"{LONGEST} tokens fill the target's context", True),
        (told(100), "every choice has ended", False),
        (Refused("it has media", is_lasting=True), "it has media", True),
        (Refused("no answer"), "no answer", False),
        (SourceEnded(), "its source was done first", False),
    ],
)
def test_it_is_given_up(event: MigrationEvent, reason: str, is_lasting: bool) -> None:
    one = migration()
    assert run(one, event) == [GiveUp(reason, is_lasting)]
    assert one.phase is Phase.ENDED


def test_the_target_takes_over_once_it_has_gone_on() -> None:
    one = migration()
    assert run(one, told(3, 2), WentOn()) == [TakeOver()]
    assert one.phase is Phase.MOVED


def test_a_target_that_fails_at_the_switch_changes_nothing() -> None:
    one = migration()
    assert run(one, told(3, 2), Refused("queue full")) == [GiveUp("queue full", is_lasting=False)]


@pytest.mark.parametrize("ending", [[told(3, 2), WentOn()], [Refused("no")]])
def test_nothing_follows_its_end(ending: Sequence[MigrationEvent]) -> None:
    one = migration()
    run(one, *ending)
    for event in (told(3, 2), Filled(1.0), WentOn(), Refused("no"), SourceEnded()):
        assert one.handle(event) == []


@given(
    prompt=st.integers(1, 4000),
    start=st.integers(0, 200),
    grown=st.lists(st.integers(0, 300), min_size=8, max_size=8),
    most=st.integers(16, 4096),
)
def test_rounds_are_bounded_and_never_compute_twice(prompt: int, start: int, grown: list[int], most: int) -> None:
    one = migration(round_tokens_max=most, rounds_max=5)
    actions, output, asked, filled = one.begin(), start, 0, 0
    while actions != [Switch()] and one.phase is not Phase.ENDED:
        (action,) = actions
        if isinstance(action, AskSource):
            asked += 1
            actions = one.handle(told(prompt, output))
        else:
            assert isinstance(action, Fill)
            assert action.num_new <= most
            filled += action.num_new
            output += grown[min(asked, 7)]
            actions = one.handle(Filled(0.1))
    assert one.num_rounds <= 5
    assert filled == one.num_filled <= prompt + output
