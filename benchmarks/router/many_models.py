"""What ten thousand models cost: the router's start, and its longest pauses while models are reloaded and listed.

Runs a real router over a fake engine. One process streams from that engine, another asks for `/health` every 10 ms,
while the configuration file is reloaded with 10 % of its models changed, and operators and clients ask for lists. Each
pause is given twice: in seconds, and in processor seconds that the router used during it, which other load on this
machine hardly changes. Exits with 1 if the start took more than `--start-max` processor seconds beyond a start without
models, or if a pause, in processor time and in the best of `--rounds`, was longer than `--pause-max`.

    python -m benchmarks.router.many_models --json FILE
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from sllm_vllm.config import child_environment
from tests.support.router_process import RouterUnderTest, running_router, write_config
from tests.support.waiting import wait_until

STREAMED = "fine"
NUM_GONE = 10
"""Number of models that a reload removes, and of models that it adds."""
QUIET_S = 6.0
ANSWER_S_MAX = 300.0
"""Longest wait for an answer; long enough for a reload on a machine that runs other work."""
_WATCH = """
import json, select, socket, sys, time
host, port, pid, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
router = socket.create_connection((host, port))
longest_s = busy_s = 0.0

def busy():
    return time.clock_gettime(~pid << 3 | 2)  # the processor clock of another process: see clock_getcpuclockid(3)

def wait(has_come):
    global longest_s, busy_s
    began_s, began_busy_s = time.monotonic(), busy()
    data = b""
    while not has_come(data):
        part = router.recv(65536)
        assert part, "the router has closed the connection"
        data += part
    longest_s = max(longest_s, time.monotonic() - began_s)
    busy_s = max(busy_s, busy() - began_busy_s)

def tell():
    global longest_s, busy_s
    if select.select([sys.stdin], [], [], 0.01 if kind == "health" else 0)[0]:
        sys.stdin.readline()
        print(json.dumps([longest_s, busy_s]), flush=True)
        longest_s = busy_s = 0.0

if kind == "stream":
    fake = {"events": 100_000, "pace_s": 0.01}
    body = json.dumps({"model": "fine", "prompt": "p", "stream": True, "fake": fake}).encode()
    head = b"POST /v1/completions HTTP/1.1\\r\\nhost: x\\r\\ncontent-type: application/json\\r\\n"
    router.sendall(head + b"content-length: %d\\r\\n\\r\\n" % len(body) + body)
    wait(lambda data: b"data: " in data)
    longest_s = busy_s = 0.0
