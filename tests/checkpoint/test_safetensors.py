"""Partitions are plain safetensors files: read back by that library, every tensor is there, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from sllm_vllm.checkpoint.core.dtypes import DTYPE_CODES
from sllm_vllm.checkpoint.core.header import LENGTH_NBYTES
from sllm_vllm.checkpoint.reader import Checkpoint, verify_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.loader.module_state import dtype_name, named_state
from sllm_vllm.loader.save import save_state
from sllm_vllm.loader.sink import byte_view
from tests.support.cases import every_case
from tests.support.checkpoints import CHUNK_NBYTES, make_key

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
PLAIN = [dtype for dtype in DTYPES if not dtype_name(dtype).startswith(("quint", "qint"))]
"""All but the quantised kinds, tensors of which have a scale and so no plain bytes."""


def random_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random bits, seen as `dtype`."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(high, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.view(dtype).view(shape)


def save(root: Path, state: Mapping[str, torch.Tensor]) -> Checkpoint:
    repository = CheckpointRepository(root)
    assert save_state(repository.stage(make_key(), CHUNK_NBYTES), 0, state)
    checkpoint = repository.find(make_key())
    verify_checkpoint(checkpoint)
    return checkpoint


def read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    with safe_open(checkpoint.partition(0).path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def bits(tensor: torch.Tensor) -> bytes:
    return byte_view(tensor.detach().contiguous()).numpy().tobytes()


def assert_reads_back(root: Path, state: dict[str, torch.Tensor]) -> None:
    found = read(save(root, state))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert bits(found[name]) == bits(tensor), name
        if dtype_name(tensor.dtype) in DTYPE_CODES:
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        else:
            assert found[name].dtype == torch.uint8
            assert list(found[name].shape[:-1]) == list(tensor.shape)


@every_case("dtype", PLAIN)
def test_every_dtype_reads_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = {"scalar": (), "odd": (3, 5), "large": (3, 4096), "empty": (0, 4)}
    state = {name: random_tensor(dtype, *shape, seed=len(name)) for name, shape in shapes.items()}
    assert_reads_back(tmp_path, state)


def test_no_common_dtype_was_left_out() -> None:
    assert {torch.float4_e2m1fn_x2, torch.float8_e8m0fnu, torch.bits16, torch.complex128} <= set(PLAIN)


def test_known_dtypes_are_those_of_torch_in_their_size() -> None:
    assert {name: getattr(torch, name).itemsize for name in DTYPE_CODES} == {
        name: nbytes for name, (_, nbytes) in DTYPE_CODES.items()
    }


@every_case(
    "nbytes",
    [1, CHUNK_NBYTES - 1, CHUNK_NBYTES, CHUNK_NBYTES + 1, 2 * CHUNK_NBYTES, 5 * CHUNK_NBYTES + 12_345],
)
def test_tensors_of_any_size_beside_a_chunk_read_back(tmp_path: Path, nbytes: int) -> None:
    names = ("first", "second", "third")
    assert_reads_back(tmp_path, {name: random_tensor(torch.uint8, nbytes, seed=len(name)) for name in names})


def test_mixture_of_dtypes_and_sizes_reads_back(tmp_path: Path) -> None:
    state = {
        f"{dtype_name(dtype)}.{size}": random_tensor(dtype, size, seed=size)
        for dtype in PLAIN
        for size in (0, 1, 7, 64, 255, 256, 5000)
    }
    assert_reads_back(tmp_path, state)


def test_tensors_lie_in_the_order_of_the_module_with_the_unaligned_ones_last(tmp_path: Path) -> None:
    state = {
        "byte": random_tensor(torch.int8, 3),
        "b": random_tensor(torch.float32, 64),
        "half": random_tensor(torch.bfloat16, 3),
        "a": random_tensor(torch.bfloat16, 128),
        "word": random_tensor(torch.float32, 3),
        "none": random_tensor(torch.float32, 0),
    }
    checkpoint = save(tmp_path, state)
    record = checkpoint.partition(0).record
    assert [tensor.name for tensor in record.tensors] == ["b", "a", "word", "none", "half", "byte"]
    raw = checkpoint.partition(0).path.read_bytes()
    assert LENGTH_NBYTES + int.from_bytes(raw[:LENGTH_NBYTES], "little") == record.header_nbytes
    assert record.header_nbytes % 4096 == 0
    assert raw[record.header_nbytes :].startswith(bits(state["b"]) + bits(state["a"]))


def non_contiguous() -> dict[str, torch.Tensor]:
    base = random_tensor(torch.float32, 32, 48)
    return {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(7, 48),
        "permuted": random_tensor(torch.bfloat16, 4, 5, 6).permute(2, 0, 1),
        "channels_last": random_tensor(torch.float16, 2, 3, 4, 5).to(memory_format=torch.channels_last),
        "of a storage": base.flatten()[100:133],
    }


@every_case("name", non_contiguous())
def test_non_contiguous_tensor_is_stored_row_major(tmp_path: Path, name: str) -> None:
    assert_reads_back(tmp_path, {name: non_contiguous()[name]})


class Tied(nn.Module):
    """A parameter under two names, a view of it, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.lm_head = nn.Linear(32, 64, bias=True)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("cache", torch.zeros(5), persistent=False)
        self.transposed = nn.Parameter(self.embed.weight.detach().t())


def test_tied_tensor_is_stored_once_under_its_first_name(tmp_path: Path) -> None:
    module = Tied()
    checkpoint = save(tmp_path, named_state(module))
    aliases = {tensor.name: tensor.aliases for tensor in checkpoint.partition(0).record.tensors}
    assert aliases["embed.weight"] == ["lm_head.weight"]
    assert "lm_head.weight" not in read(checkpoint)
    assert bits(read(checkpoint)["embed.weight"]) == bits(module.embed.weight)


def test_view_of_another_kind_is_stored_apart(tmp_path: Path) -> None:
    module = Tied()
    found = read(save(tmp_path, named_state(module)))
    assert torch.equal(found["transposed"], module.transposed)
    assert torch.equal(found["transposed"].t(), found["embed.weight"])


def test_persistent_buffers_are_stored_and_others_not(tmp_path: Path) -> None:
    found = read(save(tmp_path, named_state(Tied())))
    assert found.keys() == {"embed.weight", "lm_head.bias", "scale", "transposed"}
    assert found["scale"].shape == ()
    assert found["scale"].item() == 1.5


def test_empty_tensors_are_never_taken_to_be_tied(tmp_path: Path) -> None:
    found = read(save(tmp_path, {"a": torch.empty(0, 3), "b": torch.empty(0, 3)}))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"a": (0, 3), "b": (0, 3)}
