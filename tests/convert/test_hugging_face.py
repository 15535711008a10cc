"""The way back to Hugging Face's tensors, as a table of rules: names, sizes, and what is refused."""

from __future__ import annotations

import math

import pytest

from sllm_vllm.checkpoint.core.manifest import Layout, TensorRecord
from sllm_vllm.convert.hugging_face import RULES, NoWayBack, Piece, TensorPlan, holds_output_layer, plan_export
from tests.support.cases import every_case

CONFIG = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "num_experts": 3,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}


def layout(model_class: str = "llama.LlamaForCausalLM", **changes: object) -> Layout:
    fields = {
        "model_class": f"vllm.model_executor.models.{model_class}",
        "dtype": "bfloat16",
        "device_type": "cpu",
        "vllm_version": "1",
        "config_digest": "0",
    }
    return Layout.model_validate(fields | changes)


def record(name: str, *shape: int) -> TensorRecord:
    return TensorRecord(name=name, dtype="bfloat16", shape=list(shape), offset=0, nbytes=2 * math.prod(shape))


def plan(*records: TensorRecord, model_class: str = "llama.LlamaForCausalLM", **config: object) -> list[TensorPlan]:
    return list(plan_export(layout(model_class), records, CONFIG | config))


def pieces(*records: TensorRecord, model_class: str = "llama.LlamaForCausalLM", **config: object) -> list[Piece]:
    return [piece for tensor in plan(*records, model_class=model_class, **config) for piece in tensor.pieces]


def test_heads_are_split_by_their_numbers() -> None:
    name = "model.layers.7.self_attn"
    assert pieces(record(f"{name}.qkv_proj.weight", 64, 32)) == [
        Piece(f"{name}.q_proj.weight", (32, 32), 0, 32),
        Piece(f"{name}.k_proj.weight", (16, 32), 32, 48),
        Piece(f"{name}.v_proj.weight", (16, 32), 48, 64),
    ]


def test_head_dim_goes_before_hidden_size() -> None:
    found = pieces(record("model.layers.0.self_attn.qkv_proj.bias", 128), head_dim=16)
    assert [piece.shape for piece in found] == [(64,), (32,), (32,)]


def test_as_many_kv_heads_as_heads_if_none_are_told() -> None:
    found = pieces(record("model.layers.0.self_attn.qkv_proj.bias", 96), num_key_value_heads=None)
    assert [piece.shape for piece in found] == [(32,), (32,), (32,)]


def test_gate_and_up_are_halves() -> None:
    found = pieces(record("model.layers.0.mlp.gate_up_proj.weight", 20, 32))
    assert [(piece.name.split(".")[-2], piece.start, piece.stop) for piece in found] == [
        ("gate_proj", 0, 10),
        ("up_proj", 10, 20),
    ]


def test_experts_are_parted_and_split() -> None:
    stem = "model.layers.0.mlp.experts"
    found = pieces(
        record(f"{stem}.routed_experts.w13_weight", 3, 8, 32),
        record(f"{stem}.routed_experts.w2_weight", 3, 32, 4),
        model_class="qwen3_moe.Qwen3MoeForCausalLM",
    )
    assert found[:2] == [
        Piece(f"{stem}.0.gate_proj.weight", (4, 32), 0, 4, index=0),
        Piece(f"{stem}.0.up_proj.weight", (4, 32), 4, 8, index=0),
    ]
    assert found[-1] == Piece(f"{stem}.2.down_proj.weight", (32, 4), 0, 32, index=2)
    assert len(found) == 9


def test_padding_is_trimmed() -> None:
    assert pieces(record("lm_head.weight", 64, 32)) == [Piece("lm_head.weight", (50, 32), 0, 50)]


def test_conv1d_is_turned_round() -> None:
    name = "transformer.h.0.attn.c_attn"
    found = pieces(record(f"{name}.weight", 96, 32), record(f"{name}.bias", 96), model_class="gpt2.GPT2LMHeadModel")
    assert found[0] == Piece(f"{name}.weight", (32, 96), 0, 96, transposed=True)
    assert found[1] == Piece(f"{name}.bias", (96,), 0, 96)


