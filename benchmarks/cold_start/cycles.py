"""Checks that nothing grows from start to start: starts many engines in a row on one warm agent and counts what is
left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.cold_start.engine import EngineFailed, our_engine, wait_warm
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import Workspace
from benchmarks.common.vllm_server import stream_completion
from benchmarks.demo.loading import questions
from benchmarks.loading.report import Verdict
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.engine_process import living_members
from sllm_vllm.node.hardware import pss_nbytes
from sllm_vllm.units import MIB

SETTLED_CYCLE = 5
"""Growth is counted from this cycle on; in a shorter run, from the first."""
SHOWN_CYCLES = (1, 5, 10, 25, 50)
MEMORY_GROWTH_MAX = 0.02
SETTLE_S_MAX = 2.0
"""How long descriptors, processes and the like may take to be closed or reaped after an engine has ended."""
NUM_THREADS = 8
"""Threads of this process's pool. All are started beforehand, so that none is counted as growth."""
_POLL_S = 0.05
_LISTENS = "0A"
_LOOPBACK = ("0100007F", "00000000000000000000000001000000")
"""127.0.0.1 and ::1, as written in ``/proc/net/tcp`` and ``tcp6``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """What remains after an engine has ended. Counts must not grow; memory may grow by ``MEMORY_GROWTH_MAX``."""

    number: int
    left_processes: int
    """Living processes of the engine's session."""
    threads: int
    descriptors: int
    parent_threads: int
    parent_descriptors: int
    shm_entries: int
    listening_ports: int
    """On loopback, of this process and all its descendants."""
    parent_pss_nbytes: int
    parent_rss_nbytes: int

    def as_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {"kind": "cycles", **asdict(self)}


COUNTS = (
    *("left_processes", "threads", "descriptors", "parent_threads", "parent_descriptors"),
    *("shm_entries", "listening_ports"),
)
MEMORIES = ("parent_pss_nbytes", "parent_rss_nbytes")


async def run_cycles(
    agent: NodeAgent, models: Sequence[Path], *, num_cycles: int, workspace: Workspace, progress: Progress
) -> list[Cycle]:
    """Start and stop ``num_cycles`` engines, models in turn; each answers one question.

    Raises:
        EngineFailed, ServerFailed: an engine did not start or answer, or was not forked.
    """
    asyncio.get_running_loop().set_default_executor(_full_pool())
    parent = await wait_warm(agent)
    cycles: list[Cycle] = []
    for number in range(1, num_cycles + 1):
        model = models[(number - 1) % len(models)]
        start_s = time.monotonic()
        async with our_engine(agent, model, workspace) as ready:
            if not ready.is_warm:
                raise EngineFailed(f"cycle {number}: the engine was not forked")
            await asyncio.to_thread(stream_completion, ready.port, next(questions()), api_key=ready.api_key)
        if await wait_warm(agent) != parent:
            raise EngineFailed(f"cycle {number}: the warm parent was replaced")
        cycles.append(await _settled(number, ready.pid, parent, before=cycles))
        progress.say(f"cycle {number} of {num_cycles}: {model.name}: {time.monotonic() - start_s:.1f} s")
    return cycles


def growth_of(cycles: Sequence[Cycle]) -> list[str]:
    """What is larger at the end than at ``SETTLED_CYCLE``, in words; also lists the processes that engines left."""
    if not cycles:
        return []
    first, last = settled(cycles), cycles[-1]
    left = [f"cycle {cycle.number} left {cycle.left_processes} processes" for cycle in cycles if cycle.left_processes]
    return left + grown(first, last)


def grown(first: Cycle, last: Cycle) -> list[str]:
    """The figures that are larger in ``last`` than in ``first`` (memory: by more than the allowed share), in words."""
    found = []
    for name in (*COUNTS, *MEMORIES):
        before, after = getattr(first, name), getattr(last, name)
        if after > before * (1 + MEMORY_GROWTH_MAX if name in MEMORIES else 1):
            found.append(f"{name}: {before} in cycle {first.number}, {after} in cycle {last.number}")
    return found


def settled(cycles: Sequence[Cycle]) -> Cycle:
    """The cycle that later ones are compared with."""
    return cycles[SETTLED_CYCLE - 1 if len(cycles) > SETTLED_CYCLE else 0]


def cycles_verdict(cycles: Sequence[Cycle]) -> Verdict:
    """The verdict: whether nothing has grown."""
    growth = growth_of(cycles)
    figures = "; ".join(growth) if growth else f"cycles {settled(cycles).number} to {cycles[-1].number}"
    return Verdict(f"nothing grows in {len(cycles)} starts and stops", not growth, figures)


def cycles_table_of(cycles: Sequence[Cycle]) -> Table:
    """Some of the cycles, as a table to print."""
    table = Table(title="after each cycle", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("cycle", *(name.replace("_", "\n") for name in COUNTS), "parent\nPSS MiB", "parent\nRSS MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for cycle in cycles:
        if cycle.number in SHOWN_CYCLES or cycle is cycles[-1]:
            memories = (f"{getattr(cycle, name) / MIB:.1f}" for name in MEMORIES)
            table.add_row(str(cycle.number), *(str(getattr(cycle, name)) for name in COUNTS), *memories)
    return table


async def _settled(number: int, session: int, parent: int, *, before: Sequence[Cycle]) -> Cycle:
    """Measure after a cycle; while something seems to have grown, measure again, as it may still be closing."""
    deadline_s = time.monotonic() + SETTLE_S_MAX
    while True:
        cycle = await asyncio.to_thread(_measure, number, session, parent)
        has_grown = cycle.left_processes > 0 or bool(before and grown(settled(before), cycle))
        if not has_grown or time.monotonic() > deadline_s:
            return cycle
        await asyncio.sleep(_POLL_S)


def _measure(number: int, session: int, parent: int) -> Cycle:
    own = os.getpid()
    return Cycle(
        number=number,
        left_processes=len(living_members(session)),
        threads=_num_entries(own, "task"),
        descriptors=_num_entries(own, "fd"),
        parent_threads=_num_entries(parent, "task"),
        parent_descriptors=_num_entries(parent, "fd"),
        shm_entries=len(os.listdir("/dev/shm")),
        listening_ports=_num_listening(own),
        parent_pss_nbytes=pss_nbytes(parent) or 0,
        parent_rss_nbytes=int(Path(f"/proc/{parent}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    )


def _num_entries(pid: int, folder: str) -> int:
    return len(os.listdir(f"/proc/{pid}/{folder}"))


def _num_listening(root: int) -> int:
    """Number of listening loopback sockets of a process and its descendants; a shared socket counts once."""
    inodes: set[str] = set()
    for pid in _tree(root):
        with contextlib.suppress(FileNotFoundError, PermissionError, ProcessLookupError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return sum(f"socket:[{inode}]" in inodes for inode in _listening_inodes())


def _listening_inodes() -> list[str]:
    """Inodes of the listening loopback sockets of all processes on the machine."""
    found = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and fields[1].partition(":")[0] in _LOOPBACK:
                    found.append(fields[9])
    return found


def _tree(root: int) -> set[int]:
    """A process and all its descendants."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
    found, size = {root}, 0
    while len(found) != size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


def _full_pool() -> ThreadPoolExecutor:
    """A thread pool whose threads are all running already."""
    pool = ThreadPoolExecutor(NUM_THREADS)
    barrier = threading.Barrier(NUM_THREADS)
    for _ in range(NUM_THREADS):
        pool.submit(barrier.wait)
    return pool
