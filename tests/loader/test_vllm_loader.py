"""The vLLM loader where something is wrong: it serves where it can, says in one line what it met, loses nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.errors import CheckpointCorrupt, ConfigError, LayoutMismatch
from tests.conftest import ModelDir
from tests.loader.test_bit_identity import wait_until_written
from tests.support.vllm_fill import Fill, engine_config, load_model


@dataclass(slots=True)
class Loads:
    """Loads one model again and again with one store, and remembers what was logged."""

    model: Path
    store: Path
    report: Path
    records: list[str]

    def load(self, **extra: Any) -> str:
        """The whole of ``load_model``; returns the outcome."""
        config = {"store_dir": str(self.store), "report_path": str(self.report), **extra}
        self.records.clear()
        load_model(Fill(self.model, load_format="sllm", extra_config=config))
        wait_until_written()
        outcome: str = json.loads(self.report.read_text())["outcome"]
        return outcome

    @property
    def checkpoint(self) -> Path:
        """The one checkpoint in the store."""
        (manifest,) = self.store.glob(f"[!.]*/{MANIFEST_NAME}")
        return manifest.parent

    @property
    def partition(self) -> Path:
        return self.checkpoint / "partitions" / "rank-00000.safetensors"

    def warned(self, *fragments: str) -> bool:
        """Whether one logged line has all ``fragments``."""
        return any(all(part in line for part in fragments) and "\n" not in line for line in self.records)


@pytest.fixture
def loads(model_dir: ModelDir, tmp_path: Path) -> Iterator[Loads]:
    """The loads of a tiny model into an empty store."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    configure_logging_if_needed(LoggingConfig())  # drops the handlers that are there; else a first load would do it

    records: list[str] = []

    class Remember(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith("vllm.sllm_vllm"):
                records.append(record.getMessage())

    handler = Remember(logging.WARNING)
    logging.getLogger("vllm").addHandler(handler)
    model = tmp_path / "model"
    shutil.copytree(model_dir("llama"), model)
    yield Loads(model, tmp_path / "store", tmp_path / "report.json", records)
    logging.getLogger("vllm").removeHandler(handler)


def flip_bit(file: Path, offset: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        value = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([value ^ 1]))


def test_unknown_key_is_an_error_that_names_the_known_ones(loads: Loads) -> None:
    with pytest.raises(ConfigError, match=r"'thread': unknown key; known keys: .*threads.*report_path"):
        loads.load(thread=2)


def test_without_write_through_nothing_is_written(loads: Loads) -> None:
    assert loads.load(write_through=False) == "unconverted"
    assert not loads.store.exists()


def test_changed_weights_are_converted_again(loads: Loads, model_dir: ModelDir) -> None:
    assert [loads.load(), loads.load()] == ["converted", "loaded"]
    shutil.copy(model_dir("llama", seed=1) / "model.safetensors", loads.model)
    assert [loads.load(), loads.load()] == ["converted", "loaded"]


@pytest.mark.parametrize("content", [b"", b'{"format":"sllm-checkpoint","version":1', b"{}"])
def test_a_half_written_manifest_is_reported_set_aside_and_replaced(loads: Loads, content: bytes) -> None:
    loads.load()
    (loads.checkpoint / MANIFEST_NAME).write_bytes(content)
    assert loads.load() == "converted"
    assert loads.warned("event=checkpoint_unused", MANIFEST_NAME, "convert the model again")
    assert loads.load() == "loaded"
    assert len(list((loads.store / ".rejected").iterdir())) == 1


def test_a_truncated_partition_is_reported_set_aside_and_replaced(loads: Loads) -> None:
    loads.load()
    os.truncate(loads.partition, loads.partition.stat().st_size - 1)
    assert loads.load() == "converted"
    assert loads.warned("event=checkpoint_unused", "rank-00000.safetensors", "the manifest says")
    assert loads.load() == "loaded"


@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_flipped_bit_stops_the_start_and_the_next_one_converts_again(loads: Loads, verify: str) -> None:
    loads.load()
    flip_bit(loads.partition, loads.partition.stat().st_size - 5000)
    with pytest.raises(CheckpointCorrupt, match=r"chunk 0 differs from its checksum \(tensors: .*next start converts"):
        loads.load(verify=verify)
    assert loads.load() == "converted"
    assert loads.load(verify="always") == "loaded"


def test_a_broken_header_is_found_before_anything_is_filled_so_the_start_goes_on(loads: Loads) -> None:
    loads.load()
    flip_bit(loads.partition, 100)
    assert loads.load() == "unconverted"
    assert loads.warned("event=checkpoint_unused", "rank-00000.safetensors", "its header differs from its checksum")
    assert [loads.load(), loads.load()] == ["converted", "loaded"]


def test_a_bit_that_flips_after_the_first_use_is_found_by_always(loads: Loads) -> None:
    loads.load()
    assert loads.load(verify="first") == "loaded"
    flip_bit(loads.partition, loads.partition.stat().st_size - 5000)
    with pytest.raises(CheckpointCorrupt):
        loads.load(verify="always")


def test_a_missing_tensor_falls_back_to_the_source(loads: Loads) -> None:
    loads.load()
    file = loads.checkpoint / MANIFEST_NAME
    manifest = json.loads(file.read_text())
    tensors = manifest["partitions"][0]["tensors"]
    tensors[0]["name"] += "_other"
    file.write_text(json.dumps(manifest))
    assert loads.load(verify="never") == "unconverted"
    assert loads.warned("event=checkpoint_unused", "rank-00000.safetensors", "_other' is not in this model")


def test_a_checkpoint_for_another_tensor_parallel_size_is_refused(loads: Loads) -> None:
    loads.load()
    alone = loads.store.parent / "alone"
    shutil.copytree(loads.model, alone, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(loads.checkpoint, alone, dirs_exist_ok=True)
    manifest = json.loads((alone / MANIFEST_NAME).read_text())
    manifest["layout"]["tensor_parallel_size"] = 2
    (alone / MANIFEST_NAME).write_text(json.dumps(manifest))
    loads.model = alone
    with pytest.raises(LayoutMismatch, match=r"manifest.json: it is for tensor_parallel_size 2 instead of 1; convert"):
        loads.load()


def test_a_checkpoint_beside_config_json_is_the_model_itself(loads: Loads) -> None:
    loads.load()
    alone = loads.store.parent / "alone"
    shutil.copytree(loads.model, alone, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(loads.checkpoint, alone, dirs_exist_ok=True)
    loads.model, loads.store = alone, loads.store.parent / "other"
    assert loads.load() == "loaded"


def test_a_store_that_cannot_be_made_serves_unconverted(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm_vllm.loader.vllm.source.ModelSource.start_reading", None)  # weights are not read for it
    loads.store.parent.joinpath("file").write_text("")
    loads.store = loads.store.parent / "file" / "store"
    assert loads.load() == "unconverted"
    assert loads.warned("event=not_converted", "file/store", "set another store_dir")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, smaller than any model."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_no_space_left_serves_unconverted(loads: Loads, small_disk: Path) -> None:
    loads.store = small_disk / "store"
    assert loads.load() == "unconverted"
    assert loads.warned("event=not_converted", "no space is left", "set another store_dir")
    written = [path for path in loads.store.rglob("*") if path.is_file() and path.stat().st_size]
    assert [path for path in written if path.parent.name != ".sources"] == []


def test_a_read_only_store_is_used_and_never_written(loads: Loads, small_disk: Path) -> None:
    loads.load()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    read_only = Loads(loads.model, small_disk / "store", loads.report, loads.records)
    shutil.copytree(loads.store, read_only.store)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert read_only.load() == "loaded"
    weights = read_only.model / "model.safetensors"
    flip_bit(weights, weights.stat().st_size - 2)
    assert read_only.load() == "unconverted"
    assert loads.warned("event=not_converted", "make the store writable")


def test_the_constructor_touches_nothing(loads: Loads) -> None:
    from vllm.model_executor.model_loader import get_model_loader

    extra = {"store_dir": str(loads.store)}
    get_model_loader(engine_config(Fill(loads.model, load_format="sllm", extra_config=extra)).load_config)
    assert not loads.store.exists()
