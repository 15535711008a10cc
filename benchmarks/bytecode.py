"""Python's compiled bytecode for the processes that a benchmark starts, so that the first is no slower than the rest.

Most of a start of vLLM is Python's imports. Where an installation has no compiled bytecode and the environment forbids
Python to write it, every process compiles half a million lines anew. Then ours keep it in a directory of their own.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from benchmarks.supervise import ROOT, Workspace
from sllm_vllm.config import child_environment

WARM_UP = (
    "import vllm.entrypoints.cli.serve, vllm.v1.engine.core, vllm.model_executor.models.llama, sllm_vllm.loader.load;"
    "from vllm.platforms import current_platform;"
    "__import__('vllm.v1.worker.cpu_worker' if current_platform.is_cpu() else 'vllm.v1.worker.gpu_worker')"
)
"""What the processes of a server import, near enough."""


def environment_of(workspace: Workspace) -> dict[str, str]:
    """Variables of every process that a benchmark starts: its temporary directory, and its bytecode."""
    return {"TMPDIR": str(workspace.tmp), **bytecode_environment(workspace.cache)}


def bytecode_environment(cache: Path) -> dict[str, str]:
    """Variables for child processes; none where Python's own place for bytecode can be used."""
    if not sys.dont_write_bytecode or all(map(_is_compiled, ("vllm", "torch"))):
        return {}
    return {"PYTHONPYCACHEPREFIX": str(cache / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}


def warm_up(environment: dict[str, str]) -> None:
    """Import vLLM once: its bytecode is compiled then, and its libraries are in the page cache.

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
