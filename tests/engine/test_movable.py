"""What is never moved is known by its request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sllm_vllm.engine.movable import why_immovable, why_immovable_in_flight
from tests.support.cases import every_case

TOKENS = {"type": "token", "prompt_token_ids": [1]}


def config(**more: Any) -> SimpleNamespace:
    model = SimpleNamespace(**more.pop("model", {}))
    plain = {"model_config": model, "speculative_config": None, "kv_transfer_config": None}
    return SimpleNamespace(**{**plain, **more})


def params(**more: Any) -> SimpleNamespace:
    kind = SimpleNamespace(name="DELTA")
    return SimpleNamespace(**{"seed": None, "prompt_logprobs": None, "output_kind": kind, "extra_args": None, **more})


def in_flight(**more: Any) -> SimpleNamespace:
    sound = {"prompt_embeds": None, "prompt_token_ids": [1], "mm_features": None, "resumable": False}
    return SimpleNamespace(**{**sound, **more})


def test_plain_requests_are_moved() -> None:
    assert why_immovable(config(), TOKENS, params(seed=5)) == ""
    assert why_immovable_in_flight(config(), in_flight(), params(seed=5)) == ""


@every_case("prompt", [{"type": "multimodal"}, {"type": "embeds"}, {"type": "enc_dec"}, "text", None])
def test_prompts_of_another_kind_than_tokens_are_not(prompt: object) -> None:
    assert "can't be resumed" in why_immovable(config(), prompt, params())


@every_case(
    "engine, sampling, reason",
    [
        ({"speculative_config": 1}, {}, "speculates"),
        ({"kv_transfer_config": 1}, {}, "KV connector"),
        ({"model": {"return_sampling_mask": True}}, {}, "sampling masks"),
        ({"model": {"enable_return_routed_experts": True}}, {}, "routed experts"),
        ({"watermark_config": 1}, {}, "marks its output"),
        (
            {"use_v2_model_runner": True},
            {"prompt_logprobs": 1, "output_kind": SimpleNamespace(name="FINAL_ONLY")},
            "V2",
        ),
        ({}, {"prompt_logprobs": 1}, "prompt's logprobs"),
        ({}, {"trace_decode_token_ids": [1]}, "trace"),
        ({}, {"extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}}, "KV"),
    ],
)
def test_requests_whose_state_is_elsewhere_are_not(
    engine: dict[str, Any], sampling: dict[str, Any], reason: str
) -> None:
    assert reason in why_immovable(config(**engine), TOKENS, params(**sampling))
    assert reason in why_immovable_in_flight(config(**engine), in_flight(), params(**sampling))


@every_case(
    "more, reason",
    [
        ({"prompt_embeds": 1}, "embeddings"),
        ({"prompt_token_ids": None}, "embeddings"),
        ({"mm_features": [1]}, "media"),
        ({"resumable": True}, "stream"),
    ],
)
def test_requests_in_flight_with_other_inputs_are_not(more: dict[str, Any], reason: str) -> None:
    assert reason in why_immovable_in_flight(config(), in_flight(**more), params())
