"""Starts that wait for a warm parent, in the shell: the wait's ends, and the file of what was learned."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sllm_vllm.node.engine import Engine
from sllm_vllm.node.logs import BoundedLog
from sllm_vllm.node.parent_wait import CalledOff, ParentWait
from sllm_vllm.node.protocol import StartReport
from tests.support.cases import every_case


class Pool:
    """A parent that has been importing for a moment; ``ready`` when it has imported."""

    def __init__(self) -> None:
        self.importing_s: float | None = 1.0
        self.ready = asyncio.Event()
        self.asked_s = 0.0

    async def wait_import(self, timeout_s: float) -> None:
        self.asked_s = timeout_s
        await self.ready.wait()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    one = Engine("m-1", BoundedLog(tmp_path / "m-1.log", 1 << 20), on_event=lambda _: None, on_change=lambda: None)
    yield one
    one.pipe.close()


def waits(tmp_path: Path, wait_s_max: float = 120.0) -> ParentWait:
    return ParentWait(tmp_path / "imports.json", num_cpus=2, wait_s_max=wait_s_max)


def cold_start(seconds: float) -> StartReport:
    phases = {"process": 0.0, "imports": seconds, "weights": 50.0}
    return StartReport(phase="ready", seconds=phases, total_s=seconds + 50, nbytes=None, is_warm=False)


async def test_a_start_waits_until_the_parent_has_imported_and_says_so(tmp_path: Path, engine: Engine) -> None:
    pool = Pool()
    waiting = asyncio.create_task(waits(tmp_path).wait(pool, engine))
    await asyncio.sleep(0)
    assert engine.report().phase == "waiting for the warm parent"
    assert not waiting.done()
    pool.ready.set()
    await waiting
    assert 0 < pool.asked_s <= 120


async def test_a_start_that_is_called_off_waits_no_longer(tmp_path: Path, engine: Engine) -> None:
    waiting = asyncio.create_task(waits(tmp_path).wait(Pool(), engine))
    await asyncio.sleep(0)
    engine.called_off.set()
    with pytest.raises(CalledOff, match="stopped before it had a process"):
        await waiting


@pytest.mark.parametrize(("importing_s", "wait_s_max"), [(None, 120.0), (1.0, 0.0)], ids=["none imports", "never"])
async def test_a_start_does_not_wait_in_vain(
    tmp_path: Path, engine: Engine, importing_s: float | None, wait_s_max: float
) -> None:
    pool = Pool()
    pool.importing_s = importing_s
    await waits(tmp_path, wait_s_max).wait(pool, engine)
    assert waits(tmp_path, wait_s_max).ready_in_s(pool) is None
    assert engine.report().phase == "starting the process"


async def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    first, pool = waits(tmp_path), Pool()
    first.imported(80.0)
    first.started(cold_start(300.0), is_beside_import=False)
    first.started(cold_start(900.0), is_beside_import=True)  # took longer than one alone does
    assert json.loads((tmp_path / "imports.json").read_text())["cold_s"] == [300.0]
    assert waits(tmp_path).ready_in_s(pool) == 79.0


@every_case("data", [b"", b"[[[[", b"{}", b'{"version": 1, "import_s": "x"}', b"\xff" * 70000])
async def test_a_broken_file_counts_as_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "imports.json").write_bytes(data)
    assert waits(tmp_path).ready_in_s(Pool()) == 29.0


async def test_a_fifo_in_its_place_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "imports.json")
    assert waits(tmp_path).ready_in_s(Pool()) == 29.0
