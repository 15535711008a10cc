"""The file that an engine's arguments name: read as vLLM reads it, and never waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sllm_vllm.errors import ConfigError
from sllm_vllm.node.core.launch import num_slots_of
from sllm_vllm.node.engine_config import CONFIG_NBYTES_MAX, expand_config
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.config.values import engine_words


def write(directory: Path, text: str) -> None:
    (directory / "engine.yaml").write_text(text)


def test_parallel_sizes_in_a_file_are_slots(tmp_path: Path) -> None:
    write(tmp_path, "tensor-parallel-size: 2\nprefill_context_parallel_size: 2\nenforce-eager: true\n")
    words = expand_config(("--config", "engine.yaml"), tmp_path)
    assert num_slots_of(words) == 4
    assert num_slots_of(expand_config(("--config", str(tmp_path / "engine.yaml"), "-pcp", "3"), "/")) == 6
    assert expand_config(("-tp", "2"), tmp_path) == ("-tp", "2")


def test_a_model_takes_the_slots_that_its_file_says(tmp_path: Path) -> None:
    write(tmp_path, "tensor-parallel-size: 4\n")
    values = {"name": "m", "engine_arguments": {"config": "engine.yaml"}}
    model = ModelConfig.model_validate(values, context={"directory": str(tmp_path)})
    assert model.engine_arguments == ("--config", "engine.yaml")
    assert model.spec(0).accelerators == 4
    assert model.model_copy(update={"priority": 1}).num_accelerators == 4


def test_a_file_is_named_in_two_words_as_vllm_reads_no_other() -> None:
    assert engine_words({"config": "a.yaml"}) == ["--config", "a.yaml"]


def test_a_file_that_vllm_would_not_take_is_refused(tmp_path: Path) -> None:
    mapping, yaml = "must be a mapping of options", "it is not valid YAML"
    wrong = {"- a": mapping, "1: 2": mapping, "a: !!python/object:os.system x": yaml, "a: [": yaml}
    for text, problem in wrong.items():
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ConfigError, match=f"--config wrong.yaml: {problem}"):
            expand_config(("--config", "wrong.yaml"), tmp_path)
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "large.yaml").write_text("#" * (CONFIG_NBYTES_MAX + 1))
    for name, problem in {"fifo.yaml": "regular", "large.yaml": "larger", "gone.yml": "No such file"}.items():
        with pytest.raises(ConfigError, match=problem):
            expand_config(("--config", name), tmp_path)
    with pytest.raises(ConfigError, match="reads only"):
        expand_config(("--config", "engine.json"), tmp_path)
