"""What the single controller of a Ray cluster can handle, and what it adds to a request: a real cluster, no engines.

*Ingresses*: 1, 2 and 4 clients that act towards the controller as ingress replicas do (the same session, over the same
Ray calls), each an actor of its own. Measured are tickets per second with 32 asked for at once by each client, and the
seconds for one ticket when one client asks alone, at most fifty times a second. For comparison, requests are sent one
at a time through Serve's proxy, an ingress replica and a fake engine: this gives the ticket's share of such a request.
*Nodes*: 10, 100 and 1,000 simulated nodes that report through Ray as agents do, each with eight slots and twenty
checkpoints. Measured are the controller's processor time for reports alone, and the same tickets while nodes report.

The cluster is local: client, controller, proxy and engine share this machine's processors. Exits with 1 if a ticket
fails.

    python -m benchmarks.ray.scale --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from benchmarks.common.machine import machine
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, ROOT, Workspace, run_supervised
from benchmarks.ray.cluster import RayCluster, ray_cluster, sections_of
from benchmarks.ray.simulated import DONE, Reporter, SimulatedController, SimulatedLink
from sllm_vllm.ray.gate import RemoteGate
from sllm_vllm.ray.serve import RayLink, link_of
from sllm_vllm.ray.session import ControllerLink
from sllm_vllm.router.core.facts import RequestFacts

INGRESSES = (1, 2, 4)
NODES = (10, 100, 1000)
AT_ONCE = 32
LOAD_S, ALONE, IDLE_S = 10.0, 500, 20.0
GOAL_S = 0.003
PAUSE_S = 0.02
"""Pause between two tickets that are asked for alone, in which the notes about the last one are sent."""
MODEL = "fine"
_FREE = {"num_cpus": 0, "max_concurrency": 10_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting. Times in seconds; ``busy``: processor seconds per second of the controller while no tickets are
    asked for.
    """

    kind: str
    num_ingresses: int
    num_nodes: int
    tickets_per_s: float
    p50_s: float
    p99_s: float
    busy: float = 0.0
    request_p50_s: float = 0.0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the lines of JSON")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for the run")
    arguments = parser.parse_args()
    return run_supervised(lambda workspace: measure(workspace, arguments.json), arguments.cache.resolve())


def measure(workspace: Workspace, json_path: Path | None) -> int:
    """Run the whole benchmark and return the exit status."""
    console = Console()
    progress = Progress(console)
    rows = []
    with ray_cluster(RayCluster, workspace.run, "a", environment={"PYTHONPATH": str(ROOT)}) as cluster:
        with progress.step("bare calls from actor to actor"):
            bare_s = bare_call_s()
        progress.say(f"a bare call: {bare_s * 1e3:.2f} ms")
        for num in INGRESSES:
            with progress.step(f"tickets to {num} ingresses"):
                rows.append(with_ingresses(cluster, workspace, num))
            progress.say(told_of(rows[-1]))
        for num in NODES:
            with progress.step(f"{num} nodes that report"):
                rows.append(with_nodes(num))
            progress.say(told_of(rows[-1]))
    show(console, rows)
    if json_path is not None:
        lines = [machine(), {"kind": "bare_call", "p50_s": bare_s}, *(asdict(row) for row in rows)]
        json_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


# ----------------------------------------------------------------------------------------------------------- ingresses


def with_ingresses(cluster: RayCluster, workspace: Workspace, num: int) -> Row:
    """Measure the application's own controller, with one replica of a fake engine and ``num`` clients."""
    if num == INGRESSES[0]:
        defaults = {"ongoing_max": 10_000, "target_ongoing": 10_000, "keep_alive": 3600}
        engine = [sys.executable, str(ROOT / "benchmarks" / "router" / "overhead_engine.py"), "serve"]
        node = {"memory": "1GiB", "warm": False, "engine_command": engine}
        cluster.deploy(sections_of(workspace.run, {MODEL: {"source": "/models/fine"}}, node=node, defaults=defaults))
    link = RayLink(*link_of(str(cluster.directory / "router.yaml"))[:2], 0.0)
    clients = [_client(link) for _ in range(num)]
    ray.get([client.alone.remote([MODEL], 20) for client in clients])
    request_s = [_request_s(cluster.url) for _ in range(ALONE)]
    row = _measured("ingresses", clients, [MODEL], num_nodes=1)
    return replace(row, request_p50_s=statistics.median(request_s))


