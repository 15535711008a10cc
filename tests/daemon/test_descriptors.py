"""The three daemons with few descriptors, while a flood of connections takes all that it can get.

After the flood everything works; nothing has ended, no slot is lost, and no loop stands still.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sllm_vllm.config import child_environment
from sllm_vllm.node.client import NodeClient
from sllm_vllm.node.protocol import ReplicaOrder, ReplicaReport
from sllm_vllm.store.client import StoreClient
from sllm_vllm.store.protocol import Order
from tests.support.router_process import FAKE_ENGINE, RouterUnderTest, running_router, write_config
from tests.support.waiting import DEADLINE_S, wait_until

FLOOD = 300
LIMITS = (64, 128, 256)
COMMAND = str(Path(sys.executable).with_name("sllm-vllm"))
NODE = ("node", "serve", "--slots", "2", "--memory", "1GiB", "--no-warm")


@contextlib.contextmanager
def daemon(limit: int, log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of the command's daemons that may open ``limit`` descriptors."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [COMMAND, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 64), limit)),
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@contextlib.contextmanager
def flooded(connect: Callable[[], socket.socket]) -> Iterator[None]:
    """Inside, connections that say nothing have been opened, and are held, as far as they are taken."""
    with contextlib.ExitStack() as stack:
        for _ in range(FLOOD):
            with contextlib.suppress(OSError):
                stack.enter_context(connect())
        yield


def unix(path: Path) -> Callable[[], socket.socket]:
    def connect() -> socket.socket:
        channel = socket.socket(socket.AF_UNIX)
        channel.settimeout(1.0)
        try:
            channel.connect(str(path))
        except OSError:
            channel.close()
            raise
        return channel

    return connect


def refused(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Whether it has ended, as it should where there are too few: with a status, and with the reason."""
    if process.poll() is None:
        return False
    assert process.returncode == 1
    assert re.search(r"may open \d+ descriptors and needs \d+: raise the limit", log.read_text())
    return True


def answers(client: NodeClient) -> bool:
    try:
        return bool(client.report())
    except Exception:
        return False


# ------------------------------------------------------------------------------------------------------------ the agent


@pytest.mark.parametrize("limit", LIMITS)
def test_an_agent_outlives_a_flood_with_all_slots(tmp_path: Path, limit: int) -> None:
    log, client = tmp_path / "log", NodeClient(tmp_path / "node" / "socket", timeout_s=DEADLINE_S)
    config = tmp_path / "node.json"
    config.write_text(json.dumps({"engine_command": [sys.executable, str(FAKE_ENGINE), "serve"]}))
    folders = ("--node-dir", str(tmp_path / "node"), "--store-dir", str(tmp_path), "--config", str(config))
    with daemon(limit, log, *NODE, *folders) as process:
        wait_until(lambda: refused(process, log) or "event=agent_serving" in log.read_text(), "the agent")
        if process.poll() is not None:
            return
        first, second = (order(client) for _ in range(2))
        with flooded(unix(client.socket_path)):
            for one in (first, second):
                os.kill(one.pid or 0, signal.SIGKILL)
            wait_until(lambda: not any(is_there(one.pid) for one in (first, second)), "both engines to be reaped")
        wait_until(lambda: answers(client), "the agent to answer")
        wait_until(lambda: all(client.replica(one.id).has_ended for one in (first, second)), "both replicas to end")
        third, fourth = (order(client) for _ in range(2))
        assert {third.is_ready, fourth.is_ready} == {True}
        assert client.report().problem == ""


def order(client: NodeClient) -> ReplicaReport:
    ordered = client.order(ReplicaOrder(model="/models/fine"))
    wait_until(lambda: client.replica(ordered.id).is_ready, "the engine")
    return client.replica(ordered.id)


def is_there(pid: int | None) -> bool:
    """Whether a process is there, also as a zombie."""
    return Path(f"/proc/{pid}/stat").exists()


# ------------------------------------------------------------------------------------------------------------ the store


@pytest.mark.parametrize("limit", LIMITS)
def test_a_store_outlives_a_flood(tmp_path: Path, limit: int) -> None:
    log, path = tmp_path / "log", tmp_path / ".store" / "socket"
    folders = ("--store-dir", str(tmp_path), "--memory", "64MiB")
    with daemon(limit, log, "store", "serve", *folders) as process:
        wait_until(lambda: refused(process, log) or asked_store(path), "the store")
        if process.poll() is not None:
            return
        with flooded(unix(path)):
            pass
        wait_until(lambda: process.poll() is not None or asked_store(path), "the store to answer")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0


def asked_store(path: Path) -> bool:
    try:
        with StoreClient(path, timeout_s=DEADLINE_S) as client:
            return bool(client.order(Order(order="status"))["problem"] == "")
    except Exception:
        return False


# ----------------------------------------------------------------------------------------------------------- the router


@pytest.mark.parametrize("limit", LIMITS)
def test_a_router_outlives_a_flood_of_clients_with_all_slots(tmp_path: Path, limit: int) -> None:
    write_config(tmp_path, "fine", "turns-ill")
    if (router_log := refused_router(tmp_path, limit)) is not None:
        assert re.search(r"may open \d+ descriptors and needs \d+: raise the limit", router_log)
        return
    with running_router(tmp_path, descriptors=limit) as router:
        assert router.post("fine").status == 200
        assert router.post("turns-ill").status == 200
        pids = [*router.pids("fine"), *router.pids("turns-ill")]
        with flooded(lambda: socket.create_connection(router.address, 1.0)), flooded(unix(router.node.socket_path)):
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not any(is_there(pid) for pid in pids), "both engines to be reaped")
        wait_until(lambda: ready(router) == 200, "the router to be ready")
        assert router.post("fine").status == 200
        assert router.post("turns-ill").status == 200
        assert router.process.poll() is None
        assert answers(router.node)


def refused_router(directory: Path, limit: int) -> str | None:
    """What a router says that ends at once for want of descriptors; None if it does not."""
    if limit > 64:
        return None
    (directory / "store").mkdir(exist_ok=True)
    log = directory / "first.log"
    with daemon(limit, log, "serve", str(directory / "router.yaml")) as process:
        wait_until(lambda: process.poll() is not None or "event=router_serving" in log.read_text(), "the router")
        if process.poll() is None:
            return None
        assert process.returncode == 1
        return log.read_text()


def ready(router: RouterUnderTest) -> int:
    with contextlib.suppress(OSError):
        return router.get("/ready").status
    return 0
