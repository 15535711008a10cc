"""How long a user waits for a model that is not running: from the order to healthy, and to the first token.

Three ways are measured in turn: *stock*, ``vllm serve`` with vLLM's own loader; *cold*, an engine that our node agent
starts with exec; *warm*, an engine that the agent's warm parent forks. A tier says where the weights are: *disk warm*,
in the page cache; *disk cold*, on disk and not in the page cache; *store*, in the memory of the store's daemon (cold
and warm only). All ways get the same arguments, the same environment and the whole machine, and are asked the same
questions; their answers must have the same token ids. Free memory is not claimed beforehand. Exits with 1 if a token
differs, a start fails, or something grows during ``--cycles``.

    python -m benchmarks.cold_start --json FILE --png FILE
    python -m benchmarks.cold_start --no-starts --memory --cycles 50
    python -m benchmarks.cold_start --draw FILE --png FILE
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cold_start.cycles import Cycle, cycles_table_of, cycles_verdict, run_cycles
from benchmarks.cold_start.engine import ENGINE_ARGUMENTS, OVERRULING, EngineFailed, running_agent
from benchmarks.cold_start.memory import Memory, measure_memory, memory_table_of
from benchmarks.cold_start.models import ARCHITECTURES, ensure_architecture
from benchmarks.cold_start.plot import draw, read_lines
from benchmarks.cold_start.report import (
    SMALL,
    TIERS,
    WAYS,
    Case,
    phases_table_of,
    rows_of,
    table_of,
    tokens_verdict,
    verdicts_of,
)
from benchmarks.cold_start.run import ColdStarts
from benchmarks.common.cached_model import SIZES
from benchmarks.common.machine import has_cuda, machine
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.common.vllm_server import ServerFailed
from benchmarks.loading.bytecode import environment_of, warm_up
from benchmarks.loading.page_cache import PageCacheRefused
from benchmarks.loading.report import Verdict
from benchmarks.store.daemon import DaemonFailed
from benchmarks.store.hops import write_lines
from sllm_vllm.config import child_environment, replace_environment
from sllm_vllm.errors import SllmError

FAILURES = (EngineFailed, ServerFailed, DaemonFailed, PageCacheRefused, SllmError, OSError)
"""Errors that end a run; what was measured before is still reported."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""Set for every engine, in addition to what it inherits."""
WIDTH_MIN = 150


@dataclass
class Outcome:
    """The results of a run so far."""

    runs: ColdStarts | None = None
    cycles: list[Cycle] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    failure: str = ""

    def verdicts(self) -> list[Verdict]:
        """The verdicts on everything that was measured."""
        starts = self.runs.starts if self.runs is not None else []
        found = verdicts_of(starts) if starts else []
        return [*found, cycles_verdict(self.cycles)] if self.cycles else found

    @property
    def status(self) -> int:
        """The exit status: 1 if something did not work; a slow start is not a failure."""
        starts = self.runs.starts if self.runs is not None else []
        is_well = not self.failure and (not starts or tokens_verdict(starts).is_met)
        return 0 if is_well and (not self.cycles or cycles_verdict(self.cycles).is_met) else 1


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_choice(parser, "--architectures", ("llama", "opt"), known=ARCHITECTURES)
    _add_choice(parser, "--sizes", (SMALL, "1.2GB"), known=SIZES)
    _add_choice(parser, "--tiers", TIERS, known=TIERS)
    _add_choice(parser, "--ways", WAYS, known=WAYS)
    parser.add_argument("--rounds", type=int, default=5, help=f"of {SMALL}, disk warm (default: %(default)s)")
    parser.add_argument("--rounds-large", type=int, default=2, help="of all other cases (default: %(default)s)")
    parser.add_argument("--no-starts", action="store_true", help="--memory or --cycles alone")
    parser.add_argument("--memory", action="store_true", help="also measure the memory of engines")
    parser.add_argument("--cycles", type=int, default=0, metavar="N", help="also N starts and stops in a row")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON (default: standard output)")
    parser.add_argument("--png", type=Path, help="file for a picture of the phases")
    parser.add_argument("--draw", type=Path, metavar="FROM", help="only draw the lines of JSON of an earlier run")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for models and checkpoints")
    arguments = parser.parse_args()
    if problem := _problem(arguments):
        parser.error(problem)
    for name in ("json", "png"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, getattr(arguments, name).resolve())
    if arguments.draw is not None:
        _draw(read_lines(arguments.draw), arguments)
        return 0
    return run_supervised(lambda workspace: run_bench(workspace, arguments), arguments.cache.resolve())


def _add_choice(parser: argparse.ArgumentParser, name: str, default: Sequence[str], *, known: Sequence[str]) -> None:
    def parse(text: str) -> tuple[str, ...]:
        words = tuple(word.strip() for word in text.split(","))
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return words

    text = ",".join(default)
    parser.add_argument(name, type=parse, default=tuple(default), help=f"only these, with commas (default: {text})")


def _problem(arguments: argparse.Namespace) -> str:
    """What is wrong with the arguments; empty if they are valid."""
    if arguments.draw is not None and arguments.png is None:
        return "--draw: --png says where to"
    if min(arguments.rounds, arguments.rounds_large) < 1 or arguments.cycles < 0:
        return "give 1 round at least"
    if arguments.no_starts and not arguments.memory and not arguments.cycles:
        return "--no-starts: nothing is left to do"
    return ""


