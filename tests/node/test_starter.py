"""Warm where it can be, else cold: who starts an engine, with a pool that forks, does not fork, or is gone."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.node import agent, starter
from sllm_vllm.node.engine_process import EngineProcess, start_cold
from sllm_vllm.node.warm_order import WarmOrder
from sllm_vllm.node.warm_pool import NotWarm
from tests.node.agent_bench import FAKE_ENGINE, Bench, ask, running_agent, until

FAKE = (sys.executable, str(FAKE_ENGINE), "serve")


class Pool:
    """What a ``WarmPool`` is for its starter; "forks" by starting a fake engine, as long as ``problem`` is empty."""

    last: Pool

    def __init__(
        self, environment: Mapping[str, str], log: Path, *, forks_max: int, on_import: Callable[[float], None]
    ) -> None:
        self.environment = environment
        self.log = log
        self.forks_max = forks_max
        self.on_import = on_import
        self.problem = ""
        self.importing_s: float | None = None
        self.imported = asyncio.Event()
        self.comes = True
        self.orders: list[WarmOrder] = []
        self.parents: list[int] = []
        self.pid = os.getpid()
        self.import_s = 1.5
        self.is_closed = False
        Pool.last = self

    @property
    def num_forks(self) -> int:
        return len(self.orders)

    async def fork(self, order: WarmOrder, output: int) -> EngineProcess:
        if self.problem:
            raise NotWarm(self.problem)
        self.orders.append(order)
        words = (*FAKE, *order.arguments)
        return start_cold(words, order.environment, output, directory=order.directory, cpus=order.cpus)

    async def wait_import(self, timeout_s: float) -> None:
        await self.imported.wait()
        self.importing_s, self.problem = None, "" if self.comes else self.problem

    async def wait_warm(self, timeout_s: float) -> bool:
        await asyncio.sleep(0)
        return not self.problem

    async def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of an agent that has a pool."""
    monkeypatch.setattr(starter, "WarmPool", Pool)
    monkeypatch.setattr(starter, "serve_command", lambda: FAKE)
    monkeypatch.setattr(agent, "require_model", lambda *_: None)  # what runs is no vLLM
    return {"engine_command": None, "forks_max": 7}


async def waits(bench: Bench, replica: str) -> None:
    """Until a start waits for the parent."""

    def is_so() -> bool:
        start = bench.agent.replica(replica).start
        return start is not None and start.phase == "waiting for the warm parent"

    await until(is_so, "a start that waits for the warm parent")


async def test_an_engine_is_forked_where_that_can_be(tmp_path: Path, warm: dict[str, Any]) -> None:
    async with running_agent(tmp_path, **warm) as bench:
        assert await bench.agent.wait_warm(60)
        report = await bench.ready(environment={"MINE": "1"}, directory=str(tmp_path))
        assert report.start is not None
        assert (report.start.is_warm, report.start.cold_reason) == (True, "")
        (order,) = Pool.last.orders
        assert order.arguments[0] == "/models/fine"
        assert (order.environment["MINE"], order.directory) == ("1", str(tmp_path))
        assert (await ask(report, "/environment"))[1]["environment"]["VLLM_API_KEY"] == report.api_key
        told = (await bench.agent.report(with_memory=True)).warm
        assert (told.pid, told.problem, told.num_forks, told.import_s) == (os.getpid(), "", 1, 1.5)
        assert told.pss_nbytes is None or told.pss_nbytes > 0
        assert Pool.last.forks_max == 7
    assert Pool.last.is_closed


