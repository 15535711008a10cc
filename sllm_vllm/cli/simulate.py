"""Implements ``sllm-vllm simulate``: runs, tables, JSON (on one line), PNG. Prints the seeds of failed runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from sllm_vllm.cli.output import print_section, print_table
from sllm_vllm.errors import ConfigError
from sllm_vllm.router.core.facts import MoveLimits, RouterLimits
from sllm_vllm.router.core.router import RouterCore
from sllm_vllm.simulate import decisions, metrics
from sllm_vllm.simulate.baselines import baselines
from sllm_vllm.simulate.hardware import HardwareCluster, ModelClass
from sllm_vllm.simulate.plot import write_cdfs
from sllm_vllm.simulate.policy import SchedulingPolicy
from sllm_vllm.simulate.presets import preset
from sllm_vllm.simulate.run import Run
from sllm_vllm.simulate.workload import SimulatedRequest, draw_requests, read_trace
from sllm_vllm.simulate.world import World

OURS = "ours"
UNMOVED = "ours_unmoved"
"""The router's core without moves."""
COMPARED_NODES_MAX = 16
"""On a larger cluster only the router runs unless policies are named: the others examine every node for each start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command's options. ``rate``: requests a second; None: the preset's or the trace's."""

    preset: str = "paper"
    policies: tuple[str, ...] = ()
    """Empty: all, or only the router's core on a large cluster."""
    seeds: int = 3
    requests: int = 1000
    rate: float | None = None
    trace: Path | None = None
    json: bool = False
    png: Path | None = None
    validate: bool = False
    decisions: bool = False


def run_simulation(options: Options) -> int:
    """Simulate and print. The exit code is 1 if a request was lost.

    Raises:
        ConfigError: there is no such preset, policy or trace, or the PNG can't be drawn.
    """
    cluster = preset(options.preset)
    if options.rate is not None:
        cluster = replace(cluster, traffic=replace(cluster.traffic, rate=options.rate))
    if options.decisions:
        return _print_decisions(cluster, options)
    runs = {name: _run_seeds(name, cluster, options) for name in _chosen(cluster, options)}
    summaries = {name: [metrics.figures(run) for run in of_seeds] for name, of_seeds in runs.items()}
    title = f"{cluster.name}: {options.requests} requests, seeds 0 to {options.seeds - 1}"
    if options.json:
        settings: dict[str, object] = {"preset": cluster.name, "requests": options.requests, "seeds": options.seeds}
        settings["rate"] = cluster.traffic.rate if options.trace is None else options.rate
        typer.echo(json.dumps({**settings, "policies": metrics.record(summaries)}))
    else:
        _print_tables(title, summaries)
    if options.png is not None:
        write_cdfs(options.png, title, _waits(runs))
    return _num_lost(summaries)


def _print_tables(title: str, summaries: Mapping[str, list[metrics.Figures]]) -> None:
    print_table(f"{title}; means, seconds", metrics.table(summaries, metrics.WAITS))
    print_section("least and most over seeds, seconds", metrics.ranges(summaries, metrics.WAITS))
    rows = metrics.table(summaries, metrics.SLOWEST)
    print_section("what the slowest hundredth waited for until they were sent", rows)
    if OURS in summaries and len(summaries) > 1:
        rows = metrics.ratios(summaries, "startup_p99_s", OURS)
        print_section("startup P99 over ours, the same seeds", rows)
    print_section("what it cost, means", metrics.table(summaries, metrics.COSTS))


def policies(classes: Mapping[str, ModelClass], seed: int) -> dict[str, Callable[[], SchedulingPolicy]]:
    """All policies that can be simulated, by name."""
    unmoved = RouterLimits(moves=MoveLimits(is_on=False))
    return {OURS: RouterCore, UNMOVED: lambda: RouterCore(unmoved), **baselines(classes, seed)}


def _chosen(cluster: HardwareCluster, options: Options) -> list[str]:
    known = list(policies(cluster.classes(), 0))
    unknown = [name for name in options.policies if name not in known]
    if unknown:
        raise ConfigError(f"there is no policy {unknown[0]!r}; choose from {', '.join(known)}")
    if options.policies:
        return list(options.policies)
    return known if cluster.num_nodes <= COMPARED_NODES_MAX else [OURS]


