"""The router's overhead in front of an engine, and that of peers in front of the same engine, in the same run.

Targets take turns, round by round, each time in another order: the engine itself (*direct*), our router, PyPI's
``vllm-router``, the ``litellm`` proxy, and Ray Serve's HTTP proxy with a deployment that streams through. All have the
same engine behind them, which our router has started: a fake one that uses next to no processor time, and with
``--real`` vLLM with a tiny random model. With ``--socket`` our router also runs with its own engine on a Unix socket,
as it starts vLLM, while the shared engine listens on a port. Each peer has its own environment in the cache, and one
worker.

Measured at 1, 16 and 64 streams at once:

* the time to the first byte of the body, and the part of it added to direct (difference of the same percentile, in the
  same round);
* chunks passed per second of processor time of a target's processes (ours without the engine; Ray Serve with its whole
  cluster);
* memory per open stream, as growth of the proportional set size of those processes.

Every stream's text is checked. Exits with 1 if a stream is wrong, or if an available target failed.

    python -m benchmarks.router.overhead --json FILE
    python -m benchmarks.router.overhead --peers none --quick
    python -m benchmarks.router.overhead --peers none --socket
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.cached_model import ensure_model
from benchmarks.common.machine import machine
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, ROOT, Workspace, run_supervised
from benchmarks.common.vllm_server import HOST, vllm_command
from benchmarks.loading.bytecode import environment_of
from benchmarks.router.overhead_client import Found, Load
from benchmarks.router.overhead_engine import MODEL, answer_of
from benchmarks.router.overhead_processes import OthersWatch
from benchmarks.router.overhead_report import (
    DIRECT,
    OURS,
    OURS_SOCKET,
    OpenMemory,
    Row,
    Sample,
    notes_of,
    percentile,
    rows_of,
    tables_of,
    verdicts_of,
)
from benchmarks.router.overhead_targets import (
    CLIENT_KEY,
    PEERS,
    Engine,
    Peer,
    Target,
    TargetFailed,
    ensure_peer,
    running_ours,
    running_peer,
)
from benchmarks.store.hops import write_lines
from sllm_vllm.config import child_environment

WIDTH_MIN = 170
NAMES = tuple(peer.name for peer in PEERS)
REAL_ARGUMENTS: dict[str, object] = {"enforce-eager": True, "max-model-len": 512, "max-num-seqs": 64}
REAL_MEMORY: dict[str, object] = {"kv_memory": "256MiB"}


@dataclass(frozen=True, slots=True)
class Shape:
    """Number of streams at once; for each stream, its number of pieces and the time between them."""

    streams: int
    chunks: int
    pace_ms: float


FIRST_SHAPES = (Shape(1, 2, 20), Shape(16, 12, 20), Shape(64, 50, 20))
"""Each gives about 50 requests a second, at 50 pieces a second per stream: what 64 streams of an engine look like."""
STREAM_SHAPES = (Shape(1, 1500, 1), Shape(16, 300, 5), Shape(64, 75, 20))
"""One stream per place, for a second and a half; up to 3200 pieces a second."""
OPEN_SHAPE = Shape(256, 4, 3000)
WARM_SHAPE = Shape(16, 4, 5)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure. ``is_real``: the engine answers freely, at its own pace, and only first bytes count.

    ``has_socket``: also measure our router with an engine on a Unix socket.
    """

    rounds: int
    seconds: float
    is_real: bool = False
    has_socket: bool = False

    @property
    def backend(self) -> str:
        """The engine in words."""
        return "vLLM, tiny model" if self.is_real else "fake engine"