async def test_keys_of_the_router_reach_neither_the_warm_parent_nor_an_engine(
    tmp_path: Path, warm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ROUTER_KEY", "SLLM_ADMIN_KEY", "KEPT"):
        monkeypatch.setenv(name, "x")
    async with running_agent(tmp_path, secret_variables=("ROUTER_KEY",), **warm) as bench:
        await bench.ready()
        for environment in (Pool.last.environment, Pool.last.orders[0].environment):
            assert environment.keys() & {"ROUTER_KEY", "SLLM_ADMIN_KEY", "KEPT"} == {"KEPT"}


async def test_without_a_warm_parent_an_engine_starts_cold_and_says_why(tmp_path: Path, warm: dict[str, Any]) -> None:
    async with running_agent(tmp_path, **warm) as bench:
        Pool.last.problem = "it is importing"
        assert not await bench.agent.wait_warm(60)
        report = await bench.ready()
        assert report.start is not None
        assert (report.start.is_warm, report.start.cold_reason) == (False, "it is importing")


async def test_a_start_waits_for_a_parent_that_imports_and_is_forked(tmp_path: Path, warm: dict[str, Any]) -> None:
    async with running_agent(tmp_path, **warm) as bench:
        pool = Pool.last
        pool.problem, pool.importing_s = "it is importing", 1.0
        assert (await bench.agent.report()).warm.ready_in_s == 29.0
        replica = (await bench.order()).id
        await waits(bench, replica)
        pool.imported.set()
        report = await bench.reach(replica, "ready")
        assert report.start is not None
        assert (report.start.is_warm, len(pool.orders)) == (True, 1)
        assert report.start.seconds["parent"] > 0
        assert (await bench.agent.report()).warm.ready_in_s is None


async def test_a_start_that_waits_for_a_parent_can_be_stopped(tmp_path: Path, warm: dict[str, Any]) -> None:
    async with running_agent(tmp_path, **warm) as bench:
        Pool.last.problem, Pool.last.importing_s = "it is importing", 1.0
        replica = (await bench.order()).id
        await waits(bench, replica)
        await bench.agent.stop_replica(replica)
        report = await bench.reach(replica, "stopped")
        assert (report.reason, report.slots, Pool.last.orders) == ("stop asked", (), [])


async def test_a_parent_that_fails_to_import_makes_the_start_cold(tmp_path: Path, warm: dict[str, Any]) -> None:
    async with running_agent(tmp_path, **warm) as bench:
        pool = Pool.last
        pool.problem, pool.importing_s = "it is importing", 1.0
        replica = (await bench.order()).id
        await waits(bench, replica)
        pool.comes = False
        pool.imported.set()
        report = await bench.reach(replica, "ready")
        assert report.start is not None
        assert (report.start.is_warm, report.start.cold_reason) == (False, "it is importing")


async def test_what_an_import_took_is_remembered_by_the_next_agent(tmp_path: Path, warm: dict[str, Any]) -> None:
    async with running_agent(tmp_path, **warm):
        Pool.last.on_import(80.0)
    async with running_agent(tmp_path, **warm) as bench:
        Pool.last.importing_s = 10.0
        assert (await bench.agent.report()).warm.ready_in_s == 70.0


async def test_what_a_forked_engine_would_not_heed_starts_cold(tmp_path: Path, warm: dict[str, Any]) -> None:
    async with running_agent(tmp_path, **warm) as bench:
        report = await bench.ready(environment={"HF_HOME": "/tmp"})
        assert report.start is not None
        assert report.start.cold_reason == "HF_HOME would be read too late"
        assert Pool.last.orders == []
        assert (await ask(report, "/environment"))[1]["environment"]["HF_HOME"] == "/tmp"


async def test_the_warm_parents_log_is_no_replicas(tmp_path: Path, warm: dict[str, Any]) -> None:
    """Its log was that of a replica whose id is ``warm-parent``."""
    async with running_agent(tmp_path, **warm) as bench:
        report = await bench.ready(id="warm-parent")
        assert Path(report.log) != Pool.last.log
        assert Pool.last.log.parent == bench.config.node_dir


async def test_the_warm_parent_imports_on_one_thread(tmp_path: Path, warm: dict[str, Any]) -> None:
    async with running_agent(tmp_path, **warm) as bench:
        environment = Pool.last.environment
        assert environment["OMP_NUM_THREADS"] == "1"
        assert environment["TOKENIZERS_PARALLELISM"] == "false"
        assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
        assert environment["SLLM_STORE_DIR"] == str(bench.config.store_dir)


async def test_a_pool_that_is_switched_off_is_none(tmp_path: Path, warm: dict[str, Any]) -> None:
    async with running_agent(tmp_path, **warm, warm=False) as bench:
        report = await bench.ready()
        assert report.start is not None
        assert report.start.cold_reason == "the warm parent is switched off"
