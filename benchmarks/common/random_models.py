"""Random models of real architectures, as Hugging Face model directories.

Owns: configs, seeded weights under the names that real checkpoints use, and a byte-level tokenizer, all made without a
network. Tests and benchmarks call `write_random_model`; from a shell:

    python -m benchmarks.common.random_models PATH --architecture llama --size tiny --dtype bfloat16 --seed 0

Weights are drawn with variance 1 / fan-in, and norms are near 1, so that layers outweigh the embedding in the residual
stream. Greedy output then wanders through the vocabulary instead of repeating the last token.
"""

import argparse
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.whisper.tokenization_whisper import LANGUAGES

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
# Rows of the embedding that no token uses, as in most real checkpoints.
NUM_PADDED_ROWS = 12
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
W8A8_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}
MEL_BINS, AUDIO_CLIP_S = 80, 10
WHISPER_TOKENS = (
    "<|startoftranscript|>",
    *(f"<|{code}|>" for code in LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|prev|>",
    "<|notimestamps|>",
)
# Special tokens in addition to SPECIAL_TOKENS; the last of the vocabulary.
MEDIA_TOKENS = {"whisper": WHISPER_TOKENS}
OUTPUT_LAYERS = ("lm_head.weight", "proj_out.weight")
SMALL_IF_TIED = frozenset({"embed_tokens", "embed_positions", "wte", "wpe"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Shape of a decoder; two tensor-parallel ranks can share every dimension."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab: int


SIZES = {
    # 5 MB as llama in bfloat16; heads of 64, which every CPU attention kernel supports.
    "tiny": Size(hidden=256, intermediate=512, num_layers=4, num_heads=4, num_kv_heads=2, vocab=512),
    # 0.47 GB as llama in bfloat16.
    "0.5GB": Size(hidden=2048, intermediate=4096, num_layers=6, num_heads=32, num_kv_heads=8, vocab=4096),
    # 1.21 GB as llama in bfloat16.
    "1.2GB": Size(hidden=2048, intermediate=4096, num_layers=16, num_heads=32, num_kv_heads=8, vocab=8192),
    # 2.02 GB as llama in bfloat16.
    "2GB": Size(hidden=2048, intermediate=5504, num_layers=22, num_heads=32, num_kv_heads=8, vocab=8192),
}


def _decoder_fields(size: Size) -> dict[str, Any]:
    """Config fields that llama and the architectures derived from it name alike."""
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.hidden // size.num_heads,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }


def _llama(size: Size) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**_decoder_fields(size), tie_word_embeddings=False)


def _llama_w8a8(size: Size) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**_decoder_fields(size), tie_word_embeddings=False, quantization_config=W8A8_CONFIG)


def _qwen2(size: Size) -> transformers.PretrainedConfig:
    fields = _decoder_fields(size)
    del fields["head_dim"]
    return transformers.Qwen2Config(**fields, tie_word_embeddings=False)


def _qwen3(size: Size) -> transformers.PretrainedConfig:
    return transformers.Qwen3Config(**_decoder_fields(size), tie_word_embeddings=True)


def _qwen3_moe(size: Size) -> transformers.PretrainedConfig:
    return transformers.Qwen3MoeConfig(
        **_decoder_fields(size),
        moe_intermediate_size=size.intermediate // 4,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )


def _gemma3(size: Size) -> transformers.PretrainedConfig:
    return transformers.Gemma3TextConfig(
        **_decoder_fields(size),
        query_pre_attn_scalar=size.hidden // size.num_heads,
        sliding_window=64,
        layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(size.num_layers)],
        tie_word_embeddings=True,
    )


def _gpt2(size: Size) -> transformers.PretrainedConfig:
    return transformers.GPT2Config(
        vocab_size=size.vocab,
        n_positions=2048,
        n_embd=size.hidden,
        n_inner=size.intermediate,
        n_layer=size.num_layers,
        n_head=size.num_heads,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def _opt(size: Size) -> transformers.PretrainedConfig:
    return transformers.OPTConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        word_embed_proj_dim=size.hidden,
        ffn_dim=size.intermediate,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=2048,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def _bert(size: Size) -> transformers.PretrainedConfig:
    return transformers.BertConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=512,
        pad_token_id=PAD_ID,
    )


ARCHITECTURES: dict[str, Callable[[Size], transformers.PretrainedConfig]] = {
    "llama": _llama,
    "llama_w8a8": _llama_w8a8,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": _bert,
}


def _whisper(size: Size) -> transformers.PretrainedConfig:
    first_special = size.vocab - NUM_PADDED_ROWS - len(WHISPER_TOKENS)
    return transformers.WhisperConfig(
        vocab_size=size.vocab,
        d_model=size.hidden,
        encoder_layers=size.num_layers,
        decoder_layers=size.num_layers,
        encoder_attention_heads=size.num_heads,
        decoder_attention_heads=size.num_heads,
        encoder_ffn_dim=size.intermediate,
        decoder_ffn_dim=size.intermediate,
        num_mel_bins=MEL_BINS,
        max_source_positions=AUDIO_CLIP_S * 50,
        max_target_positions=448,
        decoder_start_token_id=first_special,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


# Architectures that read audio; their directories also contain a feature extractor.
MEDIA_ARCHITECTURES: dict[str, Callable[[Size], transformers.PretrainedConfig]] = {"whisper": _whisper}
# Architectures that embed instead of generating.
POOLING_ARCHITECTURES = frozenset({"bert"})
# Architectures whose output layer is the embedding, so that their checkpoints have no `lm_head.weight`.
TIED_ARCHITECTURES = frozenset({"qwen3", "gemma3", "gpt2", "opt"})


def write_random_model(
    path: Path, architecture: str, *, size: str = "tiny", dtype: str = "bfloat16", seed: int = 0
) -> Path:
    """Write a model directory (created if necessary) and return `path`; the same arguments write the same bytes."""
    path.mkdir(parents=True, exist_ok=True)
    config = (ARCHITECTURES | MEDIA_ARCHITECTURES)[architecture](SIZES[size])
    config.dtype = getattr(torch, dtype)
    shapes = _checkpoint_shapes(config, architecture)
    tensors = _random_tensors(shapes, config, seed=seed)
    if architecture == "llama_w8a8":
        tensors = _quantized_w8a8(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(path)
    if architecture not in POOLING_ARCHITECTURES:
        transformers.GenerationConfig(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID).save_pretrained(
            path
        )
    _write_tokenizer(
        path, vocab_size=SIZES[size].vocab - NUM_PADDED_ROWS, more_tokens=MEDIA_TOKENS.get(architecture, ())
    )
    if architecture in MEDIA_ARCHITECTURES:
        _write_feature_extractor(path)
    return path


def _empty_model(config: transformers.PretrainedConfig, architecture: str) -> torch.nn.Module:
    """Build the model on the meta device."""
    auto_class = {
        **dict.fromkeys(POOLING_ARCHITECTURES, transformers.AutoModel),
        "whisper": transformers.AutoModelForSpeechSeq2Seq,
    }.get(architecture, transformers.AutoModelForCausalLM)
    with torch.device("meta"):
        model: torch.nn.Module = auto_class.from_config(_without_quantization(config))
    return model


def _checkpoint_shapes(config: transformers.PretrainedConfig, architecture: str) -> dict[str, torch.Size]:
    """Names and shapes of the checkpoint's tensors, from the model on the meta device; sets `config.architectures`."""
    model = _empty_model(config, architecture)
    config.architectures = [type(model).__name__]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        for name in OUTPUT_LAYERS:
            shapes.pop(name, None)
    return dict(itertools.chain.from_iterable(_unfused(name, shape) for name, shape in shapes.items()))


def _without_quantization(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    return type(config).from_dict(fields)


def _unfused(name: str, shape: torch.Size) -> Iterator[tuple[str, torch.Size]]:
    """Split the fused experts of transformers' modules into one matrix per expert, as checkpoints store them."""
    stem, _, last = name.rpartition(".")
    if not stem.endswith(".experts"):
        yield name, shape
        return
    num_experts, num_rows, num_columns = shape
    for expert in range(num_experts):
        if last == "gate_up_proj":
            yield f"{stem}.{expert}.gate_proj.weight", torch.Size((num_rows // 2, num_columns))
            yield f"{stem}.{expert}.up_proj.weight", torch.Size((num_rows // 2, num_columns))
        else:
            yield f"{stem}.{expert}.{last}.weight", torch.Size((num_rows, num_columns))


def _random_tensors(
    shapes: dict[str, torch.Size], config: transformers.PretrainedConfig, *, seed: int
) -> dict[str, torch.Tensor]:
    # Torch uses one thread to draw a tensor, and releases the GIL meanwhile.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tensors = pool.map(lambda name: _random_tensor(name, shapes[name], config, seed=seed), shapes)
        return dict(zip(shapes, tensors, strict=True))


def _random_tensor(name: str, shape: torch.Size, config: transformers.PretrainedConfig, *, seed: int) -> torch.Tensor:
    """A random tensor that depends only on its name, shape, config and `seed`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    tensor = torch.randn(shape, generator=generator, dtype=config.dtype)
    if name.endswith(".bias"):
        return tensor.mul_(0.02)
    if len(shape) == 1:
        # Gemma's norms multiply by 1 + weight.
        return tensor.mul_(0.05).add_(0.0 if config.model_type.startswith("gemma") else 1.0)
    # GPT-2's Conv1D stores its weights transposed.
    fan_in = shape[0] if ".c_" in name else shape[1:].numel()
    # A tied embedding as large as the layers' outputs would make each token predict itself.
    is_small = config.tie_word_embeddings and name.split(".")[-2] in SMALL_IF_TIED
    return tensor.mul_(fan_in**-0.5 * (0.25 if is_small else 1.0))


def _quantized_w8a8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace each projection by int8 rows with one scale per row, as compressed-tensors stores them."""
    quantized: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            quantized[name] = tensor
            continue
        scale = (tensor.float().abs().amax(dim=1, keepdim=True) / 127).to(tensor.dtype)
        quantized[name] = (tensor.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        quantized[f"{name}_scale"] = scale
    return quantized


def _write_tokenizer(path: Path, *, vocab_size: int, more_tokens: Sequence[str]) -> None:
    """Write a byte-level BPE tokenizer of `vocab_size` tokens, most of them pronounceable syllables.

    Args:
        more_tokens: additional special tokens, the last of the vocabulary.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet]
    merges = list(itertools.islice(_syllable_merges(), vocab_size - len(tokens) - len(more_tokens)))
    tokens += [*(left + right for left, right in merges), *more_tokens]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*SPECIAL_TOKENS, *more_tokens)])
    assert tokenizer.get_vocab_size() == vocab_size
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL_TOKENS[PAD_ID],
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))


def _write_feature_extractor(path: Path) -> None:
    """Write the config of the feature extractor, which turns audio into mel spectrograms, as transformers saves it."""
    fields = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": MEL_BINS,
        "chunk_length": AUDIO_CLIP_S,
        "sampling_rate": 16000,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(fields, indent=2))


def _syllable_merges() -> Iterator[tuple[str, str]]:
    """About 20,000 merges: pairs of letters, those pairs after a space, and pairs of pairs."""
    syllables = [c + v for c in "bcdfghjklmnpqrstvwxyz" for v in "aeiou"]
    yield from ((s[0], s[1]) for s in syllables)
    yield from (("Ġ", s) for s in syllables)
    yield from itertools.product(syllables, syllables)
    yield from ((f"Ġ{a}", b) for a in syllables for b in syllables)


def main() -> None:
    """Command line of `write_random_model`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES | MEDIA_ARCHITECTURES), default="llama")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    path = write_random_model(
        arguments.path,
        arguments.architecture,
        size=arguments.size,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    num_bytes = (path / "model.safetensors").stat().st_size
    print(f"{path}: {arguments.architecture}, {num_bytes / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
