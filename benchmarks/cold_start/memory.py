"""How much memory engines take: proportional set sizes of a warm parent, its engines, a cold engine and a stock engine.

Cold and stock engines are measured while no warm parent runs, because it would share libraries with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.cold_start.engine import EngineFailed, Ready, our_engine, running_agent, stock_engine, wait_warm
from benchmarks.common.supervise import Workspace
from benchmarks.common.vllm_server import stream_completion
from benchmarks.demo.loading import questions
from sllm_vllm.node.hardware import pss_nbytes, session_pss_nbytes
from sllm_vllm.units import MIB


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory at one moment, in bytes: of the warm parent (None if there is none) and of each engine's session."""

    model: str
    what: str
    parent_nbytes: int | None
    engines_nbytes: tuple[int, ...]

    @property
    def sum_nbytes(self) -> int:
        """Bytes of the parent and all engines together."""
        return (self.parent_nbytes or 0) + sum(self.engines_nbytes)

    def as_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {
            "kind": "memory",
            "model": self.model,
            "what": self.what,
            "parent_nbytes": self.parent_nbytes,
            "engines_nbytes": list(self.engines_nbytes),
            "sum_nbytes": self.sum_nbytes,
        }


async def measure_memory(workspace: Workspace, model: Path) -> list[Memory]:
    """Start and measure each kind of engine in turn; each answers a question before it is measured.

    The first engine writes the checkpoint if there is none.

    Raises:
        EngineFailed, ServerFailed: an engine did not start or answer.
    """
    found = await _measure_forked(workspace, model)
    async with running_agent(workspace, "m-cold", warm=False) as agent, our_engine(agent, model, workspace) as ready:
        found.append(await _measured(model, "cold engine", None, engines=[ready]))
    async with stock_engine(model, workspace) as ready:
        found.append(await _measured(model, "stock engine", None, engines=[ready]))
    return found


async def _measure_forked(workspace: Workspace, model: Path) -> list[Memory]:
    async with running_agent(workspace, "m-warm", warm=True, slots=2) as agent:
        parent = await wait_warm(agent)
        found = [await _measured(model, "warm parent", parent, engines=[])]
        async with our_engine(agent, model, workspace) as first:
            _check_forked(first)
            found.append(await _measured(model, "warm parent, 1 engine", parent, engines=[first]))
            async with our_engine(agent, model, workspace) as second:
                _check_forked(second)
                found.append(await _measured(model, "warm parent, 2 engines", parent, engines=[first, second]))
    return found


async def _measured(model: Path, what: str, parent: int | None, *, engines: Sequence[Ready]) -> Memory:
    for ready in engines:
        question = next(questions())
        await asyncio.to_thread(stream_completion, ready.port, question, api_key=ready.api_key)
    sizes = [await asyncio.to_thread(session_pss_nbytes, ready.pid) for ready in engines]
    parent_nbytes = None if parent is None else await asyncio.to_thread(pss_nbytes, parent)
    return Memory(model.name, what, parent_nbytes, tuple(sizes))


def _check_forked(ready: Ready) -> None:
    if not ready.is_warm:
        raise EngineFailed("memory: the engine was not forked")


def memory_table_of(found: Sequence[Memory]) -> Table:
    """The results in MiB, as a table to print."""
    title = "proportional set sizes, MiB"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("model", "what"):
        table.add_column(column, no_wrap=True)
    for column in ("parent", "engines", "sum"):
        table.add_column(column, justify="right", no_wrap=True)
    for memory in found:
        parent = "-" if memory.parent_nbytes is None else f"{memory.parent_nbytes / MIB:.0f}"
        engines = " + ".join(f"{nbytes / MIB:.0f}" for nbytes in memory.engines_nbytes) or "-"
        table.add_row(memory.model, memory.what, parent, engines, f"{memory.sum_nbytes / MIB:.0f}")
    return table
