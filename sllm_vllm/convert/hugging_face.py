"""Plans how stored tensors are split and renamed back to those of a Hugging Face checkpoint. Pure.

vLLM fuses tensors that a Hugging Face checkpoint keeps apart (q, k and v; gate and up; all experts of a layer), pads
the vocabulary, and renames tensors. Each model class has a table of rules. Every stored tensor must match one of them
and have exactly the shape that follows from the model's configuration, or nothing is exported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sllm_vllm.checkpoint.core.manifest import Layout, TensorRecord


class NoWayBack(Exception):
    """The layout can't be exported; ``str()`` says why."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One Hugging Face tensor: rows ``start`` to ``stop`` of a stored tensor, or of ``stored[index]`` if that is set.

    ``shape`` is that of the result, after transposing.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    index: int | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What a stored tensor is exported as.

    A tensor that Hugging Face does not have has no pieces; if ``default`` is set, all its elements must equal it.
    """

    record: TensorRecord
    pieces: tuple[Piece, ...]
    default: float | None = None


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The numbers that the rules need from a model's configuration."""

    heads: tuple[int, int, int]
    vocab: int
    positions: int
    token_types: int
    experts: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Sizes:
        num_heads = _count(config, "num_attention_heads", "n_head")
        num_kv_heads = _count(config, "num_key_value_heads", default=num_heads)
        hidden = _count(config, "hidden_size", "n_embd")
        head = _count(config, "head_dim", default=hidden // num_heads if num_heads else 0)
        return cls(
            heads=(num_heads * head, num_kv_heads * head, num_kv_heads * head),
            vocab=_count(config, "vocab_size"),
            positions=_count(config, "max_position_embeddings"),
            token_types=_count(config, "type_vocab_size"),
            experts=_count(config, "num_experts", "num_local_experts"),
        )


def _count(config: Mapping[str, Any], *keys: str, default: int = 0) -> int:
    found = (config[key] for key in keys if type(config.get(key)) is int and config[key] > 0)
    return next(found, default)


Cut = Callable[[re.Match[str], TensorRecord, _Sizes], TensorPlan]
"""Makes the plan of a stored tensor whose name matched a rule's pattern."""


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: str
    cut: Cut


def _keep(name: str = r"\g<0>", *, transposed: bool = False) -> Cut:
    """Export the tensor whole, under ``name``, in which ``\\1`` is the pattern's first group."""

    def cut(match: re.Match[str], record: TensorRecord, sizes: _Sizes) -> TensorPlan:
        return _split_rows(record, [(match.expand(name), record.shape[0])], transposed=transposed)

    return cut


def _trim(size: Callable[[_Sizes], int], name: str = r"\g<0>") -> Cut:
    """Export the first ``size`` rows; those behind them are padding."""

    def cut(match: re.Match[str], record: TensorRecord, sizes: _Sizes) -> TensorPlan:
        num_rows = size(sizes)
        if not 0 < num_rows <= record.shape[0]:
            raise NoWayBack(f"tensor {record.name!r} has {record.shape[0]} rows, the configuration says {num_rows}")
        return TensorPlan(record, (_piece(match.expand(name), record.shape, 0, stop=num_rows),))

    return cut


def _split_heads(*names: str) -> Cut:
    """Split the rows into queries, keys and values."""

    def cut(match: re.Match[str], record: TensorRecord, sizes: _Sizes) -> TensorPlan:
        named = [match.expand(name) for name in names]
        return _split_rows(record, list(zip(named, sizes.heads, strict=True)))

    return cut


def _split_evenly(*names: str) -> Cut:
    """Split the rows into as many equal parts as there are names."""

    def cut(match: re.Match[str], record: TensorRecord, sizes: _Sizes) -> TensorPlan:
        part = record.shape[0] // len(names)
        return _split_rows(record, [(match.expand(name), part) for name in names])

    return cut


def _split_experts(*names: str) -> Cut:
    """Split each expert's matrix into as many equal parts as there are names, with ``{}`` for the expert's number."""

    def cut(match: re.Match[str], record: TensorRecord, sizes: _Sizes) -> TensorPlan:
        if record.shape[0] != sizes.experts:
            raise NoWayBack(f"tensor {record.name!r} has {record.shape[0]} experts, the configuration {sizes.experts}")
        if record.shape[1] % len(names):
            raise NoWayBack(f"tensor {record.name!r} has {record.shape[1]} rows, not {len(names)} equal parts")
        rows, shape = record.shape[1] // len(names), record.shape[1:]
        pieces = [
            _piece(match.expand(name).format(expert), shape, part * rows, stop=(part + 1) * rows, index=expert)
            for expert in range(sizes.experts)
            for part, name in enumerate(names)
        ]
        return TensorPlan(record, tuple(pieces))

    return cut


def _drop(default: float | None = None) -> Cut:
    """Leave the tensor out: Hugging Face has none. Unless ``default`` is None, it must hold that value."""
    return lambda match, record, sizes: TensorPlan(record, (), default)


def _split_rows(record: TensorRecord, parts: Sequence[tuple[str, int]], *, transposed: bool = False) -> TensorPlan:
    if sum(num_rows for _, num_rows in parts) != record.shape[0]:
        told = " + ".join(str(num_rows) for _, num_rows in parts)
        raise NoWayBack(f"tensor {record.name!r} has {record.shape[0]} rows, the configuration says {told}")
    pieces, start = [], 0
    for name, num_rows in parts:
        pieces.append(_piece(name, record.shape, start, stop=start + num_rows, transposed=transposed))
        start += num_rows
    return TensorPlan(record, tuple(pieces))


def _piece(
    name: str, shape: Sequence[int], start: int, *, stop: int, index: int | None = None, transposed: bool = False
) -> Piece:
    result = (stop - start, *shape[1:])
    return Piece(name, result[::-1] if transposed else result, start, stop, index, transposed)


_WB = r"\.(weight|bias)"
_SCALES = _Rule(r".+\.attn\._(?:k|v|q|prob)_scale", _drop(default=1.0))
_LLAMA = (
    _SCALES,
    _Rule(r"(?:model\.embed_tokens|lm_head)\.(?:weight|bias)", _trim(lambda sizes: sizes.vocab)),
    _Rule(r"(.+\.self_attn)\.qkv_proj" + _WB, _split_heads(r"\1.q_proj.\2", r"\1.k_proj.\2", r"\1.v_proj.\2")),
    _Rule(r"(.+\.mlp)\.gate_up_proj" + _WB, _split_evenly(r"\1.gate_proj.\2", r"\1.up_proj.\2")),
    _Rule(r"model\.layers\.\d+\.self_attn\.(?:o_proj|q_norm|k_norm)" + _WB, _keep()),
    _Rule(r"model\.layers\.\d+\.(?:mlp\.down_proj|\w+_layernorm|input_layernorm)" + _WB, _keep()),
    _Rule(r"model\.norm\.weight", _keep()),
)
_QWEN3_MOE = (
    *_LLAMA,
    _Rule(r".+\.mlp\.gate\.weight", _keep()),
    _Rule(
        r"(.+\.mlp\.experts)\.routed_experts\.w13_weight",
        _split_experts(r"\1.{}.gate_proj.weight", r"\1.{}.up_proj.weight"),
    ),
    _Rule(r"(.+\.mlp\.experts)\.routed_experts\.w2_weight", _split_experts(r"\1.{}.down_proj.weight")),
)
_MIXTRAL = (
    *_LLAMA,
    _Rule(r".+\.block_sparse_moe\.gate\.weight", _keep()),
    _Rule(
        r"(.+\.block_sparse_moe\.experts)\.routed_experts\.w13_weight",
        _split_experts(r"\1.{}.w1.weight", r"\1.{}.w3.weight"),
    ),
    _Rule(r"(.+\.block_sparse_moe\.experts)\.routed_experts\.w2_weight", _split_experts(r"\1.{}.w2.weight")),
)
_GPT2 = (
    _SCALES,
    _Rule(r"(?:transformer\.wte|lm_head)\.weight", _trim(lambda sizes: sizes.vocab)),
    _Rule(r"transformer\.h\.\d+\.(?:attn|mlp)\.c_\w+\.weight", _keep(transposed=True)),  # for Conv1D
    _Rule(r"transformer\.h\.\d+\.(?:attn|mlp)\.c_\w+\.bias", _keep()),
    _Rule(r"transformer\.(?:wpe|ln_f|h\.\d+\.ln_\d)" + _WB, _keep()),
)
_OPT = (
    _SCALES,
    _Rule(r"(?:model\.decoder\.embed_tokens|lm_head)\.weight", _trim(lambda sizes: sizes.vocab)),
    _Rule(r"(.+\.self_attn)\.qkv_proj" + _WB, _split_heads(r"\1.q_proj.\2", r"\1.k_proj.\2", r"\1.v_proj.\2")),
    _Rule(r"model\.decoder\.layers\.\d+\.(?:self_attn\.out_proj|fc1|fc2|\w+_layer_norm)" + _WB, _keep()),
    _Rule(r"model\.decoder\.(?:embed_positions|final_layer_norm|project_in|project_out)" + _WB, _keep()),
)
_BERT = (
    _SCALES,
    _Rule(r"model\.embeddings\.position_ids", _drop()),  # 0, 1, 2 …: computed, not loaded
    _Rule(r"model\.(embeddings\.word_embeddings\.weight)", _trim(lambda sizes: sizes.vocab, r"\1")),
    _Rule(r"model\.(embeddings\.position_embeddings\.weight)", _trim(lambda sizes: sizes.positions, r"\1")),
    _Rule(r"model\.(embeddings\.token_type_embeddings\.weight)", _trim(lambda sizes: sizes.token_types, r"\1")),
    _Rule(
        r"model\.(encoder\..+\.attention\.self)\.qkv_proj" + _WB,
        _split_heads(r"\1.query.\2", r"\1.key.\2", r"\1.value.\2"),
    ),
    _Rule(r"model\.((?:embeddings|encoder\..+)\.(?:dense|LayerNorm)\.(?:weight|bias))", _keep(r"\1")),
)

RULES: dict[str, tuple[_Rule, ...]] = {
    "bert.BertEmbeddingModel": _BERT,
    "gemma3.Gemma3ForCausalLM": _LLAMA,
    "gpt2.GPT2LMHeadModel": _GPT2,
    "llama.LlamaForCausalLM": _LLAMA,
    "mixtral.MixtralForCausalLM": _MIXTRAL,
    "opt.OPTForCausalLM": _OPT,
    "qwen2.Qwen2ForCausalLM": _LLAMA,
    "qwen3.Qwen3ForCausalLM": _LLAMA,
    "qwen3_moe.Qwen3MoeForCausalLM": _QWEN3_MOE,
}
"""Rules by vLLM's model class, its name relative to ``vllm.model_executor.models``. Each has a test on real vLLM."""


def plan_export(layout: Layout, records: Sequence[TensorRecord], config: Mapping[str, Any]) -> tuple[TensorPlan, ...]:
    """Plan the export of each stored tensor, in file order.

    Args:
        config: the model's ``config.json``.

    Raises:
        NoWayBack: the checkpoint is sharded, quantised, of an unknown model class, or does not match ``config``.
    """
    rules = _rules_for(layout)
    sizes = _Sizes.of(config)
    plans = tuple(_plan_tensor(record, rules, sizes) for record in records)
    counts = Counter(piece.name for plan in plans for piece in plan.pieces)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise NoWayBack(f"tensor {twice[0]!r} would be there twice")
    return plans


def holds_output_layer(plans: Sequence[TensorPlan]) -> bool:
    """Whether the output layer is a separate tensor, not tied to the embedding."""
    return any(piece.name == "lm_head.weight" for plan in plans for piece in plan.pieces)


def _rules_for(layout: Layout) -> tuple[_Rule, ...]:
    if layout.num_partitions != 1:
        raise NoWayBack(f"it is sharded over {layout.num_partitions} ranks; only a checkpoint of one rank is exported")
    if layout.quantization is not None:
        raise NoWayBack(f"it is quantised ({layout.quantization}); only plain weights are exported")
    rules = RULES.get(layout.model_class.removeprefix("vllm.model_executor.models."))
    if rules is None:
        raise NoWayBack(f"for {layout.model_class} it is not yet known how vLLM fuses its weights")
    return rules


def _plan_tensor(record: TensorRecord, rules: Sequence[_Rule], sizes: _Sizes) -> TensorPlan:
    for rule in rules:
        if match := re.fullmatch(rule.pattern, record.name):
            return rule.cut(match, record, sizes)
    raise NoWayBack(f"tensor {record.name!r} has no known Hugging Face name")
