"""The commands about engines: ``run``, ``ps``, ``logs``, ``stop``. They talk to this machine's agent.

``run`` alone starts one where there is none. Also owns what every command that talks to an agent takes.

Everything but typer is imported inside the commands.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sllm_vllm.cli.output import age, print_json, print_table, wrong_usage
from sllm_vllm.cli.store import Json, problems_by_key, with_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from sllm_vllm.node.client import NodeClient
    from sllm_vllm.node.protocol import ReplicaOrder, ReplicaReport, StartReport

INTERRUPTED = 130
OWN_OPTIONS = frozenset(
    {"--name", "--port", "--slots", "--wait", "--env", "-e", "--detach", "-d", "--node-dir", "--json"}
)
"""Options of ``run`` that have no meaning for an engine's ``vllm serve``."""
REPLICA_CUT = ("model", "reason")
"""What a narrow terminal shows less of, in a table of replicas."""

NodeDir = Annotated[
    Path | None,
    typer.Option(
        "--node-dir", help="The agent's directory. Default: SLLM_NODE_DIR, else in the user's state directory."
    ),
]
Id = Annotated[
    str, typer.Argument(metavar="ID", help="ID of a replica, from `sllm-vllm ps`, or a unique prefix of it.")
]


def add_engine_commands(app: typer.Typer) -> None:
    """Give the command line ``run``, ``ps``, ``logs`` and ``stop``."""
    app.command(context_settings={"allow_interspersed_args": False})(run)
    app.command()(ps)
    app.command()(logs)
    app.command()(stop)


def node_root(node_dir: Path | None) -> Path:
    """The agent's folder that is meant."""
    from sllm_vllm.config import default_node_dir

    return (node_dir or default_node_dir()).expanduser().absolute()


def client_of(node_dir: Path | None) -> NodeClient:
    """The client of this machine's agent, which may not be running."""
    from sllm_vllm.node.client import NodeClient

    return NodeClient(node_root(node_dir) / "socket")


# --------------------------------------------------------------------------------------------------------------- run


@dataclass(kw_only=True)
class RunOptions:
    """What ``run`` takes; options stand before MODEL."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model, as in `vllm serve`.")]
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="VLLM ARGUMENTS", help="Everything after MODEL is passed to `vllm serve` unchanged."),
    ] = None
    slots: Annotated[int | None, typer.Option(min=1, help="Slots to use. Default: as many as the arguments need.")] = (
        None
    )
    port: Annotated[
        int, typer.Option(min=0, max=65535, show_default=False, help="Port on loopback. Default: any free port.")
    ] = 0
    name: Annotated[str | None, typer.Option(metavar="ID", help="ID of the replica. Default: derived from MODEL.")] = (
        None
    )
    wait: Annotated[bool, typer.Option("--wait", help="Wait for free slots instead of failing.")] = False
    env: Annotated[
        list[str] | None,
        typer.Option("--env", "-e", metavar="KEY=VALUE", help="Environment variable of the engine. Repeatable."),
    ] = None
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return as soon as the order is accepted.")] = False
    node_dir: NodeDir = None
    as_json: Json = False


@with_options(RunOptions)
def run(options: RunOptions) -> None:
    """Run `vllm serve MODEL` in the background, on free slots.

    Prints the engine's address when it is ready.

    Starts the agent if none is running. Ctrl-C or SIGTERM during the start stops the engine.
    """
    from sllm_vllm.node.model_path import require_model

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left that no one waits for
    order = _order_of(options)
    require_model(order.model, order.directory)  # before an agent is started for it
    client = _client_or_start(options.node_dir)
    try:
        report = client.order(order)
    except KeyboardInterrupt:
        typer.echo("interrupted; `sllm-vllm ps` shows whether the order was accepted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if not options.detach:
        report = _started(client, report)
    if options.as_json:
        typer.echo(report.model_dump_json(indent=2))
    if report.has_ended:
        _fail(report)
    if not options.as_json:
        _print_accepted(report) if options.detach else _print_ready(report)


def _order_of(options: RunOptions) -> ReplicaOrder:
    from pydantic import ValidationError

    from sllm_vllm.node.protocol import ReplicaOrder

    misplaced = sorted({word.partition("=")[0] for word in options.arguments or ()} & OWN_OPTIONS)
    if misplaced:
        wrong_usage(*(f"{option}: put it before MODEL; the rest goes to `vllm serve`" for option in misplaced))
    environment = {}
    for setting in options.env or ():
        key, equals, value = setting.partition("=")
        if not (key and equals) or "\0" in setting:
            wrong_usage("--env: must be KEY=VALUE")
        environment[key] = value
    try:
        return ReplicaOrder(
            model=_expanded(options.model),
            arguments=tuple(options.arguments or ()),
            environment=environment,
            directory=str(Path.cwd()),
            num_slots=options.slots,
            port=options.port,
            waits=options.wait,
            id=options.name,
            reuses_id=options.name is not None,
        )
    except ValidationError as error:
        names = {"num_slots": "--slots", "port": "--port", "id": "--name", "environment": "--env", "model": "MODEL"}
        found = problems_by_key(error).items()
        wrong_usage(*(f"{names.get(key.partition('.')[0], key)}: {problem}" for key, problem in found))


def _expanded(model: str) -> str:
    """A path below the user's home written out; the shell did that unless it was quoted."""
    return str(Path(model).expanduser()) if model.startswith("~/") else model


