"""After any edit of its source, what our loader puts into a module is what the stock loader puts there now."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sllm_vllm.checkpoint import source_records
from sllm_vllm.checkpoint.fingerprint import read_samples, scan_source
from sllm_vllm.errors import SourceChanged
from tests.conftest import ModelDir
from tests.loader.test_bit_identity import _fill_and_tell, _same, wait_until_written
from tests.support.vllm_fill import Fill, empty_module, engine_config, tensors_after_load_weights

if TYPE_CHECKING:
    import torch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAYOUTS = ("plain", "sharded", "bin", "hub", "links to blobs elsewhere", "from object store")


@pytest.fixture(autouse=True)
def _believing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this moment count as settled: else every look reads, and no state is ever believed."""
    monkeypatch.setattr(source_records, "_SETTLED_NS", 30_000_000)


@dataclass(slots=True)
class Source:
    """A model in one layout; ``files`` are the weights' real files."""

    model: Path
    files: list[Path]


def lay_out(layout: str, model: Path, root: Path) -> Source:
    """Copy ``model`` to below ``root``."""
    if layout == "hub":
        target = root / "models--org--name" / "snapshots" / COMMIT
    elif layout == "from object store":
        target = root / "models--s3---bucket" / "snapshots" / ("0" * 40)
    else:
        target = root / "model"
    shutil.copytree(model, target)
    if layout in ("sharded", "hub", "links to blobs elsewhere"):
        split(target / "model.safetensors")
    if layout == "bin":
        to_bin(target / "model.safetensors")
    files = sorted(p for p in target.iterdir() if p.suffix in (".safetensors", ".bin"))
    if layout in ("hub", "links to blobs elsewhere"):
        blobs = root / ("models--org--name/blobs" if layout == "hub" else "mount/blobs")
        blobs.mkdir(parents=True)
        files = [link(file, blobs) for file in files]
    return Source(target, files)


def split(file: Path) -> None:
    """Two shards and their index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, file.with_name(shard), metadata={"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    file.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()


def to_bin(file: Path) -> None:
    from safetensors.torch import load_file

    save_pickled(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def save_pickled(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """As ``torch.save``, which else writes the file's name into it."""
    import torch

    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    file.write_bytes(buffer.getvalue())


def link(file: Path, blobs: Path) -> Path:
    target = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(target)
    file.symlink_to(target)
    return target


def write_in_place(source: Source, chance: random.Random) -> None:
    """Other values in a tensor; size and mtime kept."""
    change_values(chance.choice(source.files))


def change_values(file: Path) -> None:
    times, content = file.stat(), file.read_bytes()
    if content[:2] == b"PK":
        change_pickled(file)
    else:
        offset = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:offset] + bytes([(content[offset] + 1) % 256]) + content[offset + 1 :])
    assert file.stat().st_size == times.st_size
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_pickled(file: Path) -> None:
    import torch

    tensors = torch.load(file, weights_only=True)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_pickled(tensors, file)


def replace_keeping_times(source: Source, chance: random.Random) -> None:
    """As ``rsync -t`` does."""
    file = chance.choice(source.files)
    new = file.with_name("new")
    shutil.copy2(file, new)
    change_values(new)
    new.rename(file)


def touch(source: Source, chance: random.Random) -> None:
    chance.choice(source.files).touch()


EDITS: list[Callable[[Source, random.Random], None]] = [write_in_place, replace_keeping_times, touch]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loaded_tensors_are_stocks_after_each_edit(layout: str, model_dir: ModelDir, tmp_path: Path) -> None:
    chance = random.Random(layout)
    source = lay_out(layout, model_dir("llama"), tmp_path)
    ours = Fill(source.model, load_format="sllm", extra_config={"store_dir": str(tmp_path / "store")})
    edits: list[Callable[[Source, random.Random], None]] = [*EDITS, chance.choice(EDITS)]
    chance.shuffle(edits)
    outcomes = [fill_like_stock(ours), fill_like_stock(ours)]
    for edit in edits:
        edit(source, chance)
        outcomes.append(fill_like_stock(ours))
    expected = ["loaded" if edit is touch else "converted" for edit in edits]
    assert outcomes == ["converted", "loaded", *expected]


def fill_like_stock(ours: Fill) -> str:
    """Fill a module both ways and compare; returns our loader's outcome."""
    outcome, found = _fill_and_tell(ours)
    wait_until_written()
    stock = tensors_after_load_weights(Fill(ours.model_dir))
    assert [name for name in stock.keys() | found.keys() if not _same(stock.get(name), found.get(name))] == []
    return outcome