@dataclass
class Outcome:
    """The results of a run so far. ``missing``: peers that are not available, and why."""

    plan: Plan
    samples: list[Sample] = field(default_factory=list)
    memories: list[OpenMemory] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    def rows(self) -> list[Row]:
        """A row for each target."""
        names = [DIRECT, OURS, OURS_SOCKET, *NAMES]
        return sorted(rows_of(self.samples, self.memories), key=lambda row: names.index(row.target))

    def faults(self) -> list[str]:
        """Everything that was wrong in answers."""
        told = [(one.target, one.streams, fault) for one in self.samples for fault in one.faults]
        told += [(one.target, one.streams, fault) for one in self.memories for fault in one.faults]
        return [f"{target} at {streams} streams: {fault}" for target, streams, fault in told]


class Measuring:
    """Runs loads on targets with the same engine."""

    def __init__(self, plan: Plan, environment: dict[str, str], model: str) -> None:
        self._plan = plan
        self._environment = environment
        self._model = model

    def sample(self, kind: str, target: Target, shape: Shape, *, number: int) -> Sample:
        """Run one load of a round."""
        load = self._load(target, shape, seconds=self._plan.seconds if kind == "first" else 0.0, seed=number)
        watch = OthersWatch(time.perf_counter())
        with self._client(load) as client:
            before_s = target.tree.cpu_s() if target.tree is not None else 0.0
            found = _finish(client)
            cpu_s = target.tree.cpu_s() - before_s if target.tree is not None else None
        return Sample(
            kind=kind,
            target=target.name,
            streams=shape.streams,
            round=number,
            p50_ms=percentile(found.firsts_ms, 0.5),
            p99_ms=percentile(found.firsts_ms, 0.99),
            num_firsts=len(found.firsts_ms),
            chunks=found.chunks,
            seconds=found.seconds,
            cpu_s=cpu_s,
            others=watch.share(time.perf_counter()),
            faults=tuple(found.faults),
        )

    def warm_up(self, target: Target) -> None:
        """Use all parts of a target once.

        Raises:
            TargetFailed: it answers wrongly.
        """
        with self._client(self._load(target, WARM_SHAPE, seconds=1.0, seed=0)) as client:
            if faults := _finish(client).faults:
                raise TargetFailed(f"it answers wrongly: {faults[0]}")

    def open_memory(self, target: Target) -> OpenMemory:
        """Measure the memory of open streams. Must be a target's first load: later loads reuse memory taken before."""
        assert target.tree is not None
        load = self._load(target, OPEN_SHAPE, seconds=0.0, seed=0)
        with self._client(load) as client:
            idle_nbytes = target.tree.pss_nbytes()
            _say_go(client)
            is_open = '"open"' in (line := _line(client))
            open_nbytes = target.tree.pss_nbytes()
            found = Found.model_validate_json(_line(client) if is_open else line)
        late = () if is_open else ("not all were open at once",)
        return OpenMemory(
            target=target.name,
            streams=OPEN_SHAPE.streams,
            processes=len(target.tree.pids()),
            idle_nbytes=idle_nbytes,
            open_nbytes=open_nbytes,
            faults=(*late, *found.faults),
        )

    def _load(self, target: Target, shape: Shape, *, seconds: float, seed: int) -> Load:
        return Load(
            host=HOST,
            port=target.port,
            model=self._model,
            key=CLIENT_KEY,
            streams=shape.streams,
            chunks=shape.chunks,
            pace_ms=shape.pace_ms,
            seconds=seconds,
            text=None if self._plan.is_real else answer_of(shape.chunks),
            seed=seed,
        )

    @contextlib.contextmanager
    def _client(self, load: Load) -> Iterator[subprocess.Popen[str]]:
        """Run a client that is connected and waits for the signal to start."""
        client = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.router.overhead_client"],
            cwd=ROOT,
            env=child_environment(**self._environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert client.stdin is not None
            client.stdin.write(f"{load.model_dump_json()}\n")
            client.stdin.flush()
            _line(client)  # the client is connected
            yield client
        finally:
            client.kill()
            client.communicate()


def _say_go(client: subprocess.Popen[str]) -> None:
    assert client.stdin is not None
    client.stdin.write("go\n")
    client.stdin.flush()


def _line(client: subprocess.Popen[str]) -> str:
    assert client.stdout is not None
    if not (line := client.stdout.readline()):
        raise TargetFailed("the client ended too early: it can't connect, or failed")
    return line


def _finish(client: subprocess.Popen[str]) -> Found:
    _say_go(client)
    while '"end"' not in (line := _line(client)):
        pass
    return Found.model_validate_json(line)


def measure(measuring: Measuring, plan: Plan, targets: Sequence[Target], *, outcome: Outcome, say: Progress) -> None:
    """Run all loads, into ``outcome``."""
    for target in targets:
        measuring.warm_up(target)
        if target.tree is not None and not plan.is_real:
            say.say(f"{plan.backend}: memory of {OPEN_SHAPE.streams} open streams: {target.name}")
            outcome.memories.append(measuring.open_memory(target))
    loads = [("first", shape) for shape in FIRST_SHAPES]
    loads += [] if plan.is_real else [("stream", shape) for shape in STREAM_SHAPES]
    for number in range(1, plan.rounds + 1):
        say.say(f"{plan.backend}: round {number} of {plan.rounds}")
        for nth, (kind, shape) in enumerate(loads):
            turn = (number + nth) % len(targets)
            for target in [*targets[turn:], *targets[:turn]]:
                if target.tree is not None or kind == "first":
                    outcome.samples.append(measuring.sample(kind, target, shape, number=number))


def run_backend(
    workspace: Workspace, plan: Plan, programs: dict[str, Path], *, outcome: Outcome, say: Progress
) -> None:
    """Start all targets in front of one engine (with ``--socket``, also our router with its own engine) and measure."""
    with contextlib.ExitStack() as stack:
        say.say(f"{plan.backend}: starting our router and its engine")
        engine = _real_engine(workspace) if plan.is_real else _fake_engine()
        ours, backend = stack.enter_context(running_ours(workspace, engine))
        targets = [Target(DIRECT, int(backend.rpartition(":")[2])), ours]
        if plan.has_socket:
            targets.append(stack.enter_context(running_ours(workspace, engine, on_socket=True))[0])
        for peer in PEERS:
            if peer.name in programs:
                say.say(f"{plan.backend}: starting {peer.name}")
                running = running_peer(workspace, peer, programs[peer.name], backend=backend, model=engine.model)
                try:
                    targets.append(stack.enter_context(running))
                except TargetFailed as error:
                    outcome.missing[peer.name] = str(error)
        measuring = Measuring(plan, environment_of(workspace), engine.model)
        measure(measuring, plan, targets, outcome=outcome, say=say)


_UNGUARDED = """
import os, sys
words = sys.argv[1:]
at = words.index("--middleware")
del words[at : at + 2]
os.environ.pop("VLLM_API_KEY", None)
os.execv(words[0], words)
"""


def _fake_engine() -> Engine:
    command = (sys.executable, str(ROOT / "benchmarks" / "router" / "overhead_engine.py"), "serve")
    return Engine(MODEL, "/nowhere/overhead", command, node={"memory": "1GiB"})


def _real_engine(workspace: Workspace) -> Engine:
    """Real vLLM without the agent's key for engines and the guard that checks it, as peers send no key."""
    command = (sys.executable, "-c", _UNGUARDED, str(vllm_command()), "serve")
    return Engine(MODEL, str(ensure_model(workspace, "tiny")), command, REAL_ARGUMENTS, REAL_MEMORY)


def ensure_peers(workspace: Workspace, chosen: Sequence[Peer], say: Progress) -> tuple[dict[str, Path], dict[str, str]]:
    """Programs of the peers that could be installed, and why the others could not."""
    programs, missing = {}, {}
    for peer in chosen:
        with say.step(f"{peer.requirement}, in an environment of its own in the cache"):
            try:
                programs[peer.name] = ensure_peer(workspace, peer)
            except TargetFailed as error:
                missing[peer.name] = str(error)
    return programs, missing


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="of all loads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a load for first bytes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round, loads of a second at most")
    parser.add_argument("--peers", default=",".join(NAMES), help="only these, with commas, or none (default: all)")
    parser.add_argument("--real", action="store_true", help="also before real vLLM")
    parser.add_argument("--socket", action="store_true", help="also our router with an engine on a Unix socket")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON (default: standard output)")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for environments and the model")
    arguments = parser.parse_args()
    names = [] if arguments.peers == "none" else [name.strip() for name in arguments.peers.split(",")]
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"--peers: unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}, none")
    if arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error("give 1 round of more than 0 seconds at least")
    if arguments.json is not None:
        arguments.json = arguments.json.resolve()
    arguments.chosen = [peer for peer in PEERS if peer.name in names]
    return run_supervised(lambda workspace: run_bench(workspace, arguments), arguments.cache.resolve())


