"""Random models of several architectures for the cold-start benchmark, made once and kept; see ``cached_model``."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.common.cached_model import ensure_model
from benchmarks.common.supervise import ROOT, Workspace
from benchmarks.loading.bytecode import environment_of
from sllm_vllm.config import child_environment

ARCHITECTURES = ("llama", "opt", "qwen2", "qwen3", "gemma3", "gpt2")
"""The generating architectures of ``random_models``; not imported from there, because that import takes seconds."""


def ensure_architecture(workspace: Workspace, architecture: str, size: str) -> Path:
    """Return the directory of a model with seeded random weights; make it if it does not exist yet.

    Raises:
        CalledProcessError: the model could not be made; ``output`` says why.
    """
    if architecture == "llama":
        return ensure_model(workspace, size)
    path = workspace.cache / f"{architecture}-{size}"
    if path.exists():
        return path
    partial = workspace.run / path.name
    command = [sys.executable, "-m", "benchmarks.common.random_models", str(partial)]
    subprocess.run(
        [*command, "--size", size, "--architecture", architecture],
        cwd=ROOT,
        env=child_environment(**environment_of(workspace)),
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    subprocess.run(["sync", "-f", str(partial)], check=True)
    with contextlib.suppress(FileExistsError):  # another run was faster
        os.rename(partial, path)
    return path
