"""Decides which requests are never moved, because they could not be resumed exactly. Reads vLLM, changes nothing."""

from __future__ import annotations

from typing import Any


def why_immovable(config: Any, prompt: Any, params: Any) -> str:
    """Why a request that is being created can't be resumed; empty if it can.

    Args:
        config: the engine's ``VllmConfig``.
        prompt: the prompt as vLLM's renderer returns it.
        params: the request's ``SamplingParams``.
    """
    kind = prompt.get("type") if isinstance(prompt, dict) else None
    if kind != "token":
        return f"a prompt of {kind or 'another kind than tokens'} can't be resumed exactly"
    return why_engine_unable(config) or _of_params(config, params)


def why_immovable_in_flight(config: Any, request: Any, params: Any) -> str:
    """Why a request in flight can't be resumed; empty if it can. ``request`` is its ``EngineCoreRequest``."""
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return "its prompt has embeddings"
    if request.mm_features:
        return "its prompt has media"
    if request.resumable:
        return "its input is a stream"
    return why_engine_unable(config) or _of_params(config, params)


def why_engine_unable(config: Any) -> str:
    """Why an engine with this ``VllmConfig`` can't resume any request; empty if its configuration allows resuming."""
    model = config.model_config
    if getattr(model, "return_sampling_mask", False) or getattr(model, "enable_return_routed_experts", False):
        return "this engine returns sampling masks or routed experts, which are not carried along"
    if getattr(config, "watermark_config", None) is not None:
        return "this engine watermarks its output, which was not tried with moves"
    if config.speculative_config is not None:
        return "this engine speculates: the draws of a step depend on where it began"
    if config.kv_transfer_config is not None:  # and runner V1 raises KeyError for a request marked as preempted
        return "this engine has a KV connector, which may load the KV of what a request has not computed here"
    return ""


def _of_params(config: Any, params: Any) -> str:
    if params.prompt_logprobs is not None and params.output_kind.name == "DELTA":
        return "it streams the prompt's logprobs"
    if params.prompt_logprobs is not None and getattr(config, "use_v2_model_runner", False):
        return "it asks for the prompt's logprobs, and runner V2 was never seen to give them after a resume"
    if getattr(params, "trace_decode_token_ids", None):
        return "it replays a trace"
    transfer = (params.extra_args or {}).get("kv_transfer_params")
    if isinstance(transfer, dict) and (transfer.get("do_remote_prefill") or transfer.get("do_remote_decode")):
        return "its KV is transferred between engines"
    return ""
