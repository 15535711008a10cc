"""The core's half: a request is born with what it owns if that is sound, and its grammar is where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sllm_vllm.engine.core_hooks import hook_core, hook_grammars, hook_requests
from sllm_vllm.engine.hook_points import HookPoints
from sllm_vllm.engine.resume import RESUME_KEY, ResumeRefused, handed_over
from tests.support.cases import every_case


@dataclass
class Record:
    """Stands in for vLLM's StructuredOutputRequest."""

    grammar: Any = None
    reasoning_ended: bool | None = None
    reasoner: Any = None


@dataclass
class Seen:
    """What the manager was asked, as it saw the request then."""

    steps: list[tuple[list[int], list[int]]] = field(default_factory=list)


def hooked(refused: int | None = None) -> Any:
    """A module with a manager that notes what it accepts; token 9 ends the reasoning."""

    class StructuredOutputManager:
        def __init__(self) -> None:
            self.seen = Seen()

        def _create_grammar(self, request: Any) -> str:
            del request
            return "grammar"

        def accept_tokens(self, request: Any, new_token_ids: list[int]) -> bool:
            record = request.structured_output_request
            assert record.grammar == "grammar"
            self.seen.steps.append((list(request.all_token_ids), list(new_token_ids)))
            record.reasoning_ended = record.reasoning_ended or 9 in new_token_ids
            return refused not in new_token_ids

    module: Any = ModuleType("structured_output")
    module.StructuredOutputManager = StructuredOutputManager
    hook_grammars(module)
    return module.StructuredOutputManager()


def request_owning(*tokens: int, prompt: Sequence[int] = (1, 2)) -> Any:
    return SimpleNamespace(
        request_id="r",
        prompt_token_ids=list(prompt),
        output_token_ids=list(tokens),
        num_output_tokens=len(tokens),
        structured_output_request=Record(),
    )


def test_owned_tokens_are_accepted_one_by_one_as_at_the_source() -> None:
    manager, request = hooked(), request_owning(7, 9, 8)
    assert manager._create_grammar(request) == "grammar"
    assert manager.seen.steps == [([1, 2, 7], [7]), ([1, 2, 7, 9], [9]), ([1, 2, 7, 9, 8], [8])]
    assert request.structured_output_request == Record(None, True)  # not ready before all are accepted


def test_a_request_that_owns_nothing_is_left_alone() -> None:
    manager, request = hooked(), request_owning()
    assert manager._create_grammar(request) == "grammar"
    assert manager.seen.steps == []


def test_tokens_the_grammar_refuses_fail_the_request() -> None:
    with pytest.raises(ValueError, match="refuses token 7"):
        hooked(refused=7)._create_grammar(request_owning(5, 7, 8))


def test_a_core_tells_its_problems() -> None:
    points = HookPoints()
    points.problems.append("one")
    module: Any = ModuleType("core")
    module.EngineCore = type("EngineCore", (), {"preprocess_add_request": lambda self, request: request})
    hook_core(module, points)
    assert module.EngineCore().sllm_hook_problems() == ["one"]


class Tokens(list[int]):
    """Stands in for vLLM's Request: what was appended to it."""

    num_preemptions = 0

    @classmethod
    def from_engine_core_request(cls, request: Any, block_hasher: Any) -> Tokens:
        del request, block_hasher
        return cls()

    def append_output_token_ids(self, token_ids: list[int]) -> None:
        self += token_ids


def core(points: HookPoints, **config: Any) -> Any:
    """An engine core, hooked, of a model with 100 tokens and a length of 20."""
    requests: Any = ModuleType("request")
    requests.Request = type("Request", (Tokens,), {})
    hook_requests(requests, points)
    model = SimpleNamespace(max_model_len=20, get_vocab_size=lambda: 100)
    plain = {"model_config": model, "speculative_config": None, "kv_transfer_config": None}

    class EngineCore:
        vllm_config = SimpleNamespace(**{**plain, **config})

        def preprocess_add_request(self, request: Any) -> Any:
            return requests.Request.from_engine_core_request(request, None)

    module: Any = ModuleType("core")
    module.EngineCore = EngineCore
    hook_core(module, points)
    return EngineCore()


