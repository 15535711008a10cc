"""What the source weights are, told without reading them: the fingerprint that makes changed weights a miss."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from sllm_vllm.checkpoint.checksum import digest
from sllm_vllm.errors import ConfigError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".tensors", ".gguf")
INDEX_SUFFIX = ".index.json"
_SAMPLE_NBYTES = 64 << 10


def fingerprint_directory(directory: str | os.PathLike[str]) -> str:
    """Digest over the weight files of a model directory: name, size, time of change, and samples of the bytes.

    A file that is a link into a content-addressed cache (Hugging Face's) is known by its target's name, which is the
    hash of its content, so the same snapshot has the same fingerprint on every machine.

    Raises:
        ConfigError: the directory can't be read or holds no weight file.
    """
    root = Path(directory)
    try:
        named = sorted(p for p in root.iterdir() if p.name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX)))
        files = [file for file in named if stat.S_ISREG(file.stat().st_mode)]
        facts = [_facts(file) for file in files]
    except OSError as error:
        raise ConfigError(
            f"{root}: its weights can't be read ({error.strerror}); mend the path or permissions"
        ) from None
    if not any(file.name.endswith(WEIGHT_SUFFIXES) for file in files):
        raise ConfigError(f"{root}: there are no weight files ({', '.join(WEIGHT_SUFFIXES)}); give a model's directory")
    return digest(json.dumps(facts).encode())


def _facts(file: Path) -> list[str | int]:
    if file.is_symlink() and (target := file.resolve()).parent.name == "blobs":
        return [file.name, target.name]
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns, digest(_samples(file, status.st_size))]


def _samples(file: Path, nbytes: int) -> bytes:
    """The first and the last of the file, and one sample in each eighth: catches what keeps size and time."""
    offsets = {nbytes * part // 8 for part in range(8)} | {max(nbytes - _SAMPLE_NBYTES, 0)}
    with file.open("rb") as handle:
        return b"".join(os.pread(handle.fileno(), _SAMPLE_NBYTES, offset) for offset in sorted(offsets))


def has_weight_files(directory: str | os.PathLike[str]) -> bool:
    """Whether a model directory holds weights that the stock loader could read."""
    try:
        return any(name.endswith(WEIGHT_SUFFIXES) for name in os.listdir(directory))
    except OSError:
        return False
