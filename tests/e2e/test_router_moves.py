"""A whole router over real vLLM moves streams: by an operator's order, off a drained replica, to changed engines."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.daemon.unix_listener import socket_of_url
from sllm_vllm.node.engine_process import living_members
from tests.conftest import ModelDir
from tests.e2e.move_bench import write_slow_plugin
from tests.support.listening import own_addresses, servers_of
from tests.support.router_process import RouterUnderTest, Stream, running_router, write_config
from tests.support.vllm_server import SERVER_ENVIRONMENT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.e2e_long

NUM_TOKENS = 700
"""So many that an engine starts, and tries that it can take over requests, while they come."""
ASKED: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 1.0, "seed": 5}


def configure(directory: Path, model: Path, **arguments: Any) -> None:
    write_config(
        directory,
        node={"slots": 2, "kv_memory": "64MiB", "node_dir": "./node"},
        defaults={"engine_arguments": {"enforce-eager": True, "max-model-len": 1024, "block-size": 32, **arguments}},
        models=[{"name": "llama", "source": str(model), "keep_alive": 3600, "max_replicas": 2}],
    )


@pytest.fixture
def router(model_dir: ModelDir, tmp_path: Path) -> Iterator[RouterUnderTest]:
    """On two slots; its engines take their time for each token."""
    configure(tmp_path, model_dir("llama", dtype="float32"))
    variables = {**SERVER_ENVIRONMENT, "HF_HUB_OFFLINE": "1", "SLOW_STEP_S": "0.02"}
    del variables["VLLM_CPU_KVCACHE_SPACE"]  # the agent's own share counts
    variables["PYTHONPATH"] = str(write_slow_plugin(tmp_path / "plugin"))
    with running_router(tmp_path, environment=variables) as running:
        running.answer_s_max = 300.0
        wait_until(lambda: "event=warm_parent_ready" in running.log, "the warm parent")
        yield running


def text_of(events: list[Any]) -> str:
    return "".join(choice["text"] for event in events if event != "[DONE]" for choice in event["choices"])


def replicas(router: RouterUnderTest) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in router.admin("replicas").body["replicas"]}


def wait_movable(router: RouterUnderTest, num: int) -> list[str]:
    """As soon as so many replicas are ready and movable: their ids."""

    def found() -> list[str]:
        return [name for name, one in replicas(router).items() if one["is_movable"] and one["state"] == "ready"]

    wait_until(lambda: len(found()) >= num, f"{num} movable replicas")
    return found()


def expect_no_port(router: RouterUnderTest, replica: str) -> None:
    """Its API is on a Unix socket alone, which none of its other processes hold."""
    report = router.node.replica(replica)
    path = socket_of_url(report.url or "")
    assert path is not None
    assert report.port is None
    assert report.pid is not None
    assert own_addresses(report.pid) == set()
    assert servers_of(report.pid, path) == {report.pid}
    assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
    assert len(living_members(report.pid)) > 1


def begin(router: RouterUnderTest) -> tuple[Stream, list[Any], dict[str, Any]]:
    """A stream, its first events, and its request as the router shows it."""
    stream = router.streaming("llama", **ASKED)
    events = [stream.event() for _ in range(20)]
    (request,) = router.admin("requests").body["requests"]
    return stream, events, request


def finish(stream: Stream, events: list[Any]) -> str:
    """The whole text; one id, one end."""
    events += stream.rest()
    assert events.count("[DONE]") == 1
    assert len({event["id"] for event in events if event != "[DONE]"}) == 1
    assert len({event["created"] for event in events if event != "[DONE]"}) == 1
    return text_of(events)


def kinds(router: RouterUnderTest, request: str) -> list[str]:
    return [event["kind"] for event in router.admin(f"story/{request}").body["events"]]


def test_streams_move_and_their_clients_see_nothing_of_it(router: RouterUnderTest, tmp_path: Path) -> None:
    whole = router.post("llama", **ASKED).body["choices"][0]["text"]
    (first,) = wait_movable(router, 1)
    expect_no_port(router, first)
    assert [one.start.is_warm for one in router.node.report().timings] == [True]

    # An operator drains the only replica: another one starts, the request moves there, and the first one ends.
    stream, events, request = begin(router)
    assert router.admin(f"replicas/{first}/drain", "POST").status == 202
    assert finish(stream, events) == whole
    assert "RequestMoved" in kinds(router, request["id"])
    wait_until(lambda: first not in replicas(router), "the drained replica's end")

    # An engine argument that changes no answer is changed: the request moves to the new engine.
    (second,) = wait_movable(router, 1)
    expect_no_port(router, second)
    stream, events, request = begin(router)
    config = json.loads((tmp_path / "router.yaml").read_text())
    config["defaults"]["engine_arguments"]["max-num-seqs"] = 8
    (tmp_path / "router.yaml").write_text(json.dumps(config))
    assert router.admin("reload", "POST").status == 200
    assert finish(stream, events) == whole
    assert "RequestMoved" in kinds(router, request["id"])
    wait_until(lambda: second not in replicas(router), "the old engine's end")

    # A plain answer is moved by order.
    config["models"][0]["min_replicas"] = 2
    (tmp_path / "router.yaml").write_text(json.dumps(config))
    assert router.admin("reload", "POST").status == 200
    wait_movable(router, 2)
    with ThreadPoolExecutor(1) as pool:
        asking = router.post_later(pool, "llama", **ASKED)
        wait_until(lambda: router.admin("requests").body["requests"], "the request")
        (request,) = router.admin("requests").body["requests"]
        wait_until(lambda: "FirstToken" in kinds(router, request["id"]), "the engine to have it")
        target = next(name for name in replicas(router) if name != request["replica"])
        ordered = router.admin(f"requests/{request['id']}/migrate", "POST", {"to": target})
        assert (ordered.status, ordered.body["target"]) == (202, target)
        assert asking.result().body["choices"][0]["text"] == whole
    assert "RequestMoved" in kinds(router, request["id"])
    assert 'sllm_router_moves_total{outcome="moved"} 3.0' in metrics(router)


def metrics(router: RouterUnderTest) -> str:
    import urllib.request

    key = (router.directory / "node" / "admin.key").read_text().strip()
    asked = urllib.request.Request(f"{router.url}/metrics", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(asked, timeout=300) as answer:
        text: str = answer.read().decode()
    return text