def _client_or_start(node_dir: Path | None) -> NodeClient:
    client = client_of(node_dir)
    if client.is_there():
        return client
    from sllm_vllm.node.launcher import serve_command, start_in_background

    root = node_root(node_dir)
    typer.echo(f"no agent is running: starting one, see {root / 'agent.log'}", err=True)
    return start_in_background(root, serve_command(["--node-dir", str(root)]))


def _started(client: NodeClient, accepted: ReplicaReport) -> ReplicaReport:
    """Its report when it is ready, or has ended. An interrupt stops it."""
    try:
        with _StartLine() as line:
            for report in client.watch(accepted.id):
                line.show(report)
                if report.is_ready or report.has_ended:
                    return report
    except KeyboardInterrupt:
        client.stop_replica(accepted.id)
        typer.echo(f"interrupted: stopping {accepted.id}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    return client.replica(accepted.id)


class _StartLine:
    """A live line on stderr with the progress of a start; removed at the end, and not shown off a terminal."""

    def __init__(self) -> None:
        self._live: Live | None = None

    def __enter__(self) -> _StartLine:
        if sys.stderr.isatty():
            from rich.live import Live

            self._live = Live(console=_console(), transient=True, refresh_per_second=10)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, report: ReplicaReport) -> None:
        """Tell it."""
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(progress_line(report), overflow="ellipsis", no_wrap=True))


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def progress_line(report: ReplicaReport) -> str:
    """How far a start is: ``llama-3f2a  loading weights  0.8 s  1.13 GiB  warm``."""
    from sllm_vllm.units import format_nbytes

    start = report.start
    if start is None:
        parts = [report.id, report.state, f"{report.age_s:.1f} s", report.reason]
    else:
        size = "" if start.nbytes is None else format_nbytes(start.nbytes)
        parts = [report.id, start.phase, f"{start.total_s:.1f} s", size, _warm_or_cold(start)]
        if start.is_warm is False and start.cold_reason:
            parts[-1] += f" ({start.cold_reason})"
    return "  ".join(part for part in parts if part)


def _warm_or_cold(start: StartReport) -> str:
    return "" if start.is_warm is None else "warm" if start.is_warm else "cold"


def _print_ready(report: ReplicaReport) -> None:
    took = ""
    if report.start is not None:
        kind = _warm_or_cold(report.start)
        took = f" in {report.start.total_s:.2f} s" + (f" ({kind})" if kind else "")
    typer.echo(f"ready{took}: {report.url}  id {report.id}")
    _print_export(report)


def _print_accepted(report: ReplicaReport) -> None:
    typer.echo(f"{report.state}: {report.id}" + (f"  {report.url}" if report.url else ""))
    if report.url:
        _print_export(report)


def _print_export(report: ReplicaReport) -> None:
    """What a shell needs for OpenAI's client to find the engine."""
    from shlex import quote

    if report.port is None:  # a router's, on a Unix socket: no such client connects there
        return
    key = f" OPENAI_API_KEY={quote(report.api_key)}" if report.api_key else ""
    typer.echo(f"export OPENAI_BASE_URL={report.url}/v1{key}")


def _fail(report: ReplicaReport) -> NoReturn:
    for line in report.tail:
        typer.echo(line, err=True)
    reason = " ".join((report.reason or "it ended").split())
    status = _told_status(report.status)
    if status and status.removeprefix("exit ") not in reason:
        reason += f" ({status})"
    if report.cause:
        reason += f": {' '.join(report.cause.split())}"
    typer.echo(f"sllm-vllm: {report.id} {report.state}: {reason}; see {report.log}", err=True)
    raise typer.Exit(1)


