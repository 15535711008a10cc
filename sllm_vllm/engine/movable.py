"""Which requests are never moved, because nothing makes their continuation exact. Reads vLLM, changes nothing."""

from __future__ import annotations

from typing import Any


def why_immovable(config: Any, prompt: Any, params: Any) -> str:
    """Why a request that is being made can't be resumed; empty if it can.

    Args:
        config: the engine's ``VllmConfig``.
        prompt: as it comes from vLLM's renderer.
        params: its ``SamplingParams``.
    """
    kind = prompt.get("type") if isinstance(prompt, dict) else None
    if kind != "token":
        return f"a prompt of {kind or 'another kind than tokens'} can't be resumed exactly"
    return why_engine_unable(config) or _of_params(config, params)


def why_immovable_in_flight(config: Any, request: Any, params: Any) -> str:
    """The same for a request in flight: ``request`` is its ``EngineCoreRequest``."""
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return "its prompt has embeddings"
    if request.mm_features:
        return "its prompt has media"
    if request.resumable:
        return "its input is a stream"
    return why_engine_unable(config) or _of_params(config, params)


def why_engine_unable(config: Any) -> str:
    """Why an engine resumes no request at all, by its ``VllmConfig``; empty if nothing there keeps it from that."""
    model = config.model_config
    if getattr(model, "return_sampling_mask", False) or getattr(model, "enable_return_routed_experts", False):
        return "this engine returns sampling masks or routed experts, which are not carried along"
    if getattr(config, "watermark_config", None) is not None:
        return "this engine marks its output, and nobody has looked how that goes on"
    if config.speculative_config is not None:
        return "this engine speculates: the draws of a step depend on where it began"
    if config.kv_transfer_config is not None:  # a request that counts as preempted is a KeyError to runner V1 then
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
