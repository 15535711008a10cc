"""Converting on real vLLM: the checkpoint that a start with `--load-format sllm` would find, and the same bits.

Conversions of one rank run one after the other in one spawned process, as importing vLLM takes its time; the one of two
ranks runs as a user's would.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.reader import open_checkpoint, verify_checkpoint
from sllm_vllm.convert import parent as conversion
from sllm_vllm.convert.export import export_checkpoint
from sllm_vllm.convert.parent import (
    BytesDone,
    Converted,
    ConvertRequest,
    Event,
    RankDone,
    RankJob,
    StageBegun,
    convert_model,
)
from sllm_vllm.errors import LayoutMismatch, SllmError
from tests.conftest import ModelDir
from tests.support.vllm_fill import Fill, prepare_environment, run_ranks, tensors_after_load_weights
from tests.support.vllm_server import vllm_server

if TYPE_CHECKING:
    import torch

Converter = Callable[..., tuple[Converted, list[Event]]]


def convert_here(job: RankJob) -> list[Event]:
    """Body of the spawned process: one conversion of one rank; leaves no process group behind."""
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    from sllm_vllm.convert.rank import convert_rank

    events: list[Event] = []
    try:
        convert_rank(job, events.append)
    except SllmError as error:
        raise SllmError(str(error)) from None  # the others do not survive pickling
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()
    return events


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare_environment) as pool:
        yield pool


@pytest.fixture
def convert(process: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Converter:
    """`convert_model`, but for the process: the rank runs in one that has vLLM imported already."""

    def call(model: Path, *, out: Path | None = None, **arguments: Any) -> tuple[Converted, list[Event]]:
        events: list[Event] = []

        def run_ranks(
            request: ConvertRequest, root: Path, model_files: Path | None, *, on_event: Callable[[Event], None]
        ) -> Converted:
            run_dir = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
            run_dir.mkdir()
            events.extend(process.submit(convert_here, RankJob(request, 0, run_dir, root, model_files)).result())
            done = events[-1]
            assert isinstance(done, RankDone)
            return Converted(done.checkpoint, (done.outcome,), done.dtype)

        monkeypatch.setattr(conversion, "run_ranks", run_ranks)
        request = ConvertRequest(model=str(model), store_dir=tmp_path / "store", out=out, **arguments)
        return convert_model(request), events

    return call


def load(fill: Fill) -> tuple[dict[str, torch.Tensor], str, str]:
    """A module's tensors as our loader fills it, and the outcome and the checkpoint of its report."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    from tests.support.vllm_fill import cloned_tensors, empty_module, engine_config

    config = engine_config(fill)
    module = empty_module(config)
    loader = get_model_loader(config.load_config)
    with set_current_vllm_config(config):
        loader.load_weights(module, config.model_config)
    return cloned_tensors(module), loader.report.outcome, loader.report.checkpoint


def is_loaded_like_stock(model: Path, source: Path, store: Path, *, dtype: str = "auto") -> str:
    """Load `model` from a checkpoint and `source` the stock way and compare; returns the checkpoint's path."""
    import torch

    settings = {"store_dir": str(store), "write_through": False}
    ours, outcome, path = load(Fill(model, load_format="sllm", extra_config=settings, dtype=dtype))
    stock = tensors_after_load_weights(Fill(source, dtype=dtype))
    assert outcome == "loaded"
    assert list(ours) == list(stock)
    assert [name for name in stock if not torch.equal(ours[name], stock[name])] == []
    return path


def told_nbytes(events: list[Event], rank: int = 0) -> dict[str, tuple[int | None, int]]:
    """For each stage, the bytes announced and the bytes told."""
    told: dict[str, tuple[int | None, int]] = {}
    stage = ""
    for event in events:
        if isinstance(event, StageBegun) and event.rank == rank:
            stage = event.stage
            told[stage] = (event.nbytes, 0)
        elif isinstance(event, BytesDone) and event.rank == rank:
            told[stage] = (told[stage][0], told[stage][1] + event.nbytes)
    return told


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "llama_w8a8"])
def test_serving_finds_what_was_converted(
    model_dir: ModelDir, convert: Converter, tmp_path: Path, architecture: str
) -> None:
    model = model_dir(architecture)
    converted, events = convert(model)
    assert converted.outcomes == ("written",)
    path = is_loaded_like_stock(model, model, tmp_path / "store")
    assert path == str(converted.checkpoint)
    announced, told = told_nbytes(events)["write"]
    assert announced == told


