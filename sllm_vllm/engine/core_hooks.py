"""The engine core's half of a resume: a request that is born with output tokens. Hooks vLLM; runs in its core process.

To the scheduler such a request is one that was preempted: its prefill goes over prompt and output, and everything that
counts output tokens (max_tokens, stop checks, the grammar) goes on from there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from sllm_vllm.engine.hook_points import HookPoints, require, require_type
from sllm_vllm.engine.resume import owned_tokens


def core_installs(points: HookPoints) -> dict[str, Any]:
    """What to install into which module of vLLM."""
    return {
        "vllm.v1.request": hook_requests,
        "vllm.v1.structured_output": hook_grammars,
        "vllm.v1.engine.core": lambda module: hook_core(module, points),
    }


def hook_requests(module: ModuleType) -> None:
    """Let ``Request.from_engine_core_request`` append what the request owns."""
    requests: Any = require_type(module, "Request")
    require(requests, "append_output_token_ids", "token_ids")
    stock = require(requests, "from_engine_core_request", "request", "block_hasher")

    def from_engine_core_request(cls: type, request: Any, block_hasher: Any) -> Any:
        made: Any = stock(request, block_hasher)
        if owned := owned_tokens(getattr(request.sampling_params, "extra_args", None)):
            made.append_output_token_ids(owned)
            # As after a preemption: the first prefill of a new request asserts that it found no more in the prefix
            # cache than its prompt.
            made.num_preemptions = 1
        return made

    requests.from_engine_core_request = classmethod(from_engine_core_request)


def hook_grammars(module: ModuleType) -> None:
    """Let ``StructuredOutputManager._create_grammar`` advance the grammar over what the request owns."""
    managers: Any = require_type(module, "StructuredOutputManager")
    stock = require(managers, "_create_grammar", "request")
    require(managers, "accept_tokens", "request", "new_token_ids")

    def create_grammar(self: Any, request: Any) -> Any:
        grammar = stock(self, request)
        if request.num_output_tokens:
            _advance(self, request, grammar)
        return grammar

    managers._create_grammar = create_grammar


def hook_core(module: ModuleType, points: HookPoints) -> None:
    """Add a method that the front end's self-test calls."""
    cores: Any = require_type(module, "EngineCore")
    cores.sllm_hook_problems = lambda self: list(points.problems)


@dataclass(slots=True)
class _Past:
    """A request as it was some tokens ago: what the manager reads of a request when it accepts tokens."""

    request_id: str
    prompt_token_ids: list[int]
    structured_output_request: Any
    all_token_ids: list[int] = field(default_factory=list)
    use_structured_output: bool = True


def _advance(manager: Any, request: Any, grammar: Any) -> None:
    """Accept the owned tokens one by one, as the source did: a reasoning parser may look at all that came before.

    In a thread of the manager's, while the request waits for its grammar. The request's own record must not get the
    grammar yet, or the scheduler would find it ready too soon.
    """
    record = copy.copy(request.structured_output_request)
    record.grammar = grammar
    prompt = list(request.prompt_token_ids or ())
    past = _Past(request.request_id, prompt, record, list(prompt))
    for token in list(request.output_token_ids):
        past.all_token_ids.append(token)
        if not manager.accept_tokens(past, [token]):
            raise ValueError(f"the grammar of {request.request_id} refuses token {token} of those it was resumed with")
    request.structured_output_request.reasoning_ended = record.reasoning_ended
    request.structured_output_request.reasoner = record.reasoner
