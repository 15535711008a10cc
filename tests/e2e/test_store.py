"""Real engines on one store: nothing is read twice, and a daemon that dies hurts nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.node.protocol import ReplicaOrder
from tests.conftest import ModelDir
from tests.e2e.real_agent import answers, order, ready, stopped, warm_agent
from tests.support.store_daemon import RunningDaemon, store_daemon
from tests.support.waiting import wait_until

pytestmark = pytest.mark.e2e


def order_of(model: Path, report: Path) -> ReplicaOrder:
    extra = {"report_path": str(report), "chunk_bytes": 1 << 18}
    return order(model, "--load-format", "sllm", "--model-loader-extra-config", json.dumps(extra))


def report_of(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def nbytes_read(daemon: RunningDaemon) -> int:
    hops = daemon.status()["hops"]
    return int(hops["disk"]["nbytes"] + hops["cache"]["nbytes"])


async def test_engines_share_what_was_read_once_and_outlive_the_daemon(model_dir: ModelDir, tmp_path: Path) -> None:
    model, store, path = model_dir("llama"), tmp_path / "store", tmp_path / "report.json"
    async with warm_agent(tmp_path) as agent:
        converting = await ready(agent, order_of(model, path))
        expected = await answers(converting)
        assert report_of(path)["outcome"] == "converted"
        await stopped(agent, converting.id)

        with store_daemon(store) as daemon:
            assert nbytes_read(daemon) == 0
            first = await ready(agent, order_of(model, path))
            assert report_of(path)["source"] == "store"
            assert await answers(first) == expected
            once, pool = nbytes_read(daemon), daemon.status()["pool"]["ready"]
            assert once == report_of(path)["nbytes"]
            assert "event=prefetch reason=hint" in daemon.log.read_text()

            second = await ready(agent, order_of(model, path))
            assert report_of(path)["source"] == "store"
            assert report_of(path)["hops"]["map"]["nbytes"] == once
            assert await answers(second) == expected
            assert nbytes_read(daemon) == once
            status = daemon.status()
            assert status["pool"]["ready"] == pool  # both engines look at the same slots
            assert len({lease["pid"] for lease in status["leases"]}) == 2
            assert all(lease["kept"] for lease in status["leases"])

            daemon.kill()
            assert await answers(first) == await answers(second) == expected
        for engine in (first, second):
            await stopped(agent, engine.id)
    with store_daemon(store) as daemon:
        wait_until(lambda: daemon.status()["leases"] == [], "no lease to be left")