def carrying(value: Any, max_tokens: int | None = 10, prompt: list[int] | None = None) -> Any:
    params = SimpleNamespace(extra_args={RESUME_KEY: value}, max_tokens=max_tokens)
    return SimpleNamespace(sampling_params=params, prompt_token_ids=prompt or [1, 2, 3])


@every_case("num_owned", [1, 9])
def test_a_request_is_born_with_what_it_owns(num_owned: int) -> None:
    made = core(HookPoints()).preprocess_add_request(carrying(handed_over([99] * num_owned)))
    assert (made, made.num_preemptions) == ([99] * num_owned, 1)


@every_case("params", [None, SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"mine": 1})])
def test_a_request_that_carries_nothing_is_stock(params: Any) -> None:
    request = SimpleNamespace(sampling_params=params, prompt_token_ids=None)
    for config in ({}, {"speculative_config": 1}):
        made = core(HookPoints(), **config).preprocess_add_request(request)
        assert (made, made.num_preemptions) == ([], 0)


@every_case(
    "request_, reason",
    [
        (carrying([5, 6]), "front end"),  # as a body can carry it past a front end that is not hooked
        (carrying('{"version":1}'), "front end"),
        (carrying(handed_over([])), "front end"),
        (carrying(handed_over([5, 100])), "vocabulary"),
        (carrying(handed_over([-1, 5])), "vocabulary"),
        (carrying(handed_over([5] * 10)), "10 tokens, and must have fewer than 10"),
        (carrying(handed_over([5] * 17), max_tokens=None), "fewer than 17"),
        (carrying(handed_over([5] * 5), prompt=[1] * 15), "fewer than 5"),
    ],
)
def test_a_core_refuses_what_would_kill_its_worker(request_: Any, reason: str) -> None:
    with pytest.raises(ResumeRefused, match=reason):
        core(HookPoints()).preprocess_add_request(request_)


@every_case("name", ["speculative_config", "kv_transfer_config"])
def test_a_core_of_an_engine_that_resumes_nothing_refuses(name: str) -> None:
    with pytest.raises(ResumeRefused, match="this engine"):
        core(HookPoints(), **{name: 1}).preprocess_add_request(carrying(handed_over([5])))


def test_a_core_that_is_not_hooked_whole_refuses() -> None:
    points = HookPoints()
    points.problems.append("there is no such function")
    with pytest.raises(ResumeRefused, match="no such function"):
        core(points).preprocess_add_request(carrying(handed_over([5])))


def test_a_manager_that_only_says_what_is_reasoning_accepts_the_rest() -> None:
    """As before vLLM had ``accept_tokens``: token 9 ends the reasoning, and no token up to it is the grammar's."""

    class Grammar:
        def __init__(self) -> None:
            self.taken: list[int] = []

        def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
            assert request_id == "r"
            self.taken += tokens
            return 7 not in tokens

    class StructuredOutputManager:
        def _create_grammar(self, request: Any) -> Grammar:
            del request
            return Grammar()

        def should_fill_bitmask(self, request: Any) -> bool:
            record = request.structured_output_request
            if record.reasoning_ended is None:
                record.reasoning_ended = 9 in request.prompt_token_ids
            return bool(record.reasoning_ended)

        def should_advance(self, request: Any, new_token_ids: list[int]) -> bool:
            record = request.structured_output_request
            record.reasoning_ended = record.reasoning_ended or 9 in new_token_ids
            return bool(record.reasoning_ended)

        def trim_reasoning_for_advance(self, request: Any, new_token_ids: list[int]) -> list[int]:
            del request
            return [] if 9 in new_token_ids else new_token_ids

    module: Any = ModuleType("structured_output")
    module.StructuredOutputManager = StructuredOutputManager
    hook_grammars(module)
    request = request_owning(5, 9, 6)
    assert module.StructuredOutputManager()._create_grammar(request).taken == [6]
    assert request.structured_output_request.reasoning_ended is True
    with pytest.raises(ValueError, match="refuses token 7"):
        module.StructuredOutputManager()._create_grammar(request_owning(9, 7))
    ended_before = request_owning(5, 6, prompt=(1, 9))
    ended_before.structured_output_request.reasoning_ended = None  # nobody has asked yet
    assert module.StructuredOutputManager()._create_grammar(ended_before).taken == [5, 6]
    assert ended_before.structured_output_request.reasoning_ended is True
