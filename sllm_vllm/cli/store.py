"""The commands ``sllm-vllm store …``: the daemon of this machine, and the orders an operator gives it.

Also owns what every command about the store takes: its options, and the decorator that makes a record of them.
Everything but typer is imported inside the commands.
"""

from __future__ import annotations

import functools
import inspect
import json
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from sllm_vllm.cli.output import (
    age,
    command_group,
    or_dash,
    print_done,
    print_json,
    print_section,
    print_table,
    shown,
    wrong_usage,
)

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    from sllm_vllm.config import StoreConfig
    from sllm_vllm.store.calibrate import Figure

T = TypeVar("T")
Config = TypeVar("Config", bound="BaseModel")

PREFETCH_S_MAX = 24 * 3600.0
"""Longest that ``prefetch --wait`` waits."""
_CONFIG_NBYTES_MAX = 1 << 20
_NAME_MAX = 4096

store_app = command_group("store", "The daemon that keeps checkpoints in this machine's memory.")

StoreDir = Annotated[
    Path | None,
    typer.Option(
        "--store-dir", help="Directory of the checkpoints. Default: SLLM_STORE_DIR, else in the user's cache."
    ),
]
Socket = Annotated[
    Path | None, typer.Option("--socket", help="The daemon's socket. Default: SLLM_STORE_SOCKET, else in --store-dir.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the checkpoint, from `sllm-vllm list`.")]


def with_options(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Let a command take its arguments as one record, whose fields typer reads as if they were parameters."""
    hints = get_type_hints(options, include_extras=True)
    fields = inspect.signature(options).parameters.values()

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: object) -> None:
            command(options(**values))

        parameters = [field.replace(annotation=hints[field.name]) for field in fields]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = hints
        return run

    return decorate


def store_root(store_dir: Path | None) -> Path:
    """The directory of checkpoints that is meant."""
    from sllm_vllm.config import default_store_dir

    return (store_dir or default_store_dir()).expanduser().absolute()


@dataclass(kw_only=True)
class StoreOptions:
    """What ``serve`` takes; the names are ``StoreConfig``'s but for units. None: as the file says, or the default."""

    config: Annotated[Path | None, typer.Option(help="JSON file with settings; options override it.")] = None
    store_dir: StoreDir = None
    socket: Socket = None
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host memory for checkpoints, such as 16GiB. Default: 4GiB.")
    ] = None
    disk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Quota of --store-dir, such as 200GiB; to keep within it, checkpoints that a remote also has are"
            " removed.",
        ),
    ] = None
    slot_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of the memory's slots. Default: 16MiB.")
    ] = None
    remote: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Remote from which to fetch checkpoints. Repeatable.")
    ] = None
    redirect_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="Other host that a remote may redirect to, such as *.example.com. Repeatable."
        ),
    ] = None
    policy: Annotated[str | None, typer.Option(metavar="cost|lru", help="Eviction policy. Default: cost.")] = None
    readers: Annotated[int | None, typer.Option(help="Concurrent reads. Default: as calibrated, else 4.")] = None
    writers: Annotated[int | None, typer.Option(help="Concurrent writes. Default: as calibrated, else 1.")] = None
    downloads: Annotated[int | None, typer.Option(help="Concurrent ranged requests to remotes. Default: 8.")] = None
    prefault: Annotated[
        bool | None,
        typer.Option(
            "--prefault/--no-prefault", help="Allocate the memory at start, or at first use. Default: at start."
        ),
    ] = None
    pause_fills: Annotated[
        bool | None,
        typer.Option(
            "--pause-fills/--no-pause-fills", help="Pause prefetches while an engine waits for a load. Default: pause."
        ),
    ] = None
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of /metrics on loopback; 0: any free port. Default: no /metrics.")
    ] = None


_FIELD_OF = {
    "memory": "memory_bytes",
    "disk": "disk_bytes",
    "slot_size": "slot_bytes",
    "remote": "remotes",
    "redirect_host": "redirect_hosts",
}


