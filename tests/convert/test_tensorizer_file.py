"""Tensorizer files: what is written is read back, what is not sound is refused, and nothing is ever unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from tensorizer import torch_compat

from sllm_vllm.convert import tensorizer_file
from sllm_vllm.convert.tensorizer_file import TensorizerWriter, read_tensorizer
from sllm_vllm.errors import ConfigError, WriteError

TENSORS = {
    "embed.weight": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "layers.0.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "layers.0.bias": torch.tensor([1, -2, 3], dtype=torch.int8),
    "layers.1.weight": torch.arange(4, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "scale": torch.tensor(2.5),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.tensors"
    writer = TensorizerWriter(path)
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.close()
    return path


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, bytes(tensor.reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("group_nbytes", [1, 100, 1 << 30])
def test_reads_what_was_written(path: Path, monkeypatch: pytest.MonkeyPatch, group_nbytes: int) -> None:
    monkeypatch.setattr(tensorizer_file, "_GROUP_NBYTES", group_nbytes)
    found = {name: bits(tensor) for name, tensor in read_tensorizer(path)}
    assert found == {name: bits(tensor) for name, tensor in TENSORS.items()}


def test_nothing_is_unpickled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch_compat, "_TensorizerUnpickler", refuse)
    assert len(list(read_tensorizer(path))) == len(TENSORS)


def test_a_flipped_bit_is_noticed(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    place = raw.rindex(bytes(TENSORS["embed.weight"].numpy()))
    raw[place + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"embed\.weight"):
        list(read_tensorizer(path))


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.5, 0.99, 0.999])
def test_a_file_that_is_cut_off_is_refused(path: Path, share: float) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(ConfigError, match="not a valid tensorizer file"):
        list(read_tensorizer(path))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.tensors"
    path.write_bytes(pickle.dumps({"weight": [1, 2, 3]}) * 1000)
    with pytest.raises(ConfigError, match="not a valid tensorizer file"):
        list(read_tensorizer(path))
    with pytest.raises(ConfigError, match="No such file"):
        list(read_tensorizer(tmp_path / "nothing"))


def test_an_array_of_python_objects_is_refused(path: Path) -> None:
    """Numpy's way to hold pointers; a file that asks for one must not get it."""
    raw = path.read_bytes()
    assert raw.count(b"<f4") >= 2
    path.write_bytes(raw.replace(b"<f4", b"|O8"))
    with pytest.raises(ConfigError, match="not a valid tensorizer file"):
        list(read_tensorizer(path))


def test_a_place_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="no/model"):
        TensorizerWriter(tmp_path / "no" / "model.tensors")
