"""Which checkpoints nothing on a machine leads to any more, and what `list` knows of the others."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.core.manifest import Layout, Source, SourceFileRecord
from sllm_vllm.checkpoint.fingerprint import scan_source
from sllm_vllm.checkpoint.prune import find_unused
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
from sllm_vllm.checkpoint.source_records import SourceRecords
from tests.support.checkpoints import make_checkpoint, make_key

VLLM = "0.32.0"


@pytest.fixture
def repository(tmp_path: Path) -> CheckpointRepository:
    return CheckpointRepository(tmp_path / "store")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


def convert(repository: CheckpointRepository, model: Path, *, recorded_as: str = "", vllm_version: str = VLLM) -> str:
    """A checkpoint of the weights that ``model`` has now; returns its name."""
    found = SourceRecords(repository.root).identify(model, scan_source(model))
    source = Source(model=recorded_as or str(model), fingerprint=found.fingerprint, files=list(found.files))
    layout: Layout = make_key().layout.model_copy(update={"vllm_version": vllm_version})
    return make_checkpoint(repository.root, key=CheckpointKey(source, layout)).path.name


def unused(repository: CheckpointRepository) -> dict[str, str]:
    return {item.name: item.reason for item in find_unused(repository, vllm_version=VLLM)}


def test_checkpoint_of_weights_that_are_here_is_kept(repository: CheckpointRepository, model: Path) -> None:
    convert(repository, model)
    assert unused(repository) == {}


def test_checkpoint_of_weights_of_before_is_not(repository: CheckpointRepository, model: Path) -> None:
    before = convert(repository, model)
    (model / "model.safetensors").write_bytes(b"other!!")
    assert unused(repository) == {before: f"{model} has other weights now"}
    convert(repository, model)
    assert list(unused(repository)) == [before]


def test_checkpoint_of_a_source_that_has_gone_is_not(repository: CheckpointRepository, model: Path) -> None:
    name = convert(repository, model)
    shutil.rmtree(model)
    assert unused(repository) == {name: f"{model} is not on this machine"}


def test_checkpoint_of_a_hub_model_whose_weights_are_not_here_is_kept(
    repository: CheckpointRepository, tmp_path: Path
) -> None:
    """A start takes it by its commit: pulled without the weights, it is the only copy."""
    content = f"sha256:{'ab' * 32}"
    source = Source(
        model="org/model",
        fingerprint="f" * 32,
        files=[SourceFileRecord(name="model.safetensors", nbytes=7, digest=content)],
    )
    layout = make_key().layout.model_copy(update={"vllm_version": VLLM})
    make_checkpoint(repository.root, key=CheckpointKey(source, layout))
    assert unused(repository) == {}


def test_checkpoint_of_another_vllm_is_not(repository: CheckpointRepository, model: Path) -> None:
    convert(repository, model)
    old = convert(repository, model, vllm_version="0.27.1")
    assert unused(repository) == {old: "it is for vLLM 0.27.1, installed is 0.32.0"}
    assert find_unused(repository, vllm_version=None) == []


def test_builds_of_one_vllm_are_not_told_apart(repository: CheckpointRepository, model: Path) -> None:
    """The metadata of a build has a local part that ``vllm.__version__``, which a checkpoint records, may lack."""
    convert(repository, model)
    assert find_unused(repository, vllm_version=f"{VLLM}+cpu") == []
    convert(repository, model, vllm_version=f"{VLLM}+cu129")
    assert unused(repository) == {}


def test_checkpoint_that_was_made_elsewhere_is_kept_for_equal_weights(
    repository: CheckpointRepository, model: Path
) -> None:
    convert(repository, model, recorded_as="/on/another/machine")
    assert unused(repository) == {}


def test_use_of_a_checkpoint_is_remembered_until_it_is_removed(repository: CheckpointRepository, model: Path) -> None:
    name = convert(repository, model)
    assert repository.last_use_s(name) is None
    repository.note_use(name)
    used_s = repository.last_use_s(name)
    assert used_s is not None
    assert used_s == pytest.approx(time.time(), abs=60)
    repository.remove(name)
    assert repository.last_use_s(name) is None
