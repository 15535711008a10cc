"""The front end's half: replayed outputs come first and one by one, and the core gets what it needs."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sllm_vllm.engine.replay import HeldOutputs, hand_to_core
from sllm_vllm.engine.resume import RESUME_KEY, OwnedChoice, handed_over
from tests.support.cases import every_case


@dataclass
class Output:
    """Stands in for a RequestOutput: what was merged into it."""

    tokens: list[int]

    def add(self, other: Output, aggregate: bool) -> None:
        assert aggregate
        self.tokens += other.tokens


class Collector:
    """Stands in for vLLM's collector, which merges whatever is not fetched in time."""

    aggregate = True

    def __init__(self) -> None:
        self.output: Output | None = None

    def put(self, output: Output) -> None:
        if self.output is None:
            self.output = output
        else:
            self.output.add(output, aggregate=True)

    def get_nowait(self) -> Output | None:
        output, self.output = self.output, None
        return output

    async def get(self) -> Output:
        assert self.output is not None
        found = self.get_nowait()
        assert found is not None
        return found


@every_case("step, seen", [(1, [[0], [1], [2], [3], [4]]), (2, [[0, 1], [2, 3], [4]]), (0, [[0, 1, 2, 3, 4]])])
async def test_replayed_outputs_come_first_in_their_steps(step: int, seen: list[list[int]]) -> None:
    collector = Collector()
    held = HeldOutputs(collector, step)
    with held.collecting():
        for token in range(5):
            collector.put(Output([token]))
    for token in (10, 11):
        collector.put(Output([token]))  # the engine's, merged as ever
    found = []
    while (output := collector.get_nowait() or (collector.output and await collector.get())) is not None:
        found.append(output.tokens)
    assert found == [*seen, [10, 11]]


async def test_choices_are_replayed_one_after_the_other() -> None:
    collector = Collector()
    held = HeldOutputs(collector, 2)
    for first in (0, 10):
        with held.collecting():
            for token in range(first, first + 3):
                collector.put(Output([token]))
    found = [await collector.get() for _ in range(4)]
    assert [output.tokens for output in found] == [[0, 1], [2], [10, 11], [12]]


async def test_others_have_their_turn_between_replayed_outputs() -> None:
    collector, turns = Collector(), 0
    held = HeldOutputs(collector, 1)
    with held.collecting():
        for token in range(5):
            collector.put(Output([token]))

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        other = group.create_task(take_turns())
        seen = [(collector.get_nowait() or await collector.get(), turns) for _ in range(5)]
        other.cancel()
    assert [before for _, before in seen] == [1, 2, 3, 4, 5]


@dataclass
class Params:
    """Stands in for SamplingParams."""

    extra_args: dict[str, Any] | None = None
    max_tokens: int = 50
    min_tokens: int = 5
    other: list[int] = field(default_factory=list)


def test_the_core_gets_the_tokens_and_nothing_else() -> None:
    shared = Params({RESUME_KEY: "all of it", "mine": 1})
    request = SimpleNamespace(sampling_params=shared)
    hand_to_core(request, OwnedChoice((5, 6), (((5, -1.0, 1, "a"),), ((6, -1.0, 1, "b"),))), is_open=True)
    assert request.sampling_params.extra_args == {RESUME_KEY: handed_over([5, 6]), "mine": 1}
    assert request.sampling_params.max_tokens == 50
    assert shared.extra_args == {RESUME_KEY: "all of it", "mine": 1}  # other choices of the request have it, too


def test_a_choice_that_has_ended_costs_the_core_one_token() -> None:
    shared = Params({RESUME_KEY: "all of it"})
    before = copy.deepcopy(shared)
    request = SimpleNamespace(sampling_params=shared)
    hand_to_core(request, OwnedChoice((5, 6), None, "stop"), is_open=False)
    assert request.sampling_params.extra_args is None
    assert (request.sampling_params.max_tokens, request.sampling_params.min_tokens) == (1, 0)
    assert shared == before


def test_nothing_owned_is_nothing_handed_over() -> None:
    request = SimpleNamespace(sampling_params=Params({RESUME_KEY: "{}"}))
    hand_to_core(request, OwnedChoice(()), is_open=True)
    assert request.sampling_params.extra_args is None
