"""Real `vllm serve` processes on one store: nothing is read twice, and a daemon that dies hurts nobody."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ModelDir
from tests.store.store_daemon import RunningDaemon, store_daemon
from tests.vllm_server import Server, vllm_server
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e

PROMPTS = ("hello world", "a b c d e f g", "The quick brown fox")


def answers(server: Server) -> list[list[int]]:
    return [server.tokens(prompt, temperature=0) for prompt in PROMPTS]


def arguments(store: Path, report: Path) -> tuple[str, ...]:
    extra = {"store_dir": str(store), "report_path": str(report), "chunk_bytes": 1 << 18}
    return "--load-format", "sllm", "--model-loader-extra-config", json.dumps(extra)


def report_of(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def nbytes_read(daemon: RunningDaemon) -> int:
    hops = daemon.status()["hops"]
    return int(hops["disk"]["nbytes"] + hops["cache"]["nbytes"])


def test_engines_share_what_was_read_once_and_outlive_the_daemon(model_dir: ModelDir, tmp_path: Path) -> None:
    model, store, report = model_dir("llama"), tmp_path / "store", tmp_path / "report.json"
    with vllm_server(model, tmp_path, *arguments(store, report)) as converting:
        expected = answers(converting)
    assert report_of(report)["outcome"] == "converted"
    with store_daemon(store) as daemon, contextlib.ExitStack() as engines:
        assert nbytes_read(daemon) == 0
        first = engines.enter_context(vllm_server(model, tmp_path, *arguments(store, report)))
        assert report_of(report)["source"] == "store"
        assert answers(first) == expected
        once, ready = nbytes_read(daemon), daemon.status()["pool"]["ready"]
        assert once == report_of(report)["nbytes"]
        assert "event=prefetch reason=hint" in daemon.log.read_text()

        second = engines.enter_context(vllm_server(model, tmp_path, *arguments(store, report)))
        assert report_of(report)["source"] == "store"
        assert report_of(report)["hops"]["map"]["nbytes"] == once
        assert answers(second) == expected
        assert nbytes_read(daemon) == once
        status = daemon.status()
        assert status["pool"]["ready"] == ready  # both engines look at the same slots
        assert len({lease["pid"] for lease in status["leases"]}) == 2
        assert all(lease["kept"] for lease in status["leases"])

        daemon.kill()
        assert answers(first) == answers(second) == expected
        engines.close()
    with store_daemon(store) as daemon:
        wait_until(lambda: daemon.status()["leases"] == [], "no lease to be left")