@store_app.command()
@with_options(StoreOptions)
def serve(options: StoreOptions) -> None:
    """Run the daemon. SIGTERM, SIGINT or `sllm-vllm store stop` stops it."""
    config = _store_config(options)
    from sllm_vllm.store.daemon import serve as serve_store

    log_to_stderr()
    raise typer.Exit(serve_store(config))


def log_to_stderr() -> None:
    """Show this package's lines as vLLM would; part of them go through its logger."""
    import logging

    logging.basicConfig(format="%(levelname)s %(asctime)s [%(name)s] %(message)s", datefmt="%m-%d %H:%M:%S")
    for name in ("sllm_vllm", "vllm.sllm_vllm"):
        logging.getLogger(name).setLevel(logging.INFO)


def _store_config(options: StoreOptions) -> StoreConfig:
    """The daemon's settings: the file's, overridden by the options."""
    from sllm_vllm.config import StoreConfig

    given = {_FIELD_OF.get(name, name): value for name, value in vars(options).items() if name != "config"}
    config = validated(StoreConfig, options.config, given, options=_FIELD_OF)
    if config.num_slots == 0:
        wrong_usage(f"--memory: {config.memory_bytes} bytes are less than one slot of {config.slot_bytes} bytes")
    socket = config.socket.expanduser().absolute() if config.socket is not None else None
    return config.model_copy(update={"store_dir": store_root(config.store_dir), "socket": socket})


def validated(
    kind: type[Config], file: Path | None, given: Mapping[str, object], *, options: Mapping[str, str]
) -> Config:
    """A daemon's settings: the file's, overridden by those options that are given. Sizes may be text.

    Args:
        options: what an option is called whose name is not its field's.
    """
    from pydantic import ValidationError

    from sllm_vllm.units import parse_nbytes

    values = read_config(file) if file is not None else {}
    said = {field: value for field, value in given.items() if value not in (None, [])}
    names = {field: name for name, field in options.items()}
    values |= said
    problems: dict[str, str] = {}
    for field, value in values.items():
        if field.endswith("_bytes") and isinstance(value, str):
            try:
                values[field] = parse_nbytes(value)
            except (ValueError, OverflowError) as error:
                problems[field] = str(error)
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        problems = problems_by_key(error) | problems
    if problems:
        called = {key: _option(key, said, names) or f"{file}: {key}" for key in problems}
        wrong_usage(*(f"{called[key]}: {problem}" for key, problem in problems.items()))
    return config


def problems_by_key(error: ValidationError) -> dict[str, str]:
    """What is wrong with each key."""
    from sllm_vllm.router.config.problems import in_words

    found: dict[str, str] = {}
    for one in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in one["loc"])
        found.setdefault(key, in_words(one["type"], one["msg"], one.get("ctx", {})))
    return found


def _option(key: str, said: Mapping[str, object], names: Mapping[str, str]) -> str:
    """The option that said it; empty for a key of the file."""
    field = key.partition(".")[0]
    return f"--{names.get(field, field).replace('_', '-')}" if field in said else ""


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file of settings."""
    from sllm_vllm.daemon.plain_file import read_plain

    try:
        values = json.loads(read_plain(path.expanduser(), _CONFIG_NBYTES_MAX))
    except OSError as error:
        wrong_usage(f"{path}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        wrong_usage(f"{path}: not valid JSON ({error})")
    if not isinstance(values, dict):
        wrong_usage(f"{path}: must contain a JSON object")
    return values


def _socket_path(store_dir: Path | None, socket: Path | None) -> Path:
    from sllm_vllm.config import default_store_socket

    return (socket or default_store_socket(store_root(store_dir))).expanduser().absolute()


OrderName = Literal["status", "prefetch", "evict", "pin", "unpin", "stop"]


def _order(socket: Path, order: OrderName, name: str | None = None, *, wait: bool = False) -> dict[str, Any]:
    """The daemon's reply to an order."""
    from sllm_vllm.store.client import StoreClient
    from sllm_vllm.store.protocol import Order

    if name is not None and not (1 <= len(name) <= _NAME_MAX and name.isprintable()):
        wrong_usage(f"NAME: must have 1 to {_NAME_MAX} printable characters")
    with StoreClient(socket) as client:
        message = Order(order=order, checkpoint=name, wait=wait)
        return client.order(message, timeout_s=PREFETCH_S_MAX if wait else None)


