"""The grammar of a resumed request is where it was at the source."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sllm_vllm.engine.core_hooks import hook_core, hook_grammars
from sllm_vllm.engine.hook_points import HookPoints


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


def request_owning(*tokens: int) -> Any:
    return SimpleNamespace(
        request_id="r",
        prompt_token_ids=[1, 2],
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
    module.EngineCore = type("EngineCore", (), {})
    hook_core(module, points)
    assert module.EngineCore().sllm_hook_problems() == ["one"]