def _told_status(status: int | None) -> str:
    if status is None:
        return ""
    return f"exit status {status}" if status >= 0 else f"killed by signal {-status}"


# ------------------------------------------------------------------------------------------------------ ps, logs, stop


def ps(
    every: Annotated[bool, typer.Option("--all", "-a", help="Include engines that have ended.")] = False,
    as_json: Json = False,
    node_dir: NodeDir = None,
) -> None:
    """List the engines of this machine's agent."""
    from sllm_vllm.errors import NodeUnavailable

    client = client_of(node_dir)
    if not client.is_there():
        typer.echo("[]" if as_json else "no agent is running")
        return
    try:
        known = client.report().replicas
    except NodeUnavailable:
        if client.is_there():  # it does not answer, which is another thing than its end
            raise
        typer.echo("[]" if as_json else "the agent has just ended")
        return
    replicas = [replica for replica in known if every or not replica.has_ended]
    if as_json:
        print_json([replica.model_dump(mode="json") for replica in replicas])
    elif replicas:
        print_table("", [replica_row(replica) for replica in replicas], cut=REPLICA_CUT)
    else:
        typer.echo("no engine is running" + ("" if every or not known else "; `--all` shows ended ones"))


def replica_row(replica: ReplicaReport) -> dict[str, object]:
    """A replica in a table."""
    start = replica.start
    return {
        "id": replica.id,
        "model": replica.model,
        "state": replica.state,
        "slots": ",".join(str(slot) for slot in replica.slots) or "-",
        "port": str(replica.port or "-"),
        "age": age(replica.age_s),
        "start": "-" if start is None else f"{start.total_s:.2f} s {_warm_or_cold(start)}".rstrip(),
        "reason": replica.reason,
    }


def logs(
    replica: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log until the engine ends.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, metavar="LINES", help="Print only the last LINES lines.")] = None,
    *,
    node_dir: NodeDir = None,
) -> None:
    """Print an engine's log."""
    client = client_of(node_dir)
    full_id = client.replica(replica).id
    try:
        for data in _log_parts(client, full_id, follow=follow, tail=tail):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # as in `logs ID | head`; Python flushes once more when it ends
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _log_parts(client: NodeClient, full_id: str, *, follow: bool, tail: int | None) -> Iterator[bytes]:
    if tail is None:
        yield from client.logs(full_id, follow=follow)
        return
    data = b""  # a log is bounded, so it can be held
    for part in client.logs(full_id):
        data += part
    last = b"".join(io.BytesIO(data).readlines()[-tail:]) if tail else b""
    if follow:
        yield from client.logs(full_id, tail_nbytes=len(last), follow=True)
    elif last:
        yield last


def stop(
    replicas: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="IDs of replicas, from `sllm-vllm ps`, or unique prefixes of them."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", "-a", help="Stop all engines, including those that wait for slots.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Don't wait until the engines have ended.")] = False,
    *,
    node_dir: NodeDir = None,
    as_json: Json = False,
) -> None:
    """Stop engines. Returns when they have ended; the agent keeps running."""
    if bool(replicas) == every:
        wrong_usage("stop: give either IDs or --all")
    client = client_of(node_dir)
    if every:
        ids = [replica.id for replica in client.report().replicas if not replica.has_ended]
    else:
        ids = list(
            dict.fromkeys(client.replica(replica).id for replica in replicas or ())
        )  # all are known, or none ends
    for full_id in ids:
        client.stop_replica(full_id)
    records = []
    for full_id in ids:
        records.append({"id": full_id, "state": "stopping"} if no_wait else _wait_ended(client, full_id))
        if not as_json:
            reason = records[-1].get("reason")
            typer.echo(f"{records[-1]['state']}: {full_id}" + (f" ({reason})" if reason else ""))
    if as_json:
        print_json(records)
    elif not ids:
        typer.echo("no engine is running")


def _wait_ended(client: NodeClient, full_id: str) -> dict[str, object]:
    from sllm_vllm.errors import ReplicaUnknown

    try:
        for report in client.watch(full_id):
            if report.has_ended:
                return {"id": full_id, "state": report.state, "reason": report.reason}
    except ReplicaUnknown:  # forgotten: too many others have ended since
        pass
    return {"id": full_id, "state": "stopped", "reason": ""}
