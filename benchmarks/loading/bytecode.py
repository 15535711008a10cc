"""Compiled bytecode for the processes that a benchmark starts, so that the first start is no slower than the others.

Most of a vLLM start is Python imports. Where an installation has no compiled bytecode and the environment forbids
Python to write it, every process would compile half a million lines anew. In that case the benchmark's processes keep
their bytecode in a directory of their own.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from benchmarks.common.supervise import ROOT, Workspace
from sllm_vllm.config import child_environment

WARM_UP = (
    "import vllm.entrypoints.cli.serve, vllm.v1.engine.core, vllm.model_executor.models.llama, sllm_vllm.loader.load;"
    "from vllm.platforms import current_platform;"
    "__import__('vllm.v1.worker.cpu_worker' if current_platform.is_cpu() else 'vllm.v1.worker.gpu_worker')"
)
"""Approximately what the processes of a server import."""


def environment_of(workspace: Workspace) -> dict[str, str]:
    """Environment variables for every process that a benchmark starts: its directories for temporary files and
    bytecode.
    """
    return {"TMPDIR": str(workspace.tmp), **bytecode_environment(workspace.cache)}


def bytecode_environment(cache: Path) -> dict[str, str]:
    """Environment variables for child processes; empty if Python's usual bytecode location works."""
    if not sys.dont_write_bytecode or all(map(_is_compiled, ("vllm", "torch"))):
        return {}
    return {"PYTHONPYCACHEPREFIX": str(cache / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}


def warm_up(environment: dict[str, str]) -> None:
    """Import vLLM once, so that its bytecode is compiled and its libraries are in the page cache.

    Raises:
        CalledProcessError: vLLM can't be imported; ``output`` says why.
    """
    command = [sys.executable, "-c", WARM_UP]
    subprocess.run(
        command,
        cwd=ROOT,
        env=child_environment(**environment),
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _is_compiled(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return (
        found is not None and found.origin is not None and Path(importlib.util.cache_from_source(found.origin)).exists()
    )
