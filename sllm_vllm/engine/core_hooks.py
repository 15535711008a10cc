"""The engine core's half of a resume: requests created with output tokens. Hooks vLLM; runs in its core process.

To the scheduler such a request looks like a preempted one: its prefill covers prompt and output, and everything that
counts output tokens (max_tokens, stop checks, the grammar) continues from there.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from sllm_vllm.engine.hook_points import HookPoints, require, require_type
from sllm_vllm.engine.movable import why_engine_unable
from sllm_vllm.engine.resume import RESUME_KEY, ResumeRefused, owned_tokens


def core_installs(points: HookPoints) -> dict[str, Any]:
    """Hooks by the module of vLLM that they are installed into."""
    return {
        "vllm.v1.request": lambda module: hook_requests(module, points),
        "vllm.v1.structured_output": hook_grammars,
        "vllm.v1.engine.core": lambda module: hook_core(module, points),
    }


def hook_requests(module: ModuleType, points: HookPoints) -> None:
    """Make ``Request.from_engine_core_request`` append the tokens that the request owns."""
    requests: Any = require_type(module, "Request")
    require(requests, "append_output_token_ids", "token_ids")
    stock = require(requests, "from_engine_core_request", "request", "block_hasher")

    def from_engine_core_request(cls: type, request: Any, block_hasher: Any) -> Any:
        made: Any = stock(request, block_hasher)
        if owned := owned_tokens(getattr(request.sampling_params, "extra_args", None)):
            if points.problems:  # the hook that checks the tokens may be among the missing ones
                raise ResumeRefused(f"this core can't resume: {points.problems[0]}")
            made.append_output_token_ids(owned)
            # Make it look preempted: at the first prefill of a new request, vLLM asserts that no more tokens than
            # the prompt's were found in the prefix cache.
            made.num_preemptions = 1
        return made

    requests.from_engine_core_request = classmethod(from_engine_core_request)


def hook_grammars(module: ModuleType) -> None:
    """Make ``StructuredOutputManager._create_grammar`` advance the grammar over the tokens that the request owns."""
    managers: Any = require_type(module, "StructuredOutputManager")
    stock = require(managers, "_create_grammar", "request")
    accept = _accept_of(managers)

    def create_grammar(self: Any, request: Any) -> Any:
        grammar = stock(self, request)
        if request.num_output_tokens:
            _advance(self, request, grammar, accept=accept)
        return grammar

    managers._create_grammar = create_grammar


def hook_core(module: ModuleType, points: HookPoints) -> None:
    """Check the owned tokens before a request is created, and add a method that the front end's self-test calls.

    If preprocessing raises, vLLM fails that request only; a worker that got too many tokens would crash.
    """
    cores: Any = require_type(module, "EngineCore")
    stock = require(cores, "preprocess_add_request", "request")

    def preprocess_add_request(self: Any, request: Any) -> Any:
        _check_owned(self.vllm_config, request)
        return stock(self, request)

    cores.preprocess_add_request = preprocess_add_request
    cores.sllm_hook_problems = lambda self: list(points.problems)


def _check_owned(config: Any, request: Any) -> None:
    """Check a request's owned tokens, since a front end that is not hooked passes on unchecked what a body contains.

    Raises:
        ResumeRefused: the request can't be resumed with these tokens.
    """
    params = request.sampling_params
    extra_args = getattr(params, "extra_args", None) or {}
    if RESUME_KEY not in extra_args:
        return
    if reason := why_engine_unable(config):
        raise ResumeRefused(reason)
    model, owned = config.model_config, owned_tokens(extra_args)
    if not owned or request.prompt_token_ids is None:
        raise ResumeRefused(f"{RESUME_KEY} is not what a front end of ours hands over")
    if not 0 <= min(owned) <= max(owned) < model.get_vocab_size():
        raise ResumeRefused("it owns tokens outside the vocabulary")
    room = model.max_model_len - len(request.prompt_token_ids)
    if params.max_tokens is not None:
        room = min(room, params.max_tokens)
    if len(owned) >= room:
        raise ResumeRefused(f"it owns {len(owned)} tokens, and must have fewer than {room}")


_REASONING = ("reasoning_ended", "reasoning_end_token_index", "reasoner")
"""Attributes of a structured request about the end of its reasoning; not all versions of vLLM have all of them."""


@dataclass(slots=True)
class _Past:
    """A request as it was some tokens ago, with the attributes that the manager reads when it accepts tokens."""

    request_id: str
    prompt_token_ids: list[int]
    structured_output_request: Any
    all_token_ids: list[int] = field(default_factory=list)
    use_structured_output: bool = True
    num_output_placeholders: int = 0

    @property
    def num_computed_tokens(self) -> int:
        """As the scheduler counts when it advances the grammar: the newest token is sampled, but not yet computed."""
        return len(self.all_token_ids) - 1


def _accept_of(managers: Any) -> Any:
    """The manager's function that makes a request's grammar accept new tokens, except those of its reasoning.

    vLLM has it as ``accept_tokens`` from 0.30 on. Before, the scheduler called two methods of the manager for this; a
    third one, called before the first token, determines whether the prompt has ended the reasoning.
    """
    if hasattr(managers, "accept_tokens"):
        return require(managers, "accept_tokens", "request", "new_token_ids")
    should_advance = require(managers, "should_advance", "request")
    takes_tokens = "new_token_ids" in inspect.signature(should_advance).parameters  # 0.26 reads them from the request
    trim = require(managers, "trim_reasoning_for_advance", "request", "new_token_ids")
    settle_reasoning = require(managers, "should_fill_bitmask", "request")

    def accept(self: Any, request: Any, new_token_ids: list[int]) -> bool:
        settle_reasoning(self, request)
        if not should_advance(self, request, **({"new_token_ids": new_token_ids} if takes_tokens else {})):
            return True
        rest: Any = trim(self, request, new_token_ids)
        return not rest or request.structured_output_request.grammar.accept_tokens(request.request_id, rest)

    return accept


def _advance(manager: Any, request: Any, grammar: Any, *, accept: Any) -> None:
    """Accept the owned tokens one by one, as the source did, because a reasoning parser may look at all earlier tokens.

    Runs in one of the manager's threads, while the request waits for its grammar. Works on a copy of the request's
    record: if the record itself got the grammar now, the scheduler would take the request for ready too soon.
    """
    record = copy.copy(request.structured_output_request)
    record.grammar = grammar
    prompt = list(request.prompt_token_ids or ())
    past = _Past(request.request_id, prompt, record, list(prompt))
    for token in list(request.output_token_ids):
        past.all_token_ids.append(token)
        if not accept(manager, past, [token]):
            raise ValueError(f"the grammar of {request.request_id} refuses token {token} of those it was resumed with")
    for name in _REASONING:
        if hasattr(record, name):
            setattr(request.structured_output_request, name, getattr(record, name))
