"""The table of a replica's life: what can be reached, what can't end, and the diagram that is drawn from it."""

from __future__ import annotations

from pathlib import Path

from sllm_vllm.node.core.replica import ENDED, HOLDING, LIFE, STARTED_ONCE, Do, Kind, State, diagram
from tests.support.cases import every_case

DESIGN = Path(__file__).resolve().parents[3] / "sllm_vllm" / "node" / "DESIGN.md"
BEGIN, END = "<!-- life-cycle: begin -->", "<!-- life-cycle: end -->"


def reachable(start: State) -> set[State]:
    found, new = {start}, [start]
    while new:
        state = new.pop()
        more = {transition.to for (source, _), transition in LIFE.items() if source is state} - found
        found |= more
        new += more
    return found


def test_every_state_is_reached() -> None:
    assert reachable(State.WAITING) == set(State)


@every_case("state", [state for state in State if state not in ENDED])
def test_every_state_can_end_both_ways(state: State) -> None:
    assert reachable(state) >= ENDED


def test_what_ended_stays_so() -> None:
    assert not [state for state, _ in LIFE if state in ENDED]


@every_case("state", [state for state in State if state in HOLDING])
def test_whoever_holds_slots_ends_only_when_its_process_is_gone(state: State) -> None:
    ends = {kind for (source, kind), transition in LIFE.items() if source is state and transition.to in ENDED}
    assert ends == ({Kind.GONE, Kind.GONE_AT_FAULT} if state is State.STOPPING else {Kind.GONE})


@every_case("state", [state for state in State if state in HOLDING - {State.STOPPING}])
def test_whoever_has_slots_can_be_stopped(state: State) -> None:
    assert LIFE[state, Kind.STOP_ASKED] == (State.STOPPING, Do.TERMINATE)


@every_case("state", [state for state in State if state in STARTED_ONCE])
def test_an_engine_that_ends_by_itself_has_failed(state: State) -> None:
    assert LIFE[state, Kind.GONE].to is State.FAILED


def test_every_kind_is_used() -> None:
    assert {kind for _, kind in LIFE} == set(Kind)


def test_the_diagram_has_every_pair_of_states_once() -> None:
    arrows = [line.split(":")[0].split() for line in diagram().splitlines()[2:]]
    pairs = [(source, to) for source, _, to in arrows if to != "[*]"]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {(state.name, transition.to.name) for (state, _), transition in LIFE.items()}


def test_the_diagram_in_the_design_page_is_not_stale() -> None:
    drawn = DESIGN.read_text().partition(BEGIN)[2].partition(END)[0]
    expected = f"\n```mermaid\n{diagram()}\n```\n"
    assert drawn == expected, f"put this between the markers of {DESIGN.name}:{expected}"
