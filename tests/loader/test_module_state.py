"""A module's state: what is stored, what ties mean, and what does not match."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from sllm_vllm.checkpoint.core.manifest import Layout, Source
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
from sllm_vllm.config import LoaderConfig
from sllm_vllm.errors import LayoutMismatch, NotConvertible
from sllm_vllm.loader.load import load_module
from sllm_vllm.loader.module_state import TransientBuffers, named_state, storable_tensors
from sllm_vllm.loader.report import LoadReport
from sllm_vllm.loader.save import save_state
from tests.support.cases import every_case


class Tied(nn.Module):
    """Embedding and head share a parameter; a buffer is stored, another is not; one weight is transposed."""

    scale: torch.Tensor
    cache: torch.Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(40, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.body = nn.Linear(32, 32)
        self.turned = nn.Parameter(torch.empty(32, 48).t())
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(16), persistent=False)
        for tensor in (*self.parameters(), self.scale):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator))


def layout(**changes: object) -> Layout:
    facts = {"model_class": "Tied", "dtype": "float32", "device_type": "cpu", "vllm_version": "0", "config_digest": "0"}
    return Layout.model_validate({**facts, **changes})


def stored(module: nn.Module, store: Path, chunk_nbytes: int = 4096) -> CheckpointKey:
    key = CheckpointKey(Source(model="tied", fingerprint="f"), layout())
    staging = CheckpointRepository(store).stage(key, chunk_nbytes)
    assert save_state(staging, 0, named_state(module))
    return key


def loaded(module: nn.Module, store: Path, key: CheckpointKey, *, verify: str = "always") -> LoadReport:
    checkpoint = CheckpointRepository(store).find(key)
    config = LoaderConfig.from_extra_config({"store_dir": store, "verify": verify})
    return load_module(checkpoint.partition(0), module, config)


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    pairs = zip(named_state(first).items(), named_state(second).items(), strict=True)
    for (name, one), (other_name, other) in pairs:
        assert name == other_name
        assert torch.equal(one, other), name


@pytest.mark.parametrize("chunk_nbytes", [4096, 8192, 1 << 20])
def test_a_module_comes_back_bit_for_bit(tmp_path: Path, chunk_nbytes: int) -> None:
    source, target = Tied(1), Tied(2)
    report = loaded(target, tmp_path, stored(source, tmp_path, chunk_nbytes))
    assert_equal(source, target)
    assert report.nbytes == sum(t.numel() * 4 for t in (*source.parameters(), source.scale))


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    source, target = Tied(1), Tied(2)
    tensors = storable_tensors(named_state(source), "model")
    assert next((t.spec.name, t.spec.aliases) for t in tensors) == ("turned", ())
    assert ("embed.weight", ("head.weight",)) in [(t.spec.name, t.spec.aliases) for t in tensors]
    loaded(target, tmp_path, stored(source, tmp_path))
    assert target.head.weight is target.embed.weight


def test_views_of_one_storage_stay_views_of_one_storage(tmp_path: Path) -> None:
    def shared(value: float) -> nn.Module:
        module, whole = nn.Module(), torch.full((64, 64), value)
        module.whole = nn.Parameter(whole)
        module.register_buffer("upper", whole[:32])
        return module

    source, target = shared(1.0), shared(2.0)
    loaded(target, tmp_path, stored(source, tmp_path))
    assert_equal(source, target)
    assert target.get_parameter("whole").data_ptr() == target.get_buffer("upper").data_ptr()


def test_large_contiguous_parameters_are_rebound_not_copied(tmp_path: Path) -> None:
    source, target = Tied(1), Tied(2)
    before = target.body.weight.data_ptr()
    loaded(target, tmp_path, stored(source, tmp_path))
    assert target.body.weight.data_ptr() != before


def test_a_buffer_that_loading_changed_is_noticed() -> None:
    module = Tied(1)
    transient = TransientBuffers(module)
    assert transient.changed() == {}
    module.cache[3] = 1.0
    assert list(transient.changed()) == ["cache"]


def test_a_changed_transient_buffer_comes_back(tmp_path: Path) -> None:
    source, target = Tied(1), Tied(2)
    source.cache.fill_(7.0)
    key = CheckpointKey(Source(model="tied", fingerprint="f"), layout())
    state = {**named_state(source), "cache": source.cache}
    save_state(CheckpointRepository(tmp_path).stage(key, 4096), 0, state)
    loaded(target, tmp_path, key)
    assert torch.equal(target.cache, source.cache)


def dtypes() -> list[torch.dtype]:
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return sorted((d for d in found if "qint" not in str(d) and "quint" not in str(d)), key=str)


@every_case("dtype", dtypes())
@every_case("shape", [(), (0,), (3,), (5, 7), (64, 128)])
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.randint(0, 2, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)

    def holding(data: torch.Tensor) -> nn.Module:
        module = nn.Module()
        module.register_buffer("value", data.view(dtype).view(shape))
        return module

    source, target = holding(raw), holding(torch.zeros_like(raw))
    loaded(target, tmp_path, stored(source, tmp_path))
    assert torch.equal(target.get_buffer("value").reshape(-1).view(torch.uint8), raw)


@every_case(
    "change, problem",
    [
        (lambda m: setattr(m, "extra", nn.Parameter(torch.zeros(2))), "'extra' is missing"),
        (lambda m: delattr(m, "turned"), "'turned' is not in this model"),
        (
            lambda m: setattr(m, "body", nn.Linear(32, 31)),
            r"is float32 \[32, 32\], .* needs float32 \[31, 32\]",
        ),
        (lambda m: m.body.half(), r"is float32 \[32, 32\], this model needs float16"),
        (lambda m: setattr(m.body, "bias", nn.Parameter(torch.empty(32, device="meta"))), "meta device"),
    ],
)
def test_a_module_of_another_shape_is_refused_untouched(tmp_path: Path, change: object, problem: str) -> None:
    key, target = stored(Tied(1), tmp_path), Tied(2)
    change(target)  # type: ignore[operator]
    before = target.embed.weight.detach().clone()
    with pytest.raises(LayoutMismatch, match=problem) as caught:
        loaded(target, tmp_path, key)
    assert "rank-00000.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(target.embed.weight, before)


def test_tied_here_but_stored_apart_is_refused(tmp_path: Path) -> None:
    apart = Tied(1)
    apart.head.weight = nn.Parameter(torch.rand(40, 32))
    key = stored(apart, tmp_path)
    with pytest.raises(LayoutMismatch, match="tied in this model, but stored apart"):
        loaded(Tied(2), tmp_path, key)


def test_stored_tied_fills_an_untied_module(tmp_path: Path) -> None:
    target = Tied(2)
    target.head.weight = nn.Parameter(torch.rand(40, 32))
    source = Tied(1)
    loaded(target, tmp_path, stored(source, tmp_path))
    assert torch.equal(target.head.weight, source.embed.weight)


@every_case(
    "parameter",
    [
        lambda: nn.Parameter(torch.empty(2, device="meta")),
        lambda: nn.UninitializedParameter(),
        lambda: torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
        lambda: torch.eye(3).to_sparse(),
    ],
)
def test_what_has_no_plain_bytes_is_not_convertible(parameter: object) -> None:
    with pytest.raises(NotConvertible, match="'weight' is"):
        storable_tensors({"weight": parameter()}, "model")  # type: ignore[operator]