def _request_s(url: str) -> float:
    """Seconds of one request through Serve, up to its last byte."""
    body = json.dumps({"model": MODEL, "prompt": "hello", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    begun_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()
    return time.perf_counter() - begun_s


class Echo:
    """Does nothing; measures what a bare call to an actor takes."""

    async def call(self) -> None:
        """Return."""


def bare_call_s() -> float:
    """Median seconds of a bare call from actor to actor, called at the rate at which single tickets are asked for."""

    class Caller:
        async def time(self, echo: Any) -> list[float]:  # noqa: ANN401 - Ray has no types
            took_s = []
            for _ in range(ALONE):
                begun_s = time.perf_counter()
                await echo.call.remote()
                took_s.append(time.perf_counter() - begun_s)
                await asyncio.sleep(PAUSE_S)
            return took_s

    echo, caller = (ray.remote(kind).options(**_FREE).remote() for kind in (Echo, Caller))
    took_s: list[float] = ray.get(caller.time.remote(echo))
    return statistics.median(took_s)


class TicketClient:
    """Acts as an ingress towards the controller: asks for tickets and returns them at once."""

    def __init__(self, link: ControllerLink) -> None:
        self._link = link
        self._gate: RemoteGate | None = None
        self._num_asked = 0

    async def alone(self, models: Sequence[str], num: int) -> list[float]:
        """Seconds of each of ``num`` tickets, asked for one after the other."""
        took_s = []
        for _ in range(num):
            took_s.append(await self._ask(random.choice(models)))
            await asyncio.sleep(PAUSE_S)
        return took_s

    async def load(self, models: Sequence[str], seconds: float) -> int:
        """Number of tickets received in this time, with ``AT_ONCE`` asked for at once."""
        until_s = time.perf_counter() + seconds

        async def keep_asking() -> int:
            num = 0
            while time.perf_counter() < until_s:
                await self._ask(random.choice(models))
                num += 1
            return num

        return sum(await asyncio.gather(*(keep_asking() for _ in range(AT_ONCE))))

    async def _ask(self, model: str) -> float:
        if self._gate is None:
            self._gate = RemoteGate(f"client-{os.getpid()}", self._link, on_settings=lambda _: None)
            await self._gate.start()
        self._num_asked += 1
        begun_s = time.perf_counter()
        ticket = await self._gate.acquire(RequestFacts(f"{os.getpid()}-{self._num_asked}", model))
        took_s = time.perf_counter() - begun_s
        self._gate.first_byte(ticket)
        self._gate.finished(ticket, DONE)
        return took_s


def _client(link: ControllerLink) -> Any:  # noqa: ANN401 - Ray has no types
    return ray.remote(TicketClient).options(**_FREE).remote(link)


def _measured(kind: str, clients: Sequence[Any], models: Sequence[str], *, num_nodes: int) -> Row:
    """Measure with one client alone, then with all at once."""
    alone_s = sorted(ray.get(clients[0].alone.remote(models, ALONE)))
    num = sum(ray.get([client.load.remote(models, LOAD_S) for client in clients]))
    for client in clients:
        ray.kill(client)
    return Row(
        kind=kind,
        num_ingresses=len(clients),
        tickets_per_s=num / LOAD_S,
        p50_s=statistics.median(alone_s),
        p99_s=alone_s[int(0.99 * len(alone_s))],
        num_nodes=num_nodes,
    )


# --------------------------------------------------------------------------------------------------------------- nodes


def with_nodes(num: int) -> Row:
    """Measure a controller with ``num`` simulated nodes, a model and a replica on each, and one client."""
    reporter = ray.remote(Reporter).options(**_FREE).remote()
    controller = ray.remote(SimulatedController).options(**_FREE).remote(reporter, num)
    models = ray.get(controller.start.remote())
    client = _client(SimulatedLink(controller))
    ray.get(client.alone.remote(models, 20))
    before_s = ray.get(controller.processor_s.remote())
    time.sleep(IDLE_S)  # the controller's work in this time is what is measured
    busy = (ray.get(controller.processor_s.remote()) - before_s) / IDLE_S
    row = replace(_measured("nodes", [client], models, num_nodes=num), busy=busy)
    for actor in (controller, reporter):
        ray.kill(actor)
    return row


# -------------------------------------------------------------------------------------------------------------- report


def told_of(row: Row) -> str:
    """A row, as a line to print."""
    return f"{row.tickets_per_s:,.0f} tickets/s; one alone {row.p50_s * 1e3:.2f} ms, {row.busy:.1%} busy with reports"


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the rows as a table, and the verdict on the goal."""
    table = Table(title="tickets of one controller", title_justify="left", box=None)
    for name in ("ingresses", "nodes", "tickets/s", "P50 ms", "P99 ms", "of a request's P50", "busy with reports"):
        table.add_column(name, justify="right")
    for row in rows:
        share = f"{row.p50_s / row.request_p50_s:.0%} of {row.request_p50_s * 1e3:.1f} ms" if row.request_p50_s else ""
        busy = f"{row.busy:.1%}" if row.kind == "nodes" else ""
        counts = (str(row.num_ingresses), str(row.num_nodes), f"{row.tickets_per_s:,.0f}")
        table.add_row(*counts, f"{row.p50_s * 1e3:.2f}", f"{row.p99_s * 1e3:.2f}", share, busy)
    console.print(table)
    p50_s = rows[0].p50_s
    console.print(
        f"P50 of a ticket at most {GOAL_S * 1e3:.0f} ms: {p50_s * 1e3:.2f} ms: {'yes' if p50_s <= GOAL_S else 'NO'}"
    )


if __name__ == "__main__":
    sys.exit(main())