def test_a_second_conversion_finds_the_first(model_dir: ModelDir, convert: Converter) -> None:
    first, _ = convert(model_dir())
    second, events = convert(model_dir())
    assert second.was_found
    assert second.checkpoint == first.checkpoint
    assert told_nbytes(events) == {}


def test_dtype_is_part_of_the_key(model_dir: ModelDir, convert: Converter, tmp_path: Path) -> None:
    first, _ = convert(model_dir())
    second, _ = convert(model_dir(), dtype="float32")
    assert (second.outcomes, second.dtype) == (("written",), "float32")
    path = is_loaded_like_stock(model_dir(), model_dir(), tmp_path / "store", dtype="float32")
    assert path == str(second.checkpoint) != str(first.checkpoint)


def test_a_partition_that_is_done_is_not_loaded_again(model_dir: ModelDir, convert: Converter, tmp_path: Path) -> None:
    converted, _ = convert(model_dir())
    unpublish(converted.checkpoint, tmp_path / "store", ranks=[0])
    again, events = convert(model_dir())
    assert again.outcomes == ("kept",)
    assert told_nbytes(events) == {}
    assert verify_checkpoint(open_checkpoint(again.checkpoint)) > 0


def test_a_broken_checkpoint_is_set_aside_and_made_anew(
    model_dir: ModelDir, convert: Converter, tmp_path: Path
) -> None:
    converted, _ = convert(model_dir())
    (converted.checkpoint / "partitions" / "rank-00000.safetensors").unlink()
    again, _ = convert(model_dir())
    assert again.outcomes == ("written",)
    is_loaded_like_stock(model_dir(), model_dir(), tmp_path / "store")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "bert"])
def test_out_is_a_model_of_its_own(model_dir: ModelDir, convert: Converter, tmp_path: Path, architecture: str) -> None:
    out = tmp_path / "models" / architecture
    converted, _ = convert(model_dir(architecture), out=out)
    assert (converted.checkpoint, converted.dtype) == (out, None)
    assert is_loaded_like_stock(out, model_dir(architecture), tmp_path / "empty") == str(out)
    assert not list(out.glob("*.safetensors"))
    assert (out / "tokenizer.json").exists()
    assert [path.name for path in out.parent.iterdir()] == [architecture]
    assert not (tmp_path / "store").exists()


def test_out_holds_embeddings_that_the_source_unties(model_dir: ModelDir, convert: Converter, tmp_path: Path) -> None:
    """vLLM unties when it finds `lm_head.weight` in the source's files; nobody can find it beside a checkpoint."""
    model = shutil.copytree(model_dir("qwen3"), tmp_path / "untied")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    convert(model, out=tmp_path / "out")
    is_loaded_like_stock(tmp_path / "out", model, tmp_path / "empty")


def test_out_says_the_dtype_that_the_source_leaves_open(
    model_dir: ModelDir, convert: Converter, tmp_path: Path
) -> None:
    """vLLM then looks into the source's files, which are not beside a checkpoint."""
    model = shutil.copytree(model_dir(dtype="float16"), tmp_path / "open")
    edit_config(model, dtype=None, torch_dtype=None)
    convert(model, out=tmp_path / "out")
    is_loaded_like_stock(tmp_path / "out", model, tmp_path / "empty")


