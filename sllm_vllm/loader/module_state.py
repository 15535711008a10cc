"""A live module as named tensors: which of them are stored, and which stored tensor fills which parameter.

Needs torch alone. A module's state is everything that vLLM's ``load_weights`` may have filled: parameters, persistent
buffers, and the non-persistent buffers that changed while the weights were loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from sllm_vllm.checkpoint.checksum import checksum
from sllm_vllm.checkpoint.core.layout import TensorSpec
from sllm_vllm.checkpoint.core.manifest import TensorRecord
from sllm_vllm.errors import LayoutMismatch, NotConvertible
from sllm_vllm.loader.sink import byte_view

_MEND_MISMATCH = "convert the model again for this configuration"


def named_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, in module order; tied ones under each of their names."""
    transient = set(_transient_buffers(module))
    buffers = {n: t for n, t in module.named_buffers(remove_duplicate=False) if n not in transient}
    return {**dict(module.named_parameters(remove_duplicate=False)), **buffers}


def _transient_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name in child._non_persistent_buffers_set:
            if (buffer := child._buffers.get(name)) is not None:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


class TransientBuffers:
    """Detects which non-persistent buffers loading changes: make it before the load, call ``changed`` after."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = self._checksums()

    def changed(self) -> dict[str, torch.Tensor]:
        """Buffers whose content has changed, or that are new."""
        after, buffers = self._checksums(), _transient_buffers(self._module)
        return {name: buffers[name] for name, value in after.items() if self._before.get(name) != value}

    def _checksums(self) -> dict[str, str]:
        buffers = _transient_buffers(self._module)
        return {n: checksum(_host_bytes(t)) for n, t in buffers.items() if not t.is_meta}


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A module's tensor, to be written. Implements the writer's ``TensorData``."""

    spec: TensorSpec
    tensor: torch.Tensor

    def pieces(self, nbytes_max: int) -> Iterator[memoryview]:
        """The tensor's bytes in row-major order. A tensor on a device is copied to the host one piece at a time."""
        flat = byte_view(self.tensor.detach().contiguous())
        for start in range(0, flat.numel(), nbytes_max):
            yield flat[start : start + nbytes_max].cpu().numpy().data


def storable_tensors(state: Mapping[str, torch.Tensor], path: str) -> list[LiveTensor]:
    """The tensors to store for ``state``: tied ones once, under the first of their names.

    Args:
        path: names the model in the error message.

    Raises:
        NotConvertible: a tensor has no plain bytes.
    """
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, list[str]] = {}
    for name, tensor in state.items():
        if problem := _no_plain_bytes(tensor):
            raise NotConvertible(path, f"parameter {name!r} {problem}", "the stock loader is used each time")
        canonical = first.setdefault(_identity(tensor), name)
        aliases.setdefault(canonical, []).append(name)
    return [
        LiveTensor(_spec(names[0], state[names[0]], tuple(names[1:])), state[names[0]]) for names in aliases.values()
    ]


def _spec(name: str, tensor: torch.Tensor, aliases: tuple[str, ...]) -> TensorSpec:
    itemsize = tensor.dtype.itemsize
    return TensorSpec(
        name=name,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        item_nbytes=itemsize,
        nbytes=tensor.numel() * itemsize,
        aliases=aliases,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _no_plain_bytes(tensor: torch.Tensor) -> str | None:
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return "is not initialised"
    if tensor.is_meta:
        return "is on the meta device (quantised while loading)"
    if tensor.is_quantized or tensor.layout != torch.strided:
        return f"is no plain tensor ({tensor.dtype}, {tensor.layout})"
    return None


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """A key that is equal for tensors that are the same view of the same memory."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _host_bytes(tensor: torch.Tensor) -> memoryview:
    return byte_view(tensor.detach().cpu().contiguous()).numpy().data


@dataclass(slots=True)
class ModuleTarget:
    """The live tensors of one record. Implements the sinks' ``Target``; empty once taken."""

    tensors: list[torch.Tensor]
    rebindable: bool

    def take(self) -> Sequence[torch.Tensor]:
        """Return the tensors and forget them."""
        taken, self.tensors = self.tensors, []
        return taken


@dataclass(slots=True)
class ModuleTargets:
    """Which record fills which parameters of a module. ``targets[i]`` belongs to record i."""

    targets: list[ModuleTarget]
    _index: dict[int, int] = field(default_factory=dict)

    def records_of(self, module: nn.Module) -> set[int]:
        """Records that ``module`` and its children need. Call it only before any of them was attached."""
        tensors = [*module.parameters(), *module.buffers()]
        return {self._index[id(tensor)] for tensor in tensors if id(tensor) in self._index}


def match_module(module: nn.Module, records: Sequence[TensorRecord], path: str) -> ModuleTargets:
    """Match a partition's records with a module's tensors; each record and each tensor must have a match.

    Raises:
        LayoutMismatch: a tensor is missing on either side, or differs in shape, dtype or ties.
    """
    state = named_state(module)
    fillable = {**_transient_buffers(module), **state}
    owner: dict[str, int] = {}
    targets = ModuleTargets([])
    shared = _shared_storages(module, fillable)
    for index, record in enumerate(records):
        distinct: dict[int, torch.Tensor] = {}
        for name in (record.name, *record.aliases):
            live = fillable.get(name)
            if live is None:
                raise LayoutMismatch(path, f"tensor {name!r} is not in this model", _MEND_MISMATCH)
            _check_tensor(name, live, record, path=path)
            owner[name] = index
            distinct[id(live)] = live
            if targets._index.setdefault(id(live), index) != index:
                raise LayoutMismatch(path, f"tensor {name!r} is tied in this model, but stored apart", _MEND_MISMATCH)
        targets.targets.append(ModuleTarget(list(distinct.values()), _rebindable(distinct, shared)))
    if missing := [name for name in state if name not in owner]:
        raise LayoutMismatch(path, f"tensor {missing[0]!r} is missing ({len(missing)} in all)", _MEND_MISMATCH)
    return targets


def _check_tensor(name: str, live: torch.Tensor, record: TensorRecord, *, path: str) -> None:
    if problem := _no_plain_bytes(live):
        raise LayoutMismatch(path, f"tensor {name!r} of this model {problem}", _MEND_MISMATCH)
    found, wanted = (record.dtype, record.shape), (dtype_name(live.dtype), list(live.shape))
    if found != wanted:
        problem = f"tensor {name!r} is {found[0]} {found[1]}, this model needs {wanted[0]} {wanted[1]}"
        raise LayoutMismatch(path, problem, _MEND_MISMATCH)


def _shared_storages(module: nn.Module, named: Mapping[str, torch.Tensor]) -> set[int]:
    """Storages that several different views share: replacing one view's memory would detach it from the others."""
    views: dict[int, set[tuple[object, ...]]] = {}
    attributes = (v for child in module.modules() for v in vars(child).values() if isinstance(v, torch.Tensor))
    for tensor in (*named.values(), *attributes):
        if not tensor.is_meta and tensor.layout == torch.strided and tensor.numel():
            views.setdefault(tensor.untyped_storage().data_ptr(), set()).add(_identity(tensor))
    return {storage for storage, identities in views.items() if len(identities) > 1}


def _rebindable(distinct: Mapping[int, torch.Tensor], shared: set[int]) -> bool:
    return all(
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and tensor.untyped_storage().data_ptr() not in shared
        and tensor.untyped_storage().nbytes() == math.prod(tensor.shape) * tensor.dtype.itemsize
        for tensor in distinct.values()
    )
