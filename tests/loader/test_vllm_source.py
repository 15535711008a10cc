"""Where the weights of a load come from, and what is noticed about them while they are loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sllm_vllm.checkpoint.source_records import SourceRecords
from sllm_vllm.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model_config(model: str | Path, **fields: Any) -> Any:
    return SimpleNamespace(**{"model": str(model), "revision": None, "model_weights": "", **fields})


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
    from sllm_vllm.loader.vllm.source import locate

    by_name, by_path = locate(model_config("org/name")), locate(model_config(snapshot))
    assert by_name == by_path
    assert (by_path.model, by_path.commit) == ("org/name", COMMIT)


def test_another_download_dir_is_where_a_names_weights_are(snapshot: Path, tmp_path: Path) -> None:
    from sllm_vllm.loader.vllm.source import locate

    found = locate(model_config("org/name"), str(tmp_path / "downloads"))
    assert found.directory == tmp_path / "downloads" / "models--org--name" / "snapshots" / COMMIT


def test_snapshot_without_a_real_commit_is_a_plain_directory(snapshot: Path) -> None:
    from sllm_vllm.loader.vllm.source import locate

    from_ray = snapshot.rename(snapshot.with_name("0" * 40))
    found = locate(model_config(from_ray))
    assert (found.model, found.commit) == (str(from_ray), None)


def test_two_sources_of_one_name_and_commit_are_two_keys(tmp_path: Path) -> None:
    from sllm_vllm.loader.vllm.source import source_of

    fingerprints = set()
    for content in (b"here", b"else"):
        path = tmp_path / content.decode() / "models--org--name" / "snapshots" / COMMIT
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(content)
        fingerprints.add(source_of(model_config(path), SourceRecords(tmp_path / "store")).fingerprint)
    assert len(fingerprints) == 2


def test_weights_that_are_still_to_be_downloaded(snapshot: Path, tmp_path: Path) -> None:
    from sllm_vllm.loader.vllm.source import ModelSource, locate

    source = ModelSource(locate(model_config("org/name")), SourceRecords(tmp_path / "store"))
    source.start_reading(afresh=False)
    assert (source.files, source.known()) == (None, None)
    (snapshot / "model.safetensors").write_bytes(b"weights")  # as the load does
    assert [file.name for file in source.finish_reading().files] == ["model.safetensors"]


def test_weights_that_change_while_they_are_loaded_are_not_converted(tmp_path: Path) -> None:
    from sllm_vllm.loader.vllm.source import ModelSource, locate

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"before")
    source = ModelSource(locate(model_config(tmp_path)), SourceRecords(tmp_path / "store"))
    source.start_reading(afresh=False)
    weights.write_bytes(b"later")
    with pytest.raises(ConfigError, match=r"changed while they were loaded|written to while it is read"):
        source.finish_reading()


@pytest.mark.parametrize("begins_reading", [True, False])
def test_link_to_a_deployment_that_was_set_to_and_fro_during_the_load(tmp_path: Path, begins_reading: bool) -> None:
    """The files are the same before and after; what was loaded may be the other deployment's."""
    from sllm_vllm.loader.vllm.source import ModelSource, locate

    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "model.safetensors").write_bytes(version.encode())
    set_link(tmp_path / "releases", tmp_path)
    set_link(tmp_path / "current", Path("releases/v1"))
    source = ModelSource(locate(model_config(tmp_path / "current")), SourceRecords(tmp_path / "store"))
    if begins_reading:
        source.start_reading(afresh=False)
        assert source._reading is not None
        source._reading.result()
    set_link(tmp_path / "current", Path("releases/v2"))
    set_link(tmp_path / "current", Path("releases/v1"))
    with pytest.raises(ConfigError, match="changed while they were loaded"):
        source.finish_reading()


def set_link(link: Path, target: Path) -> None:
    """Atomically, as deployments do."""
    new = link.with_name("new")
    new.symlink_to(target)
    new.rename(link)


def test_file_links_that_were_set_to_and_fro_during_the_load(tmp_path: Path) -> None:
    from sllm_vllm.loader.vllm.source import ModelSource, locate

    model = tmp_path / "model"
    model.mkdir()
    for version in ("v1", "v2"):
        (tmp_path / version).write_bytes(version.encode())
    set_link(model / "model.safetensors", tmp_path / "v1")
    source = ModelSource(locate(model_config(model)), SourceRecords(tmp_path / "store"))
    source.identify()
    set_link(model / "model.safetensors", tmp_path / "v2")
    set_link(model / "model.safetensors", tmp_path / "v1")
    with pytest.raises(ConfigError, match="changed while they were loaded"):
        source.finish_reading()


def test_load_by_name_during_which_the_name_moved_on_is_not_converted(snapshot: Path, tmp_path: Path) -> None:
    """The stock loader asks the Hub again: it has loaded the new commit, whose files lie elsewhere."""
    from sllm_vllm.loader.vllm.source import ModelSource, locate

    (snapshot / "model.safetensors").write_bytes(b"weights")
    source = ModelSource(locate(model_config("org/name")), SourceRecords(tmp_path / "store"))
    source.start_reading(afresh=False)
    (snapshot.parents[1] / "refs" / "main").write_text("f" * 40)
    with pytest.raises(ConfigError, match="changed while they were loaded"):
        source.finish_reading()


def test_load_of_a_commit_by_name_has_no_name_that_moves(snapshot: Path, tmp_path: Path) -> None:
    from sllm_vllm.loader.vllm.source import ModelSource, locate

    (snapshot / "model.safetensors").write_bytes(b"weights")
    source = ModelSource(locate(model_config("org/name", revision=COMMIT)), SourceRecords(tmp_path / "store"))
    source.start_reading(afresh=False)
    assert source.finish_reading().revision == COMMIT


def test_weights_of_a_second_model_keep_a_module_from_being_converted() -> None:
    from sllm_vllm.loader.vllm.source import require_weights_here

    sources = [SimpleNamespace(model_or_path="/a"), SimpleNamespace(model_or_path="org/audio")]
    module: Any = SimpleNamespace(secondary_weights=sources)
    with pytest.raises(ConfigError, match="some of its weights are loaded from org/audio"):
        require_weights_here(module, model_config("/a"))
    module.secondary_weights = sources[:1]
    require_weights_here(module, model_config("/a"))


def test_a_name_that_is_not_in_the_cache_has_no_source_yet(snapshot: Path) -> None:
    from sllm_vllm.loader.vllm.source import locate

    with pytest.raises(ConfigError, match="org/other: it is not in the Hugging Face cache yet"):
        locate(model_config("org/other"))


def test_a_file_has_no_source(tmp_path: Path) -> None:
    from sllm_vllm.loader.vllm.source import locate

    with pytest.raises(ConfigError, match=r"model\.gguf: it is not in the Hugging Face cache yet"):
        locate(model_config(tmp_path / "model.gguf"))


def test_weights_in_an_object_store_have_no_fingerprint(tmp_path: Path) -> None:
    from sllm_vllm.loader.vllm.source import locate

    with pytest.raises(ConfigError, match=r"s3://bucket/model: .* no fingerprint"):
        locate(model_config(tmp_path, model_weights="s3://bucket/model"))