def test_prefix_of_vllm_is_taken_off() -> None:
    found = pieces(
        record("model.encoder.layer.0.attention.self.qkv_proj.bias", 96),
        record("model.encoder.layer.0.attention.output.LayerNorm.weight", 32),
        record("model.embeddings.token_type_embeddings.weight", 64, 32),
        record("model.embeddings.position_ids", 1, 16),
        model_class="bert.BertEmbeddingModel",
        num_key_value_heads=None,
    )
    assert [(piece.name, piece.shape) for piece in found] == [
        ("encoder.layer.0.attention.self.query.bias", (32,)),
        ("encoder.layer.0.attention.self.key.bias", (32,)),
        ("encoder.layer.0.attention.self.value.bias", (32,)),
        ("encoder.layer.0.attention.output.LayerNorm.weight", (32,)),
        ("embeddings.token_type_embeddings.weight", (2, 32)),
    ]


def test_scales_are_dropped_if_they_say_nothing() -> None:
    assert [(tensor.pieces, tensor.default) for tensor in plan(record("model.layers.0.self_attn.attn._k_scale"))] == [
        ((), 1.0)
    ]


def test_output_layer_of_its_own_is_seen() -> None:
    head, embedding = record("lm_head.weight", 64, 32), record("model.embed_tokens.weight", 64, 32)
    assert holds_output_layer(plan(embedding, head))
    assert not holds_output_layer(plan(embedding))


@every_case(
    "tensor, reason",
    [
        (record("model.layers.0.self_attn.qkv_proj.weight", 65, 32), r"65 rows, .* 32 \+ 16 \+ 16"),
        (record("model.layers.0.mlp.gate_up_proj.weight", 21, 32), r"21 rows, .* 10 \+ 10"),
        (record("lm_head.weight", 49, 32), "49 rows, the configuration says 50"),
        (record("model.layers.0.mlp.experts.routed_experts.w2_weight", 4, 32, 4), "4 experts, the configuration 3"),
        (record("model.layers.0.mlp.experts.routed_experts.w13_weight", 3, 7, 32), "7 rows"),
        (record("model.layers.0.self_attn.rotary_emb.inv_freq", 8), "no known Hugging Face name"),
        (record("prefix.model.norm.weight", 32), "no known Hugging Face name"),
    ],
)
def test_what_does_not_fit_is_refused(tensor: TensorRecord, reason: str) -> None:
    with pytest.raises(NoWayBack, match=reason):
        plan(tensor, model_class="qwen3_moe.Qwen3MoeForCausalLM")


def test_two_tensors_of_one_name_are_refused() -> None:
    fused = record("model.layers.0.mlp.gate_up_proj.weight", 20, 32)
    with pytest.raises(NoWayBack, match="would be there twice"):
        plan(fused, fused)


@every_case(
    "changes, reason",
    [
        ({"num_partitions": 2, "tensor_parallel_size": 2}, "sharded over 2 ranks"),
        ({"quantization": "fp8"}, r"quantised \(fp8\)"),
        (
            {"model_class": "my.llama.LlamaForCausalLM"},
            r"for .*my\.llama\.LlamaForCausalLM it is not yet known how vLLM fuses",
        ),
    ],
)
def test_layouts_without_a_way_back(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(NoWayBack, match=reason):
        plan_export(layout(**changes), [], CONFIG)  # type: ignore[arg-type]


def test_a_configuration_without_sizes_fits_nothing() -> None:
    with pytest.raises(NoWayBack, match=r"the configuration says 0 \+ 0 \+ 0"):
        plan_export(layout(), [record("model.layers.0.self_attn.qkv_proj.bias", 96)], {"num_attention_heads": "4"})


def test_classes_are_in_order() -> None:
    assert list(RULES) == sorted(RULES)
