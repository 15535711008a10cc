"""Fixtures of all tests. Owns: the environment vLLM is imported in, and the random models of a test session."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

# Helpers that assert say what differs, as tests do. They are named before the first of them is imported.
HELPERS = ("support", "checkpoint", "e2e", "loader", "node", "router", "store")
pytest.register_assert_rewrite(*(f"tests.{name}" for name in HELPERS))

from tests.support.vllm_fill import prepare_environment  # noqa: E402

ModelDir = Callable[..., Path]

prepare_environment()

with contextlib.suppress(ModuleNotFoundError):  # a GPU machine may have torch and pytest alone
    from hypothesis import HealthCheck, settings

    # No test fails because the machine is slow: hypothesis allows 200 ms for an example by default.
    settings.register_profile("slow machines", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("slow machines")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    """Factory `model_dir(architecture, dtype="bfloat16", seed=0)` of tiny random models, made once a session.

    Tests share the directories: copy one before changing it.
    """
    root = tmp_path_factory.mktemp("models")

    def make(architecture: str = "llama", *, dtype: str = "bfloat16", seed: int = 0, size: str = "tiny") -> Path:
        # Imported here, because it loads torch and transformers.
        from benchmarks.common.random_models import write_random_model

        path = root / f"{architecture}-{size}-{dtype}-{seed}"
        if not path.exists():
            write_random_model(path, architecture, size=size, dtype=dtype, seed=seed)
        return path

    return make
