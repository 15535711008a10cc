"""Where weights come from, as the key of a checkpoint says it."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sllm_vllm.errors import CheckpointCorrupt, ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model_config(model: str | Path, **fields: Any) -> Any:
    return SimpleNamespace(model=str(model), revision=None, model_weights="", **fields)


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot in a Hugging Face cache, and that cache made the default one."""
    path = tmp_path / "models--org--name" / "snapshots" / COMMIT
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    refs = path.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return path


def test_a_name_and_its_snapshot_are_one_source(snapshot: Path) -> None:
    from sllm_vllm.loader.vllm_layout import source_of

    by_name, by_path = source_of(model_config("org/name")), source_of(model_config(snapshot))
    assert by_name.fingerprint == by_path.fingerprint == COMMIT
    assert by_path.model == "org/name"


def test_a_name_that_is_not_in_the_cache_has_no_source_yet(snapshot: Path) -> None:
    from sllm_vllm.loader.vllm_layout import source_of

    with pytest.raises(ConfigError, match="org/other: it is not in the Hugging Face cache yet"):
        source_of(model_config("org/other"))


def test_weights_in_an_object_store_have_no_fingerprint(tmp_path: Path) -> None:
    from sllm_vllm.loader.vllm_layout import source_of

    config = model_config(tmp_path)
    config.model_weights = "s3://bucket/model"
    with pytest.raises(ConfigError, match=r"s3://bucket/model: .* no fingerprint"):
        source_of(config)


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CheckpointCorrupt("/a/b", "it is torn", "mend it")))
    assert type(error) is CheckpointCorrupt
    assert str(error) == "/a/b: it is torn; mend it"