def run_bench(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run the benchmark in its workspace and return the exit status."""
    console = Console(soft_wrap=True)
    say = Progress(console)
    programs, missing = ensure_peers(workspace, arguments.chosen, say)
    rounds, seconds = (1, min(1.0, arguments.seconds)) if arguments.quick else (arguments.rounds, arguments.seconds)
    outcomes = []
    for is_real in (False, True) if arguments.real else (False,):
        plan = Plan(min(rounds, 3) if is_real else rounds, seconds, is_real, arguments.socket)
        outcomes.append(outcome := Outcome(plan, missing=dict(missing)))
        try:
            run_backend(workspace, plan, programs, outcome=outcome, say=say)
        except (TargetFailed, subprocess.CalledProcessError, OSError) as error:
            outcome.failure = str(error)
    say.say("done")
    lines: list[dict[str, Any]] = [{**machine(), "arguments": [], "peers": _peers_told(arguments.chosen, missing)}]
    for outcome in outcomes:
        lines += _tell(outcome, console)
    write_lines(lines, arguments.json)
    is_well = all(not outcome.failure and not outcome.faults() for outcome in outcomes)
    return 0 if is_well and not any(outcome.missing.keys() - missing.keys() for outcome in outcomes) else 1


def _peers_told(chosen: Sequence[Peer], missing: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"name": peer.name, "package": peer.requirement, "setting": peer.setting, "has_run": peer.name not in missing}
        for peer in chosen
    ]


def _tell(outcome: Outcome, console: Console) -> list[dict[str, Any]]:
    """Print the results; returns their lines of JSON."""
    backend, rows = outcome.plan.backend, outcome.rows()
    wide = Console(width=max(console.width, WIDTH_MIN))
    if rows:
        wide.print(*tables_of(rows, outcome.missing, backend))
    verdicts, notes = verdicts_of(rows, backend), notes_of(rows, outcome.samples, backend)
    for verdict in verdicts:
        console.print(f"{verdict.name}: {verdict.figures}: {'yes' if verdict.is_met else 'NO'}", highlight=False)
    for line in (*notes, *(f"{name}: {why}" for name, why in outcome.missing.items())):
        console.print(line, markup=False, highlight=False)
    for line in (*outcome.faults(), *([outcome.failure] if outcome.failure else [])):
        console.print(line, style="bold red", markup=False, highlight=False)
    told: list[dict[str, Any]] = [row.as_json(backend) for row in rows]
    told += [memory.as_json(backend) for memory in outcome.memories]
    told += [sample.as_json(backend) for sample in outcome.samples]
    told += [
        {"kind": "unavailable", "target": name, "why": why.splitlines()[0]} for name, why in outcome.missing.items()
    ]
    return [*told, *({"kind": "note", "text": note} for note in notes), *(verdict.as_json() for verdict in verdicts)]


if __name__ == "__main__":
    raise SystemExit(main())
