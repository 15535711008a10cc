"""Hooks in the front end: a resume is checked before the answer streams, and replayed when the request is added."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from types import ModuleType
from typing import Any

from sllm_vllm.engine.hook_points import HookPoints, require, require_type
from sllm_vllm.engine.movable import why_immovable
from sllm_vllm.engine.replay import HeldOutputs, hand_to_core, replay
from sllm_vllm.engine.resume import (
    RESUME_KEY,
    Resume,
    ResumeLimits,
    ResumeRefused,
    check_resume,
    check_signature,
    digest_tokens,
    parse_resume,
)

_PROTOCOLS = {
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
}


def front_installs(points: HookPoints) -> dict[str, Any]:
    """Hooks by the module of vLLM that they are installed into."""
    beams = {module: _beam_install(name) for module, name in _PROTOCOLS.items()}
    return {
        "vllm.v1.engine.async_llm": lambda module: hook_generate(module, points),
        "vllm.v1.engine.output_processor": hook_outputs,
        "vllm.v1.engine.parallel_sampling": hook_parents,
        **beams,
    }


def hook_generate(module: ModuleType, points: HookPoints) -> None:
    """Check a request's resume when ``AsyncLLM.generate`` is called, while an error can still set the HTTP status."""
    engines: Any = require_type(module, "AsyncLLM")
    stock = require(engines, "generate", "prompt", "sampling_params", "request_id")

    def generate(self: Any, prompt: Any, sampling_params: Any, *places: Any, **named: Any) -> Any:
        if RESUME_KEY in (getattr(sampling_params, "extra_args", None) or {}):
            request_id = places[0] if places else named["request_id"]
            _accept(self, prompt, sampling_params, request_id=request_id)
        return stock(self, prompt, sampling_params, *places, **named)

    engines.generate = generate
    engines.sllm_points = points


def hook_outputs(module: ModuleType) -> None:
    """Store each request with its state, and replay its owned tokens when it is added."""
    processors: Any = require_type(module, "OutputProcessor")
    collectors: Any = require_type(module, "RequestOutputCollector")
    require(collectors, "get_nowait")
    require(collectors, "get")
    require(processors, "process_outputs", "engine_core_outputs")
    stock = require(processors, "add_request", "request", "prompt", "parent_req", "request_index", "queue")

    def add_request(self: Any, request: Any, prompt: Any, *places: Any, **named: Any) -> None:
        stock(self, request, prompt, *places, **named)
        state = self.request_states.get(request.request_id)
        if state is not None and request.sampling_params is not None:
            _added(self, request, state)

    processors.add_request = add_request


def hook_parents(module: ModuleType) -> None:
    """Record how each choice of a request with ``n`` above 1 ended, because vLLM then drops the choice's state."""
    parents: Any = require_type(module, "ParentRequest")
    stock = require(parents, "get_outputs", "child_request_id", "completion_output")

    def get_outputs(self: Any, child_request_id: str, completion_output: Any) -> Any:
        if completion_output.finish_reason is not None:
            ended = self.__dict__.setdefault("sllm_ended", {})
            ended[completion_output.index] = (completion_output.finish_reason, completion_output.stop_reason)
        return stock(self, child_request_id, completion_output)

    parents.get_outputs = get_outputs


def _beam_install(name: str) -> Any:
    """Refuse to resume a beam search, which ignores ``vllm_xargs`` and would start from the beginning."""

    def install(module: ModuleType) -> None:
        requests: Any = require_type(module, name)
        stock = require(requests, "to_beam_search_params")

        def to_beam_search_params(self: Any, *places: Any, **named: Any) -> Any:
            if RESUME_KEY in (self.vllm_xargs or {}):
                raise _refusal("a beam search can't be resumed")
            return stock(self, *places, **named)

        requests.to_beam_search_params = to_beam_search_params

    return install


def _accept(engine: Any, prompt: Any, params: Any, *, request_id: str) -> None:
    """Check a request's resume, and replace its text by the parsed ``Resume``.

    Raises:
        VLLMValidationError: the request can't be resumed (HTTP 400); the message says why.
    """
    try:
        if engine.sllm_points.problems:
            raise ResumeRefused(f"this engine can't resume: {engine.sllm_points.problems[0]}")
        keys = getattr(engine, "sllm_resume_keys", ())
        resume = parse_resume(check_signature(params.extra_args[RESUME_KEY], keys=keys, request=request_id))
        if reason := why_immovable(engine.vllm_config, prompt, params):
            raise ResumeRefused(reason)
        check_resume(resume, _limits(engine, prompt["prompt_token_ids"], params))
    except ResumeRefused as problem:
        raise _refusal(str(problem)) from None
    params.extra_args = {**params.extra_args, RESUME_KEY: resume}


def _limits(engine: Any, prompt: list[int], params: Any) -> ResumeLimits:
    model = engine.vllm_config.model_config
    room = model.max_model_len - len(prompt)
    return ResumeLimits(
        prompt_digest=digest_tokens(prompt),
        num_prompt_tokens=len(prompt),
        num_choices=params.n,
        tokens_max=room if params.max_tokens is None else params.max_tokens,
        model_len_max=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        wants_logprobs=params.num_logprobs is not None,
    )


def _added(processor: Any, request: Any, state: Any) -> None:
    """Handle a request that vLLM has just added. If its resume fails, abort it, so that nothing of it is left."""
    carried = (request.sampling_params.extra_args or {}).get(RESUME_KEY)
    if carried is not None:
        with ExitStack() as undo:
            undo.callback(processor.abort_requests, [request.request_id], internal=True)
            _resume(processor, request, carried)
            undo.pop_all()
    state.sllm_request = request
    parent = state.parent_req
    if parent is not None:
        parent.__dict__.setdefault("sllm_states", {})[state.request_index] = state


def _resume(processor: Any, request: Any, resume: object) -> None:
    """Replay a request's owned tokens, and put them into the request that goes to the core.

    Raises:
        VLLMValidationError: the resume was not checked in ``generate``, or its replay does not end as it says.
    """
    if not isinstance(resume, Resume):
        raise _refusal(f"{RESUME_KEY} is understood in requests over HTTP alone")
    state = processor.request_states[request.request_id]
    choice = resume.choices[state.request_index]
    if resume.num_cached_tokens is not None:
        _keep_cached_tokens(state, resume.num_cached_tokens)
    held = None
    if state.queue is not None:
        held = state.queue.__dict__.setdefault("sllm_held", None) or HeldOutputs(state.queue, resume.step)
        state.queue.sllm_held = held
    try:
        replay(processor, state, choice, held=held)
    except ResumeRefused as problem:
        raise _refusal(str(problem)) from None
    hand_to_core(request, choice, is_open=request.request_id in processor.request_states)


def _keep_cached_tokens(state: Any, num: int) -> None:
    """Report the prompt tokens that the first engine found in its prefix cache, not what this one finds."""
    is_kept = hasattr(state, "remote_prefill_cached_tokens")
    state.num_cached_tokens = state.remote_prefill_cached_tokens = num
    if not is_kept:  # vLLM 0.26 would replace the number after its prefill
        kind: Any = type(state)
        state.__class__ = _with_fixed_cached_tokens(kind)


@cache
def _with_fixed_cached_tokens(kind: Any) -> Any:
    fixed = property(lambda state: state.remote_prefill_cached_tokens, lambda _state, _num: None)
    return type(kind.__name__, (kind,), {"num_cached_tokens": fixed})


def _refusal(reason: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    error: Exception = VLLMValidationError(reason, parameter=RESUME_KEY)
    return error