def _print_reply(done: str, subject: object, reply: Mapping[str, object], *, as_json: bool) -> None:
    facts = ", ".join(f"{key.removesuffix('_nbytes')} {shown(key, value)}" for key, value in reply.items())
    line = f"{done}: {subject}" + (f" ({facts})" if facts else "")
    print_done({"done": done, "what": str(subject), **reply}, line, as_json=as_json)


@store_app.command()
def prefetch(
    name: Name,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the checkpoint is in memory.")] = False,
    *,
    store_dir: StoreDir = None,
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """Read a checkpoint into memory before it is needed."""
    reply = _order(_socket_path(store_dir, socket), "prefetch", name, wait=wait)
    _print_reply("prefetched" if wait else "prefetching", name, reply, as_json=as_json)


@store_app.command()
def evict(name: Name, store_dir: StoreDir = None, socket: Socket = None, *, as_json: Json = False) -> None:
    """Evict a checkpoint from memory, except what engines use. It stays on disk."""
    _print_reply("evicted", name, _order(_socket_path(store_dir, socket), "evict", name), as_json=as_json)


@store_app.command()
def pin(name: Name, store_dir: StoreDir = None, socket: Socket = None, *, as_json: Json = False) -> None:
    """Read a checkpoint into memory and keep it there."""
    _print_reply("pinned", name, _order(_socket_path(store_dir, socket), "pin", name), as_json=as_json)


@store_app.command()
def unpin(name: Name, store_dir: StoreDir = None, socket: Socket = None, *, as_json: Json = False) -> None:
    """Allow a pinned checkpoint to be evicted again."""
    _print_reply("unpinned", name, _order(_socket_path(store_dir, socket), "unpin", name), as_json=as_json)


@store_app.command()
def stop(store_dir: StoreDir = None, socket: Socket = None, as_json: Json = False) -> None:
    """Stop the daemon. Engines keep running."""
    path = _socket_path(store_dir, socket)
    _print_reply("stopping", path, _order(path, "stop"), as_json=as_json)


@store_app.command()
def status(store_dir: StoreDir = None, socket: Socket = None, as_json: Json = False) -> None:
    """Show the daemon's checkpoints, leases and transfer rates."""
    facts = _order(_socket_path(store_dir, socket), "status")
    if as_json:
        print_json(facts)
        return
    _print_summary(facts)
    print_section("pool", [_pool_row(facts["pool"])])
    print_section("tiers", [_tier_row(tier, entry) for tier, entry in facts["tiers"].items()], cut=("where",))
    print_section("checkpoints", [_checkpoint_row(entry) for entry in facts["checkpoints"]])
    print_section("leases", [_lease_row(entry) for entry in facts["leases"]])
    print_section("hops", [_hop_row(hop, entry) for hop, entry in facts["hops"].items()])
    print_section("jobs", [{"kind": kind, **counts} for kind, counts in facts["jobs"].items()])


def _print_summary(facts: dict[str, Any]) -> None:
    from sllm_vllm.units import format_nbytes

    rate = "-" if facts["hit_rate"] is None else f"{facts['hit_rate']:.0%}"
    spans = f"{facts['hits']} of {facts['hits'] + facts['misses']} spans were in memory ({rate})"
    typer.echo(f"store {facts['version']}  pid {facts['pid']}  up {age(facts['uptime_s'])}  policy {facts['policy']}")
    typer.echo(f"socket {facts['socket']}")
    typer.echo(f"{spans}, {facts['evictions']} evictions, {facts['reads_failed']} failed reads")
    typer.echo(f"{facts['clients']} clients, {format_nbytes(facts['nbytes_in_flight'])} in flight")


def _pool_row(pool: Mapping[str, int]) -> dict[str, object]:
    from sllm_vllm.units import format_nbytes

    sizes = {"slot": format_nbytes(pool["slot_nbytes"]), "page": format_nbytes(pool["page_nbytes"])}
    return {"slots": pool["slots"], **sizes} | {
        state: pool[state] for state in ("free", "filling", "ready", "kept", "pinned")
    }


def _tier_row(tier: str, entry: Mapping[str, Any]) -> dict[str, object]:
    return {
        "tier": tier,
        "checkpoints": or_dash(entry.get("checkpoints")),
        "holds": shown("nbytes", entry.get("nbytes")),
        "of": shown("nbytes", entry.get("capacity_nbytes")),
        "where": " ".join(entry.get("urls", ())),
    }


def _checkpoint_row(entry: Mapping[str, Any]) -> dict[str, object]:
    from sllm_vllm.units import format_nbytes

    return {
        "name": entry["name"],
        "rank": entry["rank"],
        "size": format_nbytes(entry["nbytes"]),
        "memory": f"{entry['resident_nbytes'] / entry['nbytes']:.0%}" if entry["nbytes"] else "-",
        "tiers": " ".join(entry["tiers"]),
        "pin": "yes" if entry["pinned"] else "",
        "uses": entry["uses"],
        "used": "-" if entry["last_used_s"] is None else age(entry["last_used_s"]),
    }


def _lease_row(entry: Mapping[str, Any]) -> dict[str, object]:
    counts = {key: entry[key] for key in ("wanted", "given", "kept")}
    name = {"lease": entry["token"], "name": entry["name"], "rank": entry["rank"], "pid": entry["pid"]}
    return {**name, "as": "map" if entry["hold"] else "copy", **counts, "age": age(entry["age_s"])}


def _hop_row(hop: str, entry: Mapping[str, Any]) -> dict[str, object]:
    from sllm_vllm.units import format_bps, format_nbytes

    rates = {"rate": format_bps(entry["bps"]), "limit": format_bps(entry["limit_bps"])}
    return {"hop": hop, "bytes": format_nbytes(entry["nbytes"]), "busy": f"{entry['seconds']:.1f} s", **rates}


@store_app.command()
def calibrate(
    store_dir: StoreDir = None,
    socket: Socket = None,
    file: Annotated[
        Path | None, typer.Option(help="File to read. Default: the store's largest partition, else a temporary file.")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Measure the disk at several depths and chunk sizes. The daemon uses the result from its next start."""
    from sllm_vllm.config import StoreConfig
    from sllm_vllm.store.calibrate import MeasurePlan, largest_partition, measure_device

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    root, plan = store_root(store_dir), MeasurePlan()
    if _is_running(_socket_path(store_dir, socket)):
        typer.echo("a daemon is running: its reads and writes may distort the measurement", err=True)
    source = file or largest_partition(root, plan.sample_nbytes // 4)
    measured = measure_device(StoreConfig(store_dir=root).state_dir, source, plan)
    if as_json:
        print_json(asdict(measured))
        return
    typer.echo(
        f"read: {measured.file or 'a temporary file'}" + ("" if measured.is_direct else " (through the page cache)")
    )
    rows = [_figure_row("read", figure, measured.read_bps) for figure in measured.reads]
    print_table(str(root), rows + [_figure_row("write", figure, measured.write_bps) for figure in measured.writes])
    typer.echo(f"chosen: readers {measured.readers}, writers {measured.writers}")


def _is_running(socket: Path) -> bool:
    from sllm_vllm.errors import StoreRefused, StoreUnavailable
    from sllm_vllm.store.channel import connect_to

    try:
        connect_to(socket, 1.0).close()
    except StoreUnavailable:
        return False
    except StoreRefused:
        return True
    return True


def _figure_row(kind: str, figure: Figure, best_bps: float) -> dict[str, object]:
    from sllm_vllm.units import format_bps, format_nbytes

    chunk, share = format_nbytes(figure.chunk_nbytes), f"{figure.bps / best_bps:.0%}"
    return {"": kind, "depth": figure.depth, "chunk": chunk, "rate": format_bps(figure.bps), "of best": share}
