"""Fixtures of all tests. Owns: the environment vLLM is imported in, and the random models of a test session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vllm_fill import prepare_environment

ModelDir = Callable[..., Path]

prepare_environment()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    """Factory `model_dir(architecture, dtype="bfloat16", seed=0)` of tiny random models, made once a session.

    Tests share the directories: copy one before changing it.
    """
    root = tmp_path_factory.mktemp("models")

    def make(architecture: str = "llama", *, dtype: str = "bfloat16", seed: int = 0, size: str = "tiny") -> Path:
        # Imported here, because it loads torch and transformers.
        from benchmarks.random_models import write_random_model

        path = root / f"{architecture}-{size}-{dtype}-{seed}"
        if not path.exists():
            write_random_model(path, architecture, size=size, dtype=dtype, seed=seed)
        return path

    return make
