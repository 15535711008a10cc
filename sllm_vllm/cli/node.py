"""The commands ``sllm-vllm node …``: this machine's agent. Those about its engines are in ``engines``.

Exit codes are ``cli``'s; ``node serve`` ends with 3 where another agent has the directory. Everything but typer is
imported inside the commands.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_vllm.cli.engines import REPLICA_CUT, NodeDir, add_engine_commands, client_of, node_root, replica_row
from sllm_vllm.cli.output import age, command_group, print_done, print_section
from sllm_vllm.cli.store import Json, StoreDir, log_to_stderr, store_root, validated, with_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sllm_vllm.config import NodeConfig
    from sllm_vllm.node.protocol import CheckpointReport, EngineTiming, NodeReport, SlotReport

__all__ = ["add_engine_commands", "node_app"]

node_app = command_group("node", "The agent that runs engines on this machine's accelerators.")


@dataclass(kw_only=True)
class AgentOptions:
    """What ``serve`` takes; the names are ``NodeConfig``'s but for units. None: as the file says, or the default."""

    config: Annotated[Path | None, typer.Option(help="JSON file with settings; options override it.")] = None
    node_dir: NodeDir = None
    store_dir: StoreDir = None
    slots: Annotated[
        int | None, typer.Option(help="Slots for engines. Default: one per GPU, else one per processor.")
    ] = None
    gpus: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="GPUs to use: indices such as 0,1, or UUIDs. Default: all that are visible."),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="On the CPU: memory for all engines. Default: 90% of what is available."),
    ] = None
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="On the CPU: KV cache of a slot. Default: 1/8 of the slot's memory, at most 1GiB."
        ),
    ] = None
    warm: Annotated[
        bool | None,
        typer.Option("--warm/--no-warm", help="Fork engines from a process that has imported vLLM. Default: --warm."),
    ] = None
    start_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long an engine may take to become ready. Default: 600.")
    ] = None


_FIELD_OF = {"memory": "memory_bytes", "kv_memory": "kv_bytes", "start_timeout": "start_s"}


@node_app.command()
@with_options(AgentOptions)
def serve(options: AgentOptions) -> None:
    """Run the agent.

    SIGTERM, SIGINT or `sllm-vllm node stop` stops it and its engines.
    """
    config = _node_config(options)
    from sllm_vllm.errors import NodeBusy
    from sllm_vllm.node.daemon import serve as serve_node
    from sllm_vllm.node.launcher import BUSY_STATUS

    log_to_stderr()
    try:
        status = serve_node(config)
    except NodeBusy as error:
        typer.echo(f"sllm-vllm: {error}", err=True)
        status = BUSY_STATUS
    raise typer.Exit(status)


def _node_config(options: AgentOptions) -> NodeConfig:
    """The agent's settings: the file's, overridden by the options."""
    from sllm_vllm.config import NodeConfig

    given: dict[str, Any] = {
        _FIELD_OF.get(name, name): value for name, value in vars(options).items() if name != "config"
    }
    if options.gpus is not None:
        given["gpus"] = [gpu.strip() for gpu in options.gpus.split(",") if gpu.strip()]
    config = validated(NodeConfig, options.config, given, options=_FIELD_OF)
    socket = config.store_socket.expanduser().absolute() if config.store_socket is not None else None
    places = {"node_dir": node_root(config.node_dir), "store_dir": store_root(config.store_dir), "store_socket": socket}
    return config.model_copy(update=places)


@node_app.command()
def stop(
    timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for the agent to end.")
    ] = 120.0,
    node_dir: NodeDir = None,
    as_json: Json = False,
) -> None:
    """Stop the agent and all its engines. Returns when they have ended."""
    client = client_of(node_dir)
    living = sum(not replica.has_ended for replica in client.report().replicas)
    client.stop(wait_s=timeout)
    place = client.socket_path.parent
    line = f"stopped: {place} ({living} {'engine' if living == 1 else 'engines'} ended)"
    print_done({"done": "stopped", "node_dir": place, "engines": living}, line, as_json=as_json)


@node_app.command()
def status(
    node_dir: NodeDir = None,
    memory: Annotated[bool, typer.Option("--memory", help="Also measure the warm parent's memory.")] = False,
    as_json: Json = False,
) -> None:
    """Show slots, engines, checkpoints and how long starts took."""
    client = client_of(node_dir)
    report = client.report(with_memory=memory)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _print_summary(report, client.socket_path)
    print_section("slots", [_slot_row(slot) for slot in report.slots])
    print_section(
        "replicas", [replica_row(replica) for replica in report.replicas if not replica.has_ended], cut=REPLICA_CUT
    )
    print_section("checkpoints", [_checkpoint_row(checkpoint) for checkpoint in report.checkpoints])
    print_section("hops", [_hop_row(hop, rates) for hop, rates in report.hops.items()])
    print_section("starts", [_timing_row(timing) for timing in report.timings], cut=("seconds by phase",))


def _print_summary(report: NodeReport, socket: Path) -> None:
    from sllm_vllm.units import format_nbytes

    typer.echo(f"node {report.version}  pid {report.pid}  up {age(report.uptime_s)}  {report.platform}")
    typer.echo(f"socket {socket}")
    if report.problem:
        typer.echo(f"the agent has a problem: {report.problem}")
    warm = report.warm
    if warm.pid is None:
        typer.echo(f"no warm parent: {warm.problem}")
    else:
        imports = "" if warm.import_s is None else f", imported in {warm.import_s:.1f} s"
        size = "" if warm.pss_nbytes is None else f", {format_nbytes(warm.pss_nbytes)}"
        typer.echo(f"warm parent pid {warm.pid}, {warm.num_forks} forks{imports}{size}")
    typer.echo(f"no store: {report.store}" if report.store else "the store is available")


def _slot_row(slot: SlotReport) -> dict[str, object]:
    return {"slot": slot.slot, "what": slot.what, "replica": slot.replica or "-"}


def _checkpoint_row(checkpoint: CheckpointReport) -> dict[str, object]:
    from sllm_vllm.units import format_nbytes

    share = f"{checkpoint.resident_nbytes / checkpoint.nbytes:.0%}" if checkpoint.nbytes else "-"
    return {
        "name": checkpoint.name,
        "size": format_nbytes(checkpoint.nbytes),
        "memory": share,
        "tiers": " ".join(checkpoint.tiers),
    }


def _hop_row(hop: str, rates: Mapping[str, Any]) -> dict[str, object]:
    from sllm_vllm.units import format_bps

    return {"hop": hop, "rate": format_bps(rates.get("bps")), "limit": format_bps(rates.get("limit_bps"))}


def _timing_row(timing: EngineTiming) -> dict[str, object]:
    start = timing.start
    phases = "  ".join(f"{phase} {seconds:.2f}" for phase, seconds in start.seconds.items() if seconds >= 0.005)
    kind = {True: "warm", False: "cold", None: "-"}[start.is_warm]
    return {"replica": timing.replica, "total": f"{start.total_s:.2f} s", "": kind, "seconds by phase": phases}
