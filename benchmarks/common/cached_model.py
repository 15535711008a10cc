"""Random models that are made once and kept. A model gets its final name when complete, so no partial one is found."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.common.supervise import ROOT, Workspace
from benchmarks.loading.bytecode import environment_of
from sllm_vllm.config import child_environment

SIZES = ("tiny", "0.5GB", "1.2GB", "2GB")
"""The sizes that ``random_models.py`` knows; not imported from there, because that import takes seconds."""


def model_path(cache: Path, size: str) -> Path:
    """Path of the cached model of a size."""
    return cache / f"llama-{size}"


def ensure_model(workspace: Workspace, size: str) -> Path:
    """Return the directory of a Llama with seeded random weights; make it if it does not exist yet.

    Raises:
        CalledProcessError: the model could not be made; ``output`` says why.
    """
    path = model_path(workspace.cache, size)
    if not path.exists():
        partial = workspace.run / path.name
        command = [sys.executable, "-m", "benchmarks.common.random_models", str(partial), "--size", size]
        subprocess.run(
            command,
            cwd=ROOT,
            env=child_environment(**environment_of(workspace)),
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for file in partial.iterdir():
            _sync(file)
        with contextlib.suppress(FileExistsError):  # another run was faster
            os.rename(partial, path)
        _sync(workspace.cache)
    return path


def weight_files(model: Path) -> list[Path]:
    """The safetensors files of a model's directory.

    Raises:
        FileNotFoundError: it has none.
    """
    if not (files := sorted(model.glob("*.safetensors"))):
        raise FileNotFoundError(f"{model}: there is no *.safetensors file")
    return files


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
