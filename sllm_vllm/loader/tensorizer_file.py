"""Tensorizer's ``.tensors`` files, read and written a few tensors at a time. Needs torch and tensorizer.

Nothing in such a file is unpickled: tensorizer keeps JSON-like metadata and raw bytes. (Its ``torch_compat`` module,
which does pickle, is for other files and is never imported here; a test watches that.)
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from tensorizer import TensorDeserializer, TensorSerializer
from tensorizer.serialization import HashMismatchError, TensorType

from sllm_vllm.checkpoint.writer import write_errors
from sllm_vllm.errors import ConfigError
from sllm_vllm.units import GIB

TENSORIZER_NAME = "model.tensors"
_GROUP_NBYTES = GIB
"""Tensors are read in groups of about this size, as a deserializer keeps all it has read until it is closed."""


def read_tensorizer(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the file, held against its hashes, in file order.

    Raises:
        ConfigError: it is no sound tensorizer file.
    """
    with _read_errors(path), open(path, "rb") as file:  # never by name: tensorizer would take some names for URLs
        with TensorDeserializer(file, device="cpu", lazy_load=True) as index:
            names = [str(name) for name in index.keys()]  # noqa: SIM118 (iterating it reads the tensors)
            group = max(1, _GROUP_NBYTES * len(names) // max(index.total_tensor_bytes, 1))
    for start in range(0, len(names), group):
        yield from _read_group(path, set(names[start : start + group]))


def _read_group(path: Path, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    with _read_errors(path), open(path, "rb") as file:
        reader = TensorDeserializer(
            file, device="cpu", lazy_load=True, verify_hash=True, filter_func=lambda name: name in names
        )
        with reader:
            for _, _, name, tensor in reader.read_tensors():
                yield str(name), tensor.detach()


class TensorizerWriter:
    """Writes tensors one after the other. A context manager; the file is durable after it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb+")  # noqa: SIM115 (closed by the serializer)
        self._serializer = TensorSerializer(self._file)
        self._num_tensors = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor; its bytes are on the way to the disk when this returns."""
        with write_errors(self._path):
            self._serializer.write_tensor(self._num_tensors, name, TensorType.PARAM, tensor)
        self._num_tensors += 1

    def close(self) -> None:
        """Finish the file and force it to the device.

        Raises:
            WriteError: the device refused.
        """
        with write_errors(self._path):
            self._serializer.close()
            sync_file(self._path)


def sync_file(path: Path) -> None:
    """Force a file's bytes to the device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """What tensorizer raises for a file that is cut off, changed or something else, as one error."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, struct.error, HashMismatchError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: it is no sound tensorizer file ({type(error).__name__}: {detail})") from None