def test_link_to_nowhere_beside_changed_weights(model_dir: ModelDir, tmp_path: Path) -> None:
    """It made the files of a Hub snapshot count as not downloaded yet, and the commit alone as their identity."""
    source = lay_out("hub", model_dir("llama"), tmp_path)
    ours = Fill(source.model, load_format="sllm", extra_config={"store_dir": str(tmp_path / "store")})
    assert fill_like_stock(ours) == "converted"
    change_values(source.files[0])
    (source.model / "pytorch_model.bin").symlink_to("../../blobs/gone")
    assert [fill_like_stock(ours), fill_like_stock(ours)] == ["converted", "loaded"]


def test_store_copied_without_its_records_after_an_edit_through_a_link(model_dir: ModelDir, tmp_path: Path) -> None:
    """``cp -r store/* new`` leaves hidden folders; then a blob's name must not count as its content."""
    source = lay_out("hub", model_dir("llama"), tmp_path)
    ours = Fill(source.model, load_format="sllm", extra_config={"store_dir": str(tmp_path / "store")})
    assert fill_like_stock(ours) == "converted"
    shutil.rmtree(tmp_path / "store" / ".sources")
    assert fill_like_stock(ours) == "loaded", "names are trusted"
    change_values(source.files[0])
    shutil.rmtree(tmp_path / "store" / ".sources")
    assert fill_like_stock(ours) == "converted"


def test_changed_weights_are_told_in_one_line(model_dir: ModelDir, tmp_path: Path) -> None:
    source = lay_out("from object store", model_dir("llama"), tmp_path)
    ours = Fill(source.model, load_format="sllm", extra_config={"store_dir": str(tmp_path / "store")})
    fill_like_stock(ours)
    change_values(source.files[0])
    told: list[str] = []
    with lines_of_the_loader(told):
        fill_like_stock(ours)
    (line,) = [line for line in told if "event=source_changed" in line]
    assert line.endswith("num_files=1 files=model.safetensors")


@contextlib.contextmanager
def lines_of_the_loader(lines: list[str]) -> Iterator[None]:
    class Remember(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Remember(logging.WARNING), logging.getLogger("vllm")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def test_always_notices_what_the_files_state_does_not_tell(model_dir: ModelDir, tmp_path: Path) -> None:
    source = lay_out("plain", model_dir("llama"), tmp_path)
    extra = {"store_dir": str(tmp_path / "store"), "verify_source": "always"}
    ours = Fill(source.model, load_format="sllm", extra_config=extra)
    assert [fill_like_stock(ours), fill_like_stock(ours)] == ["converted", "loaded"]
    (record,) = (tmp_path / "store" / ".sources").glob("*.json")
    before = json.loads(record.read_text())
    change_values(source.files[0])
    (sightings,) = before["sightings"].values()
    status = source.files[0].stat()
    sightings[0]["state"] = [status.st_size, *(status.st_mtime_ns, status.st_ctime_ns), status.st_ino, status.st_dev]
    sightings[0]["samples"] = read_samples(scan_source(source.model)[-1])
    record.write_text(json.dumps(before))  # as a file system without ctime and inodes would have it
    with pytest.raises(SourceChanged, match=r"other ones than those that .* was made from; start again"):
        fill_like_stock(ours)
    assert fill_like_stock(ours) == "converted"


def test_reload_takes_no_checkpoint_of_another_configuration(model_dir: ModelDir, tmp_path: Path) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    live, other = tmp_path / "live", tmp_path / "other"
    shutil.copytree(model_dir("llama"), live)
    shutil.copytree(model_dir("llama", seed=1), other)
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    (other / "config.json").write_text(json.dumps(config))
    extra = {"store_dir": str(tmp_path / "store")}
    assert fill_like_stock(Fill(other, load_format="sllm", extra_config=extra)) == "converted"
    engine = engine_config(Fill(live, load_format="sllm", extra_config=extra))
    engine.model_config.model = str(other)  # as vLLM's reload_weights has it
    with set_current_vllm_config(engine):
        weights = get_model_loader(engine.load_config).get_all_weights(engine.model_config, empty_module(engine))
        names = {name for name, _ in weights}
    assert "model.layers.0.self_attn.q_proj.weight" in names, "fused names are ours"


def test_stock_preload_does_not_see_other_values(model_dir: ModelDir, tmp_path: Path) -> None:
    """What README says of it; vLLM's own daemon needs a GPU, its key does not."""
    from vllm.model_executor.model_loader.weight_cache.protocol import hash_checkpoint

    source = lay_out("plain", model_dir("llama"), tmp_path)
    before = hash_checkpoint(str(source.model))
    change_values(source.files[0])
    assert before is not None
    assert hash_checkpoint(str(source.model)) == before