def run_bench(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run the benchmark in its workspace and return the exit status."""
    console = Console(soft_wrap=True)
    progress, outcome = Progress(console), Outcome()
    _take_environment(workspace)
    try:
        models = {}
        for architecture in arguments.architectures:
            for size in arguments.sizes:
                with progress.step(f"a random {architecture} of {size}, kept in {workspace.cache}"):
                    models[architecture, size] = ensure_architecture(workspace, architecture, size)
        with progress.step("importing vLLM once, so that the first start is no slower than the others"):
            warm_up({})
        asyncio.run(_measure(workspace, arguments, progress, models=models, outcome=outcome))
    except subprocess.CalledProcessError as error:
        outcome.failure = f"{error}\n{error.output}"
    except FAILURES as error:
        outcome.failure = str(error) or type(error).__name__
    _tell(outcome, console, arguments)
    return outcome.status


def _take_environment(workspace: Workspace) -> None:
    """Set the engines' environment in this process: variables given only in an order would make the start cold.

    On the CPU, vLLM by default keeps one processor free and binds its threads to the others; our agent does not. Here
    neither way does. Where Python must not write bytecode, an installation is often compiled only in part, and each
    start would compile the rest; so bytecode goes to a directory in the cache.
    """
    ours = {**environment_of(workspace), **ENVIRONMENT}
    if not has_cuda():
        num_cpus = len(os.sched_getaffinity(0))
        ours |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(num_cpus)}
    if sys.dont_write_bytecode:
        ours |= {"PYTHONPYCACHEPREFIX": str(workspace.cache / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    whole = child_environment(**ours)
    replace_environment({name: value for name, value in whole.items() if name not in OVERRULING})


async def _measure(
    workspace: Workspace,
    arguments: argparse.Namespace,
    progress: Progress,
    *,
    models: dict[tuple[str, str], Path],
    outcome: Outcome,
) -> None:
    """Measure all parts that the arguments ask for, into ``outcome``."""
    progress.say("starting two agents; the first one's warm parent imports")
    async with (
        running_agent(workspace, "warm", warm=True) as warm,
        running_agent(workspace, "cold", warm=False) as cold,
    ):
        runs = ColdStarts(workspace=workspace, progress=progress, models=models, warm=warm, cold=cold)
        outcome.runs = runs
        for architecture, size in models:
            await runs.checkpoint(architecture, size)
        for case in [] if arguments.no_starts else cases_of(arguments):
            ways = [way for way in arguments.ways if way != "stock" or case.tier != "store"]
            is_main = (case.size, case.tier) == (SMALL, "disk warm")
            await runs.run(case, ways, rounds=arguments.rounds if is_main else arguments.rounds_large)
        if arguments.cycles:
            size = arguments.sizes[0]
            in_turn = [models[architecture, size] for architecture in arguments.architectures]
            outcome.cycles = await run_cycles(
                warm, in_turn, num_cycles=arguments.cycles, workspace=workspace, progress=progress
            )
    if arguments.memory:
        for size in arguments.sizes:
            progress.say(f"memory of {arguments.architectures[0]} {size}")
            outcome.memory += await measure_memory(workspace, models[arguments.architectures[0], size])


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """The cases to start, in order; the most important comes first."""
    return [
        Case(architecture, size, tier)
        for size in arguments.sizes
        for tier in arguments.tiers
        for architecture in arguments.architectures
    ]


def _tell(outcome: Outcome, console: Console, arguments: argparse.Namespace) -> None:
    """Print tables and verdicts, write the lines of JSON, draw the picture."""
    starts = outcome.runs.starts if outcome.runs is not None else []
    rows, verdicts = rows_of(starts), outcome.verdicts()
    wide = Console(width=max(console.width, WIDTH_MIN))
    if rows:
        wide.print(table_of(rows), phases_table_of(rows))
    if outcome.memory:
        wide.print(memory_table_of(outcome.memory))
    if outcome.cycles:
        wide.print(cycles_table_of(outcome.cycles))
    for verdict in verdicts:
        console.print(f"{verdict.name}: {verdict.figures}: {'yes' if verdict.is_met else 'NO'}", highlight=False)
    told = machine(arguments=list(ENGINE_ARGUMENTS))
    lines = [told, *(start.as_json() for start in starts), *(row.as_json() for row in rows)]
    lines += [memory.as_json() for memory in outcome.memory] + [cycle.as_json() for cycle in outcome.cycles]
    lines += [verdict.as_json() for verdict in verdicts]
    write_lines(lines, arguments.json)
    if arguments.png is not None and rows:
        _draw(lines, arguments)
    if outcome.failure:
        console.print(outcome.failure, style="bold red", markup=False, highlight=False)


def _draw(lines: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    chosen = [
        line
        for line in lines
        if line["kind"] == "machine"
        or (line["kind"] == "row" and Case(line["architecture"], line["size"], line["tier"]) in cases_of(arguments))
    ]
    draw(chosen, arguments.png)
    print(f"picture: {arguments.png}")


if __name__ == "__main__":
    raise SystemExit(main())
