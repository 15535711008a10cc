"""Reads and writes tensorizer's ``.tensors`` files, a few tensors at a time. Needs torch and tensorizer.

Nothing in such a file is unpickled: it holds packed metadata and raw bytes. (Tensorizer's ``torch_compat`` module does
unpickle, but it is for other files and does nothing unless called; a test checks that it is not.)
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from tensorizer import TensorDeserializer, TensorSerializer
from tensorizer.serialization import HashMismatchError, TensorType

from sllm_vllm.checkpoint.writer import write_errors
from sllm_vllm.convert.model_files import sync_file
from sllm_vllm.errors import ConfigError
from sllm_vllm.units import GIB

TENSORIZER_NAME = "model.tensors"
_GROUP_NBYTES = GIB
"""Tensors are read in groups of about this size, because a deserializer keeps all it has read until it is closed."""

_READ_ERRORS = (
    *(OSError, ValueError, RuntimeError, TypeError, LookupError, ArithmeticError, AssertionError, MemoryError),
    *(struct.error, HashMismatchError),
)


def read_tensorizer(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the file, verified against its hashes, in file order.

    Raises:
        ConfigError: it is not an intact tensorizer file.
    """
    with _opened(path) as index:
        names = list(index.keys())
        group = max(1, _GROUP_NBYTES * len(names) // max(index.total_tensor_bytes, 1))
    for start in range(0, len(names), group):
        yield from _read_group(path, set(names[start : start + group]))


def _read_group(path: Path, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    with _opened(path, names) as reader:
        for _, _, name, tensor in reader.read_tensors(verify_hash=True):
            yield name, tensor.detach()


@contextlib.contextmanager
def _opened(path: Path, names: set[str] | None = None) -> Iterator[TensorDeserializer]:
    """Open the file; with ``names``, only these tensors of it."""
    keep = None if names is None else names.__contains__
    # Pass an open file instead of a path: tensorizer takes some paths for URLs.
    with (
        _read_errors(path),
        open(path, "rb") as file,
        TensorDeserializer(file, device="cpu", lazy_load=True, filter_func=keep) as reader,
    ):
        yield reader


class TensorizerWriter:
    """Writes tensors one by one. The file is complete and durable once ``close`` has returned.

    Raises:
        WriteError: the file can't be written; also raised by every method.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with write_errors(path):
            self._file = open(path, "wb+")  # noqa: SIM115 (closed by the serializer)
        self._serializer = TensorSerializer(self._file)
        self._num_tensors = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor; its bytes may reach the disk after this returns."""
        with write_errors(self._path):
            self._serializer.write_tensor(self._num_tensors, name, TensorType.PARAM, tensor)
        self._num_tensors += 1

    def close(self) -> None:
        """Finish the file and flush it to the storage device."""
        with write_errors(self._path):
            self._serializer.close()
            sync_file(self._path)


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn the errors that tensorizer raises for truncated, changed or other files into ``ConfigError``."""
    try:
        yield
    except _READ_ERRORS as error:
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: it is not a valid tensorizer file ({type(error).__name__}: {detail})") from None
