"""vLLM's entry point, in a process of its own as in every vLLM process."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
print("vllm.model_executor.model_loader" in sys.modules, "sllm_vllm.loader.vllm_loader" in sys.modules)
from vllm.model_executor.model_loader import get_model_loader
from vllm.config.load import LoadConfig
print(type(get_model_loader(LoadConfig(load_format="sllm"))).__name__)
"""


def test_the_loader_is_registered_once_somebody_imports_the_loaders_and_not_before() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-3:] == ["False", "False", "SllmModelLoader"]
