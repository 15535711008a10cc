"""A thousand clients that stream through one router for a minute: is anything lost or mixed up, does its memory grow?

Runs a real router over one engine that only sends events (``tests/support/fake_engine.py``). Every stream has its own
name, which each of its events contains with a number; the client compares what arrived with what should have. Half of
the clients keep their connections from stream to stream. At first they stream without pauses, until what the router
keeps on purpose (its last 20,000 events and actions) is full; from then on its resident memory is recorded every
second. Exits with 1 if an event is lost, duplicated or from another stream, or if memory grew by more than
``--growth-max``.

    python -m benchmarks.router.streams --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import resource
import secrets
import statistics
import subprocess
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, ROOT, Workspace, run_supervised
from sllm_vllm.config import child_environment
from sllm_vllm.units import KIB, MIB

MODEL = "fine"
GROWTH_MAX_MIB = 16.0
READY_S_MAX = 120.0
STREAM_S_MAX = 300.0
BUFFER_NBYTES = 1 << 22
PROBLEMS_SHOWN = 10
_URL = re.compile(r"event=router_serving url=http://(\S+):(\d+)")

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """Number of clients and duration. ``warm_up``: streams of each client before that, without pauses."""

    clients: int
    seconds: float
    events: int
    pace_s: float
    warm_up: int


@dataclass(slots=True)
class Tally:
    """What was observed. ``memory``: the router's resident bytes, every second; ``open``: streams open at that time."""

    streams: int = 0
    events: int = 0
    num_wrong: int = 0
    problems: list[str] = field(default_factory=list)
    num_open: int = 0
    memory: list[int] = field(default_factory=list)
    open: list[int] = field(default_factory=list)

    def note(self, problem: str, num_events: int) -> None:
        """Count a stream that has ended; ``problem`` is empty if it was right."""
        self.streams += 1
        self.events += num_events
        if problem:
            self.num_wrong += 1
            self.problems = [*self.problems, problem][:PROBLEMS_SHOWN]

    @property
    def first_nbytes(self) -> float:
        """Median of the memory in the first fifth of the time."""
        return statistics.median(self.memory[: max(1, len(self.memory) // 5)])

    @property
    def last_nbytes(self) -> float:
        """Median of the memory in the last fifth of the time."""
        return statistics.median(self.memory[-max(1, len(self.memory) // 5) :])

    @property
    def growth_mib(self) -> float:
        """Growth from the first fifth to the last, in MiB."""
        return (self.last_nbytes - self.first_nbytes) / MIB


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000, help="streams at once")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, after the warm-up")
    parser.add_argument("--events", type=int, default=20, help="of a stream")
    parser.add_argument("--pace", type=float, default=0.5, help="seconds before each event")
    parser.add_argument("--warm-up", type=int, default=6, help="streams of each client that fill the router's memory")
    parser.add_argument("--growth-max", type=float, default=GROWTH_MAX_MIB, help="MiB of growth that are allowed")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for what the run writes")
    parser.add_argument("--json", type=Path, help="file for the line of JSON (default: standard output)")
    given = parser.parse_args()
    plan = Plan(given.clients, given.seconds, given.events, given.pace, given.warm_up)
    return run_supervised(
        lambda workspace: run_benchmark(workspace, plan, growth_max_mib=given.growth_max, output=given.json),
        given.cache.resolve(),
    )


def run_benchmark(workspace: Workspace, plan: Plan, *, growth_max_mib: float, output: Path | None) -> int:
    """Run the benchmark in its workspace and return the exit status."""
    console = Console()
    _raise_file_limit()
    step = Progress(console).step(f"{plan.clients} clients stream, {plan.seconds:g} s after the warm-up")
    with running_router(workspace, plan) as (process, address), step:
        tally = asyncio.run(stream_all(address, process.pid, plan))
    record = record_of(tally, plan)
    console.print(table_of(record))
    line = json.dumps({**record, "memory_mib": [round(nbytes / MIB, 1) for nbytes in tally.memory]})
    if output is None:
        console.print(line, markup=False, soft_wrap=True)
    else:
        output.write_text(f"{line}\n")
    problems = list(tally.problems)
    if tally.growth_mib > growth_max_mib:
        problems.append(f"memory grew by {tally.growth_mib:.1f} MiB, more than {growth_max_mib:g}")
    for problem in problems:
        console.print(problem, markup=False)
    return 1 if problems else 0


def record_of(tally: Tally, plan: Plan) -> dict[str, Any]:
    """All results, for JSON."""
    return {
        "clients": plan.clients,
        "seconds": plan.seconds,
        "streams": tally.streams,
        "events": tally.events,
        "streams_wrong": tally.num_wrong,
        "streams_at_once": statistics.median(tally.open),
        "memory_first_mib": round(tally.first_nbytes / MIB, 1),
        "memory_last_mib": round(tally.last_nbytes / MIB, 1),
        "memory_peak_mib": round(max(tally.memory) / MIB, 1),
        "memory_growth_mib": round(tally.growth_mib, 1),
    }


def table_of(record: dict[str, Any]) -> Table:
    """The results, as a table to print."""
    table = Table(title="streams through one router", title_justify="left", box=None, show_header=False)
    for name, value in record.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    return table


# --------------------------------------------------------------------------------------------------------- the clients


async def stream_all(address: Address, router_pid: int, plan: Plan) -> Tally:
    """Warm up, then stream for the planned time; every stream that has begun is read to its end."""
    tally = Tally()
    clients = [_Client(number, address, plan, tally=tally) for number in range(plan.clients)]
    await asyncio.gather(*(client.warm_up() for client in clients))
    sampling = asyncio.create_task(_sample(router_pid, tally))
    end_s = time.monotonic() + plan.seconds
    await asyncio.gather(*(client.run(end_s) for client in clients))
    sampling.cancel()
    await asyncio.gather(sampling, return_exceptions=True)
    return tally


class _Client:
    """One client: one stream after another. Every second client opens a new connection for each."""

    def __init__(self, number: int, address: Address, plan: Plan, *, tally: Tally) -> None:
        self._number = number
        self._address = address
        self._plan = plan
        self._tally = tally
        self._connection: tuple[StreamReader, StreamWriter] | None = None

    async def warm_up(self) -> None:
        for _ in range(self._plan.warm_up):
            await self._stream(0.0)

    async def run(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            await self._stream(self._plan.pace_s)
        self._hang_up()

    async def _stream(self, pace_s: float) -> None:
        """Run and check one stream. A failure is recorded; the next stream gets a new connection."""
        name = f"{self._number}-{secrets.token_hex(8)}"
        self._tally.num_open += 1
        try:
            async with asyncio.timeout(STREAM_S_MAX):
                data = await self._exchange(name, pace_s)
            problem = problem_of(data, name, self._plan.events)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:  # TimeoutError is an OSError
            problem = f"stream {name}: {error!r}"
        finally:
            self._tally.num_open -= 1
        self._tally.note(problem, self._plan.events)
        if problem or self._number % 2:
            self._hang_up()

    async def _exchange(self, name: str, pace_s: float) -> bytes:
        """Send the request and read the whole body."""
        if self._connection is None:
            self._connection = await asyncio.open_connection(*self._address, limit=BUFFER_NBYTES)
        reader, writer = self._connection
        fake = {"events": self._plan.events, "pace_s": pace_s}
        body = json.dumps({"model": MODEL, "prompt": name, "user": name, "stream": True, "fake": fake}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise ValueError(f"it was answered {answer[:60]!r}")
        pieces = []
        while (size := int(await reader.readuntil(b"\r\n"), 16)) > 0:
            pieces.append((await reader.readexactly(size + 2))[:-2])
        await reader.readexactly(2)
        return b"".join(pieces)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None


def problem_of(data: bytes, name: str, num_events: int) -> str:
    """What is wrong with a stream's events; empty if each is there once, in order, with nothing else."""
    *events, rest = data.decode().split("\n\n")
    if len(events) < 2:
        return f"stream {name}: 0 of {num_events} events, only {data[-200:]!r}"
    *texts, usage, done = [event.removeprefix("data: ") for event in events]
    wanted = [f"{name}/{number} " for number in range(num_events)]
    got = [json.loads(text)["choices"][0]["text"] if "choices" in text else text for text in texts]
    if got != wanted:
        wrong = next((text for text, right in zip(got, wanted, strict=False) if text != right), None)
        return f"stream {name}: {len(got)} of {num_events} events, the first that is wrong: {wrong!r}"
    if rest or done != "[DONE]" or f'"completion_tokens": {num_events}' not in usage:
        return f"stream {name}: its end is wrong: {data[-200:]!r}"
    return ""


async def _sample(pid: int, tally: Tally) -> None:
    while True:
        tally.memory.append(resident_nbytes(pid))
        tally.open.append(tally.num_open)
        await asyncio.sleep(1.0)


def resident_nbytes(pid: int) -> int:
    """Resident bytes of a process. Linux only."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nVmRSS:")[2].split()[0]) * KIB


# ---------------------------------------------------------------------------------------------------------- the router


@contextlib.contextmanager
def running_router(workspace: Workspace, plan: Plan) -> Iterator[tuple[subprocess.Popen[bytes], Address]]:
    """Run a router over the fake engine; its limits allow as many requests at once as there are clients."""
    config, log = workspace.tmp / "router.yaml", workspace.run / "router.log"
    values = {
        "server": {"port": 0, "requests_max": 2 * plan.clients, "connections_max": 2 * plan.clients},
        "node": {
            "slots": 1,
            "memory": "1GiB",
            "warm": False,
            "node_dir": str(workspace.tmp / "node"),
            "engine_command": [sys.executable, str(ROOT / "tests" / "support" / "fake_engine.py"), "serve"],
        },
        "store": {"directory": str(workspace.run / "store")},
        "models": [{"name": MODEL, "source": f"/models/{MODEL}", **limits_of(plan.clients)}],
    }
    config.write_text(json.dumps(values))
    command = [str(Path(sys.executable).with_name("sllm-vllm")), "serve", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=child_environment())
    try:
        yield process, _wait_serving(process, log)
    finally:
        process.terminate()
        process.wait(60)


def limits_of(clients: int) -> dict[str, int]:
    """Limits of a model that let all clients use it at once, on one engine."""
    return {"ongoing_max": clients, "target_ongoing": clients, "queue_max": clients, "max_replicas": 1}


def _wait_serving(process: subprocess.Popen[bytes], log: Path) -> Address:
    deadline_s = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline_s and process.poll() is None:
        if found := _URL.search(log.read_text()):
            return found[1], int(found[2])
        time.sleep(0.1)
    raise SystemExit(f"the router did not get ready\n{log.read_text(errors='replace')}")


def _raise_file_limit() -> None:
    """Raise the limit on open files, which the router inherits: a stream needs one descriptor here and two there."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