def _run_seeds(name: str, cluster: HardwareCluster, options: Options) -> list[Run]:
    return [_run(name, cluster, seed, options=options) for seed in range(options.seeds)]


def _run(name: str, cluster: HardwareCluster, seed: int, *, options: Options) -> Run:
    policy = policies(cluster.classes(), seed)[name]()
    requests = requests_of(cluster, seed, options=options)
    world = World(cluster, policy, seed=seed, is_validated=options.validate)
    try:
        return world.run(requests)
    except Exception:  # top of a run loop
        where = f"--preset {cluster.name} --policies {name} --requests {options.requests}"
        typer.echo(f"failed with seed {seed} at {world.agenda.now_s:.3f} s: {where}", err=True)
        raise


def requests_of(cluster: HardwareCluster, seed: int, *, options: Options) -> list[SimulatedRequest]:
    """The run's requests, the same for every policy."""
    models, traffic = list(cluster.classes()), cluster.traffic
    if options.trace is None:
        return draw_requests(traffic, models, options.requests, seed=seed)
    return read_trace(options.trace, models, options.requests, seed=seed, rate=options.rate, exponent=traffic.exponent)


def _num_lost(summaries: Mapping[str, list[metrics.Figures]]) -> int:
    lost = [
        f"{name} with seed {seed}"
        for name, of_seeds in summaries.items()
        for seed, run in enumerate(of_seeds)
        if run["num_lost"]
    ]
    if lost:
        typer.echo(f"requests were lost by {', '.join(lost)}", err=True)
    return 1 if lost else 0


def _waits(runs: Mapping[str, list[Run]]) -> dict[str, dict[str, list[float]]]:
    outcomes = {name: [o for run in of_seeds for o in run.outcomes.values()] for name, of_seeds in runs.items()}
    return {
        "time to first token": {
            name: [outcome.ttft_s for outcome in of_policy if outcome.ttft_s is not None]
            for name, of_policy in outcomes.items()
        },
        "startup": {
            name: [outcome.startup_s for outcome in of_policy if outcome.startup_s is not None]
            for name, of_policy in outcomes.items()
        },
    }


def _print_decisions(cluster: HardwareCluster, options: Options) -> int:
    loads = {"as it is": cluster, "crowded": decisions.crowded(cluster)}
    found = {load: decisions.measure(loaded, options.requests, seed=0) for load, loaded in loads.items()}
    by_models = _grown(cluster, options.requests, sizes=decisions.NUM_MODELS, sized=decisions.with_models)
    by_nodes = _grown(cluster, options.requests, sizes=decisions.NUM_NODES, sized=decisions.with_nodes)
    if options.json:
        record = {
            "preset": cluster.name,
            "requests": options.requests,
            "loads": {load: one.record() for load, one in found.items()},
            "by_models": {num: one.record() for num, one in by_models.items()},
            "by_nodes": {num: one.record() for num, one in by_nodes.items()},
        }
        typer.echo(json.dumps(record))
        return 0
    for load, one in found.items():
        told = f"{one.num} decisions, {1 / one.mean_s:.0f} a second, {one.num_waiting_max} waited at once"
        print_section(f"{cluster.name}, {load}: {told}", one.rows())
    rows = decisions.growth_rows(by_models, "models")
    print_section(f"decision time by models, {cluster.num_nodes} nodes, against the logarithm", rows)
    rows = decisions.growth_rows(by_nodes, "nodes")
    print_section("decision time by nodes, as many models and requests for each of them", rows)
    return 0


def _grown(
    cluster: HardwareCluster,
    num_requests: int,
    *,
    sizes: Sequence[int],
    sized: Callable[[HardwareCluster, int], HardwareCluster],
) -> dict[int, decisions.Decisions]:
    return {size: decisions.measure(sized(cluster, size), num_requests, seed=0) for size in sizes}