def with_dense_module(model: Path, target: Path, *, suffix: str = "safetensors") -> Path:
    """A copy of ``model`` as a sentence-transformers model whose embeddings go through a linear layer."""
    import torch

    shutil.copytree(model, target)
    size = json.loads((model / "config.json").read_text())["hidden_size"]
    names = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(names)
    ]
    (target / "modules.json").write_text(json.dumps(modules))
    for folder in ("1_Pooling", "2_Dense"):
        (target / folder).mkdir()
    pooling = {"word_embedding_dimension": size, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    (target / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    dense = {"in_features": size, "out_features": 16, "bias": False}
    (target / "2_Dense" / "config.json").write_text(json.dumps(dense))
    weights = {"linear.weight": torch.randn(16, size, generator=torch.Generator().manual_seed(1))}
    if suffix == "safetensors":
        save_file(weights, target / "2_Dense" / "model.safetensors")
    else:
        torch.save(weights, target / "2_Dense" / "pytorch_model.bin")
    return target


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_out_has_the_weights_that_vllm_reads_outside_its_loader(
    model_dir: ModelDir, convert: Converter, tmp_path: Path, suffix: str
) -> None:
    model = with_dense_module(model_dir(), tmp_path / "model", suffix=suffix)
    out = tmp_path / "out"
    convert(model, out=out)
    assert [path.name for path in (out / "2_Dense").glob(f"*.{suffix}")]
    assert is_loaded_like_stock(out, model, tmp_path / "empty") == str(out)


def test_a_module_that_was_changed_beside_a_checkpoint_is_not_passed_over(
    model_dir: ModelDir, convert: Converter, tmp_path: Path
) -> None:
    model = with_dense_module(model_dir(), tmp_path / "model")
    convert(model, out=tmp_path / "out")
    weights = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    save_file(
        {name: tensor * 2 for name, tensor in weights.items()}, tmp_path / "out" / "2_Dense" / "model.safetensors"
    )
    with pytest.raises(LayoutMismatch, match=r"2_Dense/model\.safetensors beside it changed since the conversion"):
        load(Fill(tmp_path / "out", load_format="sllm"))


def test_weights_beside_a_checkpoint_win_if_they_are_other_ones(
    model_dir: ModelDir, convert: Converter, tmp_path: Path
) -> None:
    out, settings = tmp_path / "out", {"store_dir": str(tmp_path / "store"), "write_through": False}
    convert(model_dir(), out=out)
    shutil.copy(model_dir() / "model.safetensors", out)
    assert load(Fill(out, load_format="sllm", extra_config=settings))[1] == "loaded"
    shutil.copy(model_dir(seed=1) / "model.safetensors", out)
    found, outcome, _ = load(Fill(out, load_format="sllm", extra_config=settings))
    assert outcome == "unconverted"
    wanted = load_file(out / "model.safetensors")["model.norm.weight"]
    assert found["model.norm.weight"].equal(wanted)


@pytest.mark.e2e_long
def test_embeddings_of_out_are_stocks(model_dir: ModelDir, tmp_path: Path) -> None:
    model, out, found = with_dense_module(model_dir(), tmp_path / "model"), tmp_path / "out", []
    convert_model(ConvertRequest(model=str(model), store_dir=tmp_path / "store", out=out))
    for directory, arguments in ((model, ()), (out, ("--load-format", "sllm"))):
        with vllm_server(directory, tmp_path, *arguments) as server:
            body = {"model": server.model, "input": "the cat sat on the mat"}
            found.append(server.post("/v1/embeddings", body)["data"][0]["embedding"])
    assert len(found[0]) == 16
    assert found[0] == found[1]


def test_out_that_was_made_before_is_found(model_dir: ModelDir, convert: Converter, tmp_path: Path) -> None:
    convert(model_dir(), out=tmp_path / "out")
    before = (tmp_path / "out" / MANIFEST_NAME).stat()
    again, events = convert(model_dir(), out=tmp_path / "out")
    assert again.was_found
    assert told_nbytes(events) == {}
    after = (tmp_path / "out" / MANIFEST_NAME).stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_out_of_another_configuration_is_refused(model_dir: ModelDir, convert: Converter, tmp_path: Path) -> None:
    convert(model_dir(), out=tmp_path / "out")
    with pytest.raises(SllmError, match="it holds another model, or one for another configuration"):
        convert(model_dir("qwen2"), out=tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_out_goes_on_where_a_conversion_was_killed(model_dir: ModelDir, convert: Converter, tmp_path: Path) -> None:
    """All was written, nothing published: what a kill between the two leaves."""
    out = tmp_path / "out"
    converted, _ = convert(model_dir())
    root = tmp_path / ".out.converting"
    (root / ".staging").mkdir(parents=True)
    unpublish(converted.checkpoint, root, ranks=[0])
    again, _ = convert(model_dir(), out=out)
    assert again.outcomes == ("kept",)
    is_loaded_like_stock(out, model_dir(), tmp_path / "empty")
    assert not root.exists()


def compare(process: ProcessPoolExecutor, checkpoint: Path, model: Path, run_dir: Path) -> tuple[str, ...]:
    """What `compare_with_source` finds, in the process that has vLLM imported already."""
    run_dir.mkdir()
    request = ConvertRequest(model=str(model), store_dir=checkpoint.parent, dtype="bfloat16", compared=checkpoint)
    done = process.submit(convert_here, RankJob(request, 0, run_dir, checkpoint.parent, None)).result()[-1]
    assert isinstance(done, RankDone)
    return done.differing


def test_checkpoint_is_compared_with_its_source(
    model_dir: ModelDir, convert: Converter, process: ProcessPoolExecutor, tmp_path: Path
) -> None:
    model = shutil.copytree(model_dir(), tmp_path / "model")
    converted, _ = convert(model)
    assert compare(process, converted.checkpoint, model, tmp_path / "first") == ()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    differing = compare(process, converted.checkpoint, model, tmp_path / "second")
    assert differing == ("model.layers.0.self_attn.qkv_proj.weight",)


def test_tensorizer_file_as_source(model_dir: ModelDir, convert: Converter, tmp_path: Path) -> None:
    """There and back: what was exported is converted again, and holds the same bits."""
    first, _ = convert(model_dir("qwen2"))
    exported = export_checkpoint(open_checkpoint(first.checkpoint), tmp_path / "tensorized", "tensorizer")
    _, events = convert(exported.path)
    is_loaded_like_stock(exported.path, model_dir("qwen2"), tmp_path / "store")
    announced, told = told_nbytes(events)["read"]
    assert announced == (exported.path / "model.tensors").stat().st_size
    assert told == exported.nbytes


def unpublish(checkpoint: Path, root: Path, *, ranks: list[int]) -> None:
    """Turn a checkpoint back into one that is being written, with the partitions of `ranks` done."""
    manifest = open_checkpoint(checkpoint).manifest
    staging = root / ".staging" / checkpoint.name
    staging.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(checkpoint, staging)
    (staging / MANIFEST_NAME).unlink()
    for partition in manifest.partitions:
        if partition.rank in ranks:
            record = {"chunk_nbytes": manifest.chunk_nbytes, "partition": partition.model_dump()}
            (staging / f"rank-{partition.rank:05d}.json").write_text(json.dumps(record))
        else:
            (staging / partition.path).unlink()


@pytest.mark.e2e_long
def test_two_ranks_killed_and_gone_on_with(model_dir: ModelDir, tmp_path: Path) -> None:
    """As a user does it: in processes of their own, once interrupted, then to the end."""
    store, model = tmp_path / "store", model_dir()
    request = ConvertRequest(model=str(model), store_dir=store, tensor_parallel_size=2)
    converted = convert_model(request)
    assert converted.outcomes == ("written", "written")
    unpublish(converted.checkpoint, store, ranks=[1])
    events: list[Event] = []
    again = convert_model(request, events.append)
    assert again.outcomes == ("written", "kept")
    assert told_nbytes(events, rank=1) == {}
    settings = {"store_dir": str(store), "write_through": False}
    loaded = run_ranks(load_and_compare, 2, Fill(model, load_format="sllm", extra_config=settings), Fill(model))
    assert loaded == [("loaded", str(again.checkpoint), []), ("loaded", str(again.checkpoint), [])]


def load_and_compare(ours: Fill, stock: Fill) -> tuple[str, str, list[str]]:
    """Body of a rank: the report's outcome and checkpoint, and the tensors that differ from stock."""
    import torch

    tensors, outcome, path = load(ours)
    wanted = tensors_after_load_weights(stock)
    return outcome, path, [name for name in wanted if not torch.equal(tensors.pop(name), wanted[name])] + list(tensors)