while True:
    if kind == "health":
        router.sendall(b"GET /health HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
    wait(lambda data: b"{}" in data if kind == "health" else b"data: " in data)
    tell()
"""


@dataclass(frozen=True, slots=True)
class Phase:
    """The longest waits of `/health` and between events of a stream during one operation.

    Each in seconds and in processor seconds that the router used meanwhile.
    """

    name: str
    took_s: float
    health_s: float
    health_busy_s: float
    stream_s: float
    stream_busy_s: float

    @property
    def busy_s(self) -> float:
        """The longer of the two pauses, in the router's processor time."""
        return max(self.health_busy_s, self.stream_busy_s)


class _Watcher:
    """A process that waits for the router's answers or events again and again."""

    def __init__(self, router: RouterUnderTest, kind: str) -> None:
        host, port = router.address
        command = [sys.executable, "-c", _WATCH, host, str(port), str(router.process.pid), kind]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def longest(self) -> tuple[float, float]:
        """The longest wait since the previous call: in seconds, and in processor seconds of the router."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        waited_s, busy_s = json.loads(self._process.stdout.readline())
        return waited_s, busy_s

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def watched(router: RouterUnderTest) -> Iterator[Callable[[str, Callable[[], object]], Phase]]:
    """Watch a router; yields a function that runs an operation and returns how long the router paused meanwhile."""
    wait_until(lambda: router.get("/ready").status == 200, "the router to be ready")
    assert router.post(STREAMED).status == 200
    router.answer_s_max = ANSWER_S_MAX
    health, stream = _Watcher(router, "health"), _Watcher(router, "stream")

    def during(name: str, work: Callable[[], object]) -> Phase:
        for watcher in (health, stream):
            watcher.longest()
        began_s = time.monotonic()
        work()
        took_s = time.monotonic() - began_s
        return Phase(name, took_s, *health.longest(), *stream.longest())

    try:
        yield during
    finally:
        health.close()
        stream.close()


def write_models(directory: Path, num_models: int, *, version: int = 0, max_len: int = 512) -> None:
    """Write a configuration, in YAML as people write it; from one version to the next 10 % of the models change.

    If ``max_len`` changes, all models change.
    """
    first = version * NUM_GONE
    lines = [
        f"  - name: org/model-{number}\n    source: org/model-{number}\n    keep_alive: 10m\n"
        f"    engine_arguments:\n      max-model-len: {max_len + (number % 10 == version % 10)}\n"
        for number in range(first, first + max(0, num_models - 1))
    ]
    write_config(directory, STREAMED, slots=1)
    config = directory / "router.yaml"
    values = json.loads(config.read_text())
    (streamed,) = values.pop("models")
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
    staging = directory / "router.yaml.new"
    staging.write_text(f"{head}models:\n  - {json.dumps(streamed)}\n{''.join(lines)}")
    os.replace(staging, config)


def busy_s(router: RouterUnderTest) -> float:
    """Processor seconds that the router has used so far, in all its threads."""
    return time.clock_gettime(~router.process.pid << 3 | 2)


def start_busy_s(directory: Path, num_models: int) -> float:
    """Processor seconds of a start until the router is ready; child processes are not counted."""
    write_models(directory, num_models)
    with running_router(directory) as router:
        wait_until(lambda: router.get("/ready").status == 200, "the router to be ready")
        return busy_s(router)


def measure_phases(directory: Path, num_models: int, rounds: int) -> list[list[Phase]]:
    """The phases of each round, all measured on one router."""
    write_models(directory, num_models)
    with running_router(directory) as router, watched(router) as during:
        works = works_of(router, num_models)
        return [
            [during(name, partial(work, version)) for name, work in works.items()] for version in range(1, rounds + 1)
        ]


def works_of(router: RouterUnderTest, num_models: int) -> dict[str, Callable[[int], None]]:
    """The operations to measure, by name; each is called with the number of the round, counted from 1."""
    directory = router.directory

    def reload(**fields: int) -> None:
        write_models(directory, num_models, **fields)
        require_done(router.admin("reload", "POST").status)

    def status() -> None:
        key = (directory / "node" / "admin.key").read_text().strip()
        environment = child_environment(HOME=str(directory), SLLM_URL=router.url, SLLM_ADMIN_KEY=key)
        command = [str(Path(sys.executable).with_name("sllm-vllm")), "status", "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)

    return {
        "nothing": lambda _: time.sleep(QUIET_S),
        "reload, 10 % changed": lambda version: reload(version=version),
        "reload, all changed": lambda version: reload(version=version, max_len=512 + 2 * version),
        "deploy one": lambda _: require_done(router.admin("models", "POST", {"name": "one", "source": "o/o"}).status),
        "GET /sllm/v1/models": lambda _: require_done(router.admin("models").status),
        "GET /v1/models": lambda _: require_done(router.get("/v1/models").status),
        "GET /metrics": lambda _: fetch_metrics(router),
        "sllm-vllm status": lambda _: status(),
    }


def require_done(status: int) -> None:
    """Check that an answer's status means success."""
    assert status in {200, 201}, status


def fetch_metrics(router: RouterUnderTest) -> None:
    """Fetch what Prometheus reads. Not by ``router.get``, as it is not JSON."""
    key = (router.directory / "node" / "admin.key").read_text().strip()
    request = urllib.request.Request(f"{router.url}/metrics", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=ANSWER_S_MAX) as answer:
        answer.read()


def best_of(rounds: list[list[Phase]]) -> list[Phase]:
    """For each phase, the round with the shortest pause."""
    return [min(phases, key=lambda phase: phase.busy_s) for phases in zip(*rounds, strict=True)]


# ------------------------------------------------------------------------------------------------------ the command


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3, help="of reloads and lists; the best one counts")
    parser.add_argument("--start-max", type=float, default=5.0, help="processor seconds that the models may add")
    parser.add_argument("--pause-max", type=float, default=0.05, help="processor seconds that a pause may last")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for what the run writes")
    parser.add_argument("--json", type=Path, help="file for the line of JSON (default: standard output)")
    given = parser.parse_args()
    return run_supervised(lambda workspace: run_benchmark(workspace, given), given.cache.resolve())


def run_benchmark(workspace: Workspace, given: argparse.Namespace) -> int:
    """Run the benchmark in its workspace and return the exit status."""
    console = Console()
    with Progress(console).step(f"{given.models} models"):
        empty_s = min(start_busy_s(workspace.tmp, 0) for _ in range(given.rounds))
        start_s = min(start_busy_s(workspace.tmp, given.models) for _ in range(given.rounds)) - empty_s
        phases = best_of(measure_phases(workspace.tmp, given.models, given.rounds))
    console.print(f"a start takes {start_s:.2f} s of processor time more than one without models ({empty_s:.2f} s)")
    console.print(table_of(phases))
    load = os.getloadavg()[0]
    record = {"models": given.models, "load": load, "start_s": start_s, "phases": [asdict(one) for one in phases]}
    if given.json is None:
        console.print(json.dumps(record), markup=False, soft_wrap=True)
    else:
        given.json.write_text(f"{json.dumps(record)}\n")
    return 0 if start_s <= given.start_max and max(one.busy_s for one in phases) <= given.pause_max else 1


def table_of(phases: list[Phase]) -> Table:
    """The phases, as a table to print."""
    table = Table("during", "took, s", "/health, ms", "busy, ms", "stream, ms", "busy, ms")
    for one in phases:
        waits = (one.health_s, one.health_busy_s, one.stream_s, one.stream_busy_s)
        table.add_row(one.name, f"{one.took_s:.2f}", *(f"{1000 * wait:.1f}" for wait in waits))
    return table


if __name__ == "__main__":
    sys.exit(main())
