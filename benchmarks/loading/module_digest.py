"""One digest over everything that loading filled, to check whether two loaders gave the same result."""

from __future__ import annotations

import torch
from torch import nn

from sllm_vllm.checkpoint.checksum import checksum, digest
from sllm_vllm.loader.module_state import named_state
from sllm_vllm.loader.sink import byte_view


def digest_module(module: nn.Module) -> str:
    """Digest of the names, dtypes, shapes and bits of a module's parameters and persistent buffers."""
    facts = [f"{name} {_digest_tensor(tensor)}" for name, tensor in sorted(named_state(module).items())]
    return digest("\n".join(facts).encode())


def _digest_tensor(tensor: torch.Tensor) -> str:
    data = byte_view(tensor.detach().cpu().contiguous()).numpy().data
    return f"{tensor.dtype} {list(tensor.shape)} {checksum(data)}"
