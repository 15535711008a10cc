"""What operators are shown where it is hard to bring about over HTTP; and a client that meets no router."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sllm_vllm.node.protocol import ReplicaReport
from sllm_vllm.router.admin import client as admin_client
from sllm_vllm.router.admin.client import AdminClient, AdminError
from sllm_vllm.router.admin.views import ITEMS_SHOWN_MAX, explain_view, nodes_view, plain, replicas_view, stores_view
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.controller import Controller
from sllm_vllm.router.core.events import NodeReported, Refusal, RejectRequest
from sllm_vllm.router.core.facts import RequestFacts, Tier
from sllm_vllm.router.gate import Outcome
from tests.support.fake_gate import until
from tests.support.fake_node import ADMIN_KEY, FakeNode
from tests.support.waiting import DEADLINE_S

MODEL = "meta/tiny"


class StubbornNode(FakeNode):
    """Its replicas end only when ``may_stop`` is set."""

    def __init__(self) -> None:
        super().__init__(num_slots=2)
        self.may_stop = asyncio.Event()

    async def stop_replica(self, replica_id: str) -> ReplicaReport:
        await self.may_stop.wait()
        return await super().stop_replica(replica_id)


@contextlib.asynccontextmanager
async def running(controller: Controller, node: FakeNode) -> AsyncIterator[None]:
    await controller.start()
    await controller.add_node("local", node)
    try:
        yield
    finally:
        await controller.close()
    controller.core.validate()


async def test_a_start_that_waits_for_another_replicas_slots(tmp_path: Path) -> None:
    node = StubbornNode()
    controller = Controller(waiting_max=10, directory=tmp_path)
    async with running(controller, node):
        controller.deploy(ModelConfig(name="old"))
        controller.deploy(ModelConfig(name="new", accelerators=2))
        ticket = await asyncio.wait_for(controller.acquire(RequestFacts("r-1", "old")), DEADLINE_S)
        outcome = Outcome("done", 200, first_byte_s=None, seconds=0.1, prompt_tokens=None, output_tokens=None)
        controller.finished(ticket, outcome)
        (plan,) = explain_view(controller, "new")["plans"]
        assert (plan["kind"], plan["victims"]) == ("evict", [ticket.replica])
        waiting = asyncio.create_task(controller.acquire(RequestFacts("r-2", "new")))
        await until(lambda: controller.core.scaling.pending.of_model("new"), "a start that waits for slots")
        found = explain_view(controller, "new")
        replica = found["under_way"][0]["replica"]
        why = "it waits for slots to come free"
        assert found["request"] == {"what": "starting", "replica": replica, "expected_s": None, "why": why}
        # The slot that is held for it is used, and is no replica.
        assert [one["id"] for one in replicas_view(controller)["replicas"]] == [ticket.replica]
        (shown,) = nodes_view(controller)["nodes"]
        assert (shown["num_free"], shown["replicas"]) == (0, [ticket.replica])
        node.may_stop.set()
        assert (await asyncio.wait_for(waiting, DEADLINE_S)).replica == replica


async def test_a_model_whose_starts_fail(tmp_path: Path) -> None:
    node, now_s = FakeNode(), [1000.0]
    node.refusal = "no slot is free"
    controller = Controller(waiting_max=10, directory=tmp_path, clock=lambda: now_s[0])
    async with running(controller, node):
        controller.deploy(ModelConfig(name=MODEL, min_replicas=1))
        back_off = controller.core.models[MODEL].back_off
        for num_failures in (1, 2, 3):
            await until(lambda num=num_failures: back_off.num_failures == num, "a failed start")
            request = explain_view(controller, MODEL)["request"]
            if num_failures < 3:
                assert (request["what"], request["why"]) == ("queue", "the last start failed: no slot is free")
                now_s[0] += 100.0
        assert (request["what"], request["why"]) == ("refused", "no slot is free")


def test_before_the_first_report(tmp_path: Path) -> None:
    controller = Controller(waiting_max=10, directory=tmp_path)
    assert stores_view(controller) == {"stores": []}
    assert nodes_view(controller) == {"nodes": []}


def test_events_as_json_has_them() -> None:
    rejected = RejectRequest("r-1", Refusal.QUEUE_FULL, "full", retry_after_s=math.inf)
    assert plain(rejected) == {"request": "r-1", "why": "queue full", "reason": "full", "retry_after_s": None}
    models = {f"m-{number}": Tier.HOST for number in range(ITEMS_SHOWN_MAX + 1)}
    reported = NodeReported("a", is_warm=True, residency=models, nbytes={"m": 1}, hops={Tier.DISK: 2.0})
    assert plain(reported) == {
        "node": "a",
        "is_warm": True,
        "residency": "65 entries",
        "nbytes": {"m": 1},
        "hops": {"DISK": 2.0},
        "warm_in_s": 0.0,
    }
    assert plain(("a", {Tier.DISK})) == ["a", ["DISK"]]


# ---------------------------------------------------------------------------------------------------------- the client


class _Page(BaseHTTPRequestHandler):
    body = b""
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def page(body: bytes, status: int = 200) -> Iterator[AdminClient]:
    """A client of a server that is no router."""
    handler = type("_One", (_Page,), {"body": body, "status": status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield AdminClient(f"http://127.0.0.1:{server.server_address[1]}", ADMIN_KEY)
        finally:
            server.shutdown()
            thread.join()


ELSEWHERE = "something other than a router listens there; say where the router is with --url or SLLM_URL"


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"<html>", 200, f"status 200, not JSON: {ELSEWHERE}"),
        (b"[" * 100_000, 200, f"status 200, not JSON: {ELSEWHERE}"),
        (b"{}", 302, f"status 302: {ELSEWHERE}"),
        (b'{"error": "no"}', 404, f"status 404: {ELSEWHERE}"),
        (b'{"error": {"message": "two\\nlines"}}', 500, "two lines"),
        (b"x" * 2000, 200, "the answer is larger than 1000 bytes"),
    ],
    ids=["html", "deep", "redirect", "other error", "lines", "large"],
)
def test_a_client_that_meets_no_router(monkeypatch: pytest.MonkeyPatch, body: bytes, status: int, told: str) -> None:
    monkeypatch.setattr(admin_client, "REPLY_NBYTES_MAX", 1000 if told.endswith("1000 bytes") else 1 << 20)
    with page(body, status) as client, pytest.raises(AdminError) as caught:
        client.get("models")
    assert str(caught.value).endswith(told)
    assert ADMIN_KEY not in str(caught.value)
