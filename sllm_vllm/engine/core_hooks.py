"""The engine core's half of a resume: a request that is born with output tokens. Hooks vLLM; runs in its core process.

To the scheduler such a request is one that was preempted: its prefill goes over prompt and output, and everything that
counts output tokens (max_tokens, stop checks, the grammar) goes on from there.
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
    """What to install into which module of vLLM."""
    return {
        "vllm.v1.request": lambda module: hook_requests(module, points),
        "vllm.v1.structured_output": hook_grammars,
        "vllm.v1.engine.core": lambda module: hook_core(module, points),
    }


def hook_requests(module: ModuleType, points: HookPoints) -> None:
    """Let ``Request.from_engine_core_request`` append what the request owns."""
    requests: Any = require_type(module, "Request")
    require(requests, "append_output_token_ids", "token_ids")
    stock = require(requests, "from_engine_core_request", "request", "block_hasher")

    def from_engine_core_request(cls: type, request: Any, block_hasher: Any) -> Any:
        made: Any = stock(request, block_hasher)
        if owned := owned_tokens(getattr(request.sampling_params, "extra_args", None)):
            if points.problems:  # nobody may have checked the tokens
                raise ResumeRefused(f"this core can't resume: {points.problems[0]}")
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
    accept = _accept_of(managers)

    def create_grammar(self: Any, request: Any) -> Any:
        grammar = stock(self, request)
        if request.num_output_tokens:
            _advance(self, request, grammar, accept=accept)
        return grammar

    managers._create_grammar = create_grammar


def hook_core(module: ModuleType, points: HookPoints) -> None:
    """Check what a request owns before anything is made of it, and add a method that the front end's self-test calls.

    vLLM fails the one request whose preprocessing raises; a worker that got too many tokens would die of them.
    """
    cores: Any = require_type(module, "EngineCore")
    stock = require(cores, "preprocess_add_request", "request")

    def preprocess_add_request(self: Any, request: Any) -> Any:
        _check_owned(self.vllm_config, request)
        return stock(self, request)

    cores.preprocess_add_request = preprocess_add_request
    cores.sllm_hook_problems = lambda self: list(points.problems)


def _check_owned(config: Any, request: Any) -> None:
    """Trust no front end: it may not be hooked, and a body then comes through as it is.

    Raises:
        ResumeRefused: the request must not be resumed with what it carries.
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
"""What a structured request knows of the end of its reasoning; not every version has all of it."""


@dataclass(slots=True)
class _Past:
    """A request as it was some tokens ago: what the manager reads of a request when it accepts tokens."""

    request_id: str
    prompt_token_ids: list[int]
    structured_output_request: Any
    all_token_ids: list[int] = field(default_factory=list)
    use_structured_output: bool = True
    num_output_placeholders: int = 0

    @property
    def num_computed_tokens(self) -> int:
        """As the scheduler counts when it lets the grammar advance: the newest token is drawn, not yet computed."""
        return len(self.all_token_ids) - 1


def _accept_of(managers: Any) -> Any:
    """How a manager lets a request's grammar accept new tokens, leaving out those of its reasoning.

    Before ``accept_tokens`` (there since 0.30) the scheduler put it together from two of its methods; a third, asked
    before the first token, settles whether the prompt has ended the reasoning.
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
        if not accept(manager, past, [token]):
            raise ValueError(f"the grammar of {request.request_id} refuses token {token} of those it was resumed with")
    for name in _REASONING:
        if hasattr(record, name):
            setattr(request.structured_output_request, name, getattr(record, name))
