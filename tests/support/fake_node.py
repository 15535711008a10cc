"""A node agent whose replicas do what a test says; a real controller over it, with its admin app on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from sllm_vllm.errors import ConfigError, OrderRefused, ReplicaUnknown
from sllm_vllm.node.protocol import (
    CheckpointReport,
    EngineTiming,
    NodeReport,
    ReplicaOrder,
    ReplicaReport,
    SlotReport,
    StartReport,
    WarmReport,
)
from sllm_vllm.router.admin.app import AdminApp, Reloaded
from sllm_vllm.router.config.keys import digest_of
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.controller import Controller
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Outcome
from sllm_vllm.router.http.deadline import Message, Receive, Send
from sllm_vllm.router.http.serve import serve_app
from sllm_vllm.router.state.store import StateBusy, StateDamaged, StateError, StateFull
from tests.support.fake_gate import Answer, until
from tests.support.waiting import DEADLINE_S

T = TypeVar("T")

ADMIN_KEY = "the-admins-own-key"
ENGINE_KEY = "the-engines-secret"
HUB_TOKEN = "hf_secret"
SECRETS = (ADMIN_KEY, ENGINE_KEY, HUB_TOKEN)
UNKEEPABLE: dict[str, type[StateError]] = {
    "org/unkeepable": StateError,
    "org/locked": StateBusy,
    "org/too-much": StateFull,
    "org/damaged": StateDamaged,
}
MISSING = "/models/missing"
"""A source that is not there."""


@dataclass
class Life:
    """One replica of the fake."""

    report: ReplicaReport
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def become(self, state: str, **fields: object) -> None:
        """Tell who watches."""
        self.report = self.report.model_copy(update={"state": state, **fields})
        self.changed.set()


class FakeNode:
    """Replicas become ready while ``may_be_ready`` is set; the next orders are refused while ``refusal`` says why."""

    is_here = False

    def __init__(self, num_slots: int = 2) -> None:
        self.num_slots = num_slots
        self.lives: dict[str, Life] = {}
        self.orders: list[ReplicaOrder] = []
        self.prefetched: list[tuple[str, ...]] = []
        self.checkpoints: tuple[CheckpointReport, ...] = ()
        self.refusal = ""
        self.store = "no daemon answers"
        self.num_reports = 0
        self.may_be_ready = asyncio.Event()
        self.may_be_ready.set()
        self.is_warm = asyncio.Event()
        self.is_warm.set()
        self.warm_in_s: float | None = None

    async def ensure_replica(self, order: ReplicaOrder) -> ReplicaReport:
        assert order.id is not None
        if self.refusal:
            raise OrderRefused(order.model, self.refusal, "order otherwise")
        self.orders.append(order)
        life = self.lives[order.id] = Life(_report(order))
        return life.report

    async def stop_replica(self, replica_id: str) -> ReplicaReport:
        if replica_id not in self.lives:
            raise ReplicaUnknown(replica_id, "no such replica", "look with `ps`")
        self.lives[replica_id].become("stopped", reason="it was told to")
        return self.lives[replica_id].report

    async def watch(self, replica_id: str) -> AsyncIterator[ReplicaReport]:
        life = self.lives[replica_id]
        yield life.report
        waiting = asyncio.create_task(self._get_ready(life))
        try:
            while not life.report.has_ended:
                await life.changed.wait()
                life.changed.clear()
                yield life.report
        finally:
            waiting.cancel()

    async def report(self, *, with_memory: bool = False) -> NodeReport:
        self.num_reports += 1
        reports = [life.report for life in self.lives.values()]
        start = _start("ready")
        return NodeReport(
            version="1.2.3",
            pid=77,
            uptime_s=5.0,
            platform="cpu",
            slots=tuple(SlotReport(slot=slot, what=f"cpu {slot}", replica=None) for slot in range(self.num_slots)),
            replicas=tuple(reports),
            warm=WarmReport(
                pid=99 if self.is_warm.is_set() else None,
                problem="",
                num_forks=3,
                import_s=9.5,
                ready_in_s=self.warm_in_s,
            ),
            checkpoints=self.checkpoints,
            hops={"disk": {"bps": 2e9, "limit_bps": None}},
            store=self.store,
            timings=tuple(
                EngineTiming(replica=report.id, model=report.model, ended_unix_s=1e9, start=start)
                for report in reports
                if report.is_ready
            ),
        )

    async def wait_warm(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.is_warm.wait()
        return self.is_warm.is_set()

    async def prefetch_model(self, arguments: tuple[str, ...]) -> None:
        self.prefetched.append(arguments)

    async def _get_ready(self, life: Life) -> None:
        await self.may_be_ready.wait()
        if life.report.state == "loading":
            life.become("ready", start=_start("ready"))


def _start(phase: str) -> StartReport:
    seconds = {"process": 0.5, "imports": 0.25, "init": 1.0, "weights": 2.0}
    load = {"outcome": "loaded", "source": "disk"}
    return StartReport(phase=phase, seconds=seconds, total_s=3.75, nbytes=1 << 20, is_warm=True, load=load)


def _report(order: ReplicaOrder) -> ReplicaReport:
    assert order.id is not None
    return ReplicaReport(
        id=order.id,
        model=order.model,
        state="loading",
        reason="",
        slots=(0,),
        pid=4242,
        status=None,
        port=40123,
        url="http://127.0.0.1:40123",
        api_key=ENGINE_KEY,
        age_s=1.0,
        in_state_s=0.5,
        start=_start("weights"),
        log="logs/a",
        tail=("Traceback", "it broke"),
        labels=order.labels,
    )


class _App:
    """What ``serve_app`` takes: the admin's app alone."""

    def __init__(self, admin: AdminApp) -> None:
        self._admin = admin

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await self._admin(scope, receive, send)

    def close(self) -> None:
        pass


@dataclass
class ServedAdmin:
    """An admin app that listens, over a controller whose node is a fake."""

    port: int
    node: FakeNode
    controller: Controller
    admin: AdminApp
    reloads: list[str | ConfigError]
    """What the next reloads say."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request, with the admin's key unless ``headers`` are given."""
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        sent = {"authorization": f"Bearer {ADMIN_KEY}"} if headers is None else headers
        async with aiohttp.ClientSession() as client:
            answer = await client.request(method, URL(self.url + path, encoded=True), data=data, headers=sent)
            text = await answer.text()
        assert not any(secret in text for secret in SECRETS), "an answer shows a secret"
        return Answer(answer.status, answer.headers, text)

    async def get(self, path: str) -> Any:
        """What a path says that must be there."""
        answer = await self.ask("GET", path)
        assert answer.status == 200, answer.text
        return answer.json

    async def deploy(self, name: str, **fields: object) -> Any:
        """Deploy a model that must be right."""
        answer = await self.ask("POST", "/sllm/v1/models", {"name": name, **fields})
        assert answer.status in {200, 201}, answer.text
        return answer.json

    def replica_of(self, model: str, state: str) -> str | None:
        """The first replica of a model in a state."""
        replicas = self.controller.core.cluster.replicas.values()
        return next((one.id for one in replicas if (one.model, one.state.value) == (model, state)), None)

    async def replica(self, model: str, state: str = "ready") -> str:
        """The same, as soon as there is one."""
        await until(lambda: self.replica_of(model, state) is not None, f"a replica of {model} that is {state}")
        found = self.replica_of(model, state)
        assert found is not None
        return found

    async def answer_request(self, model: str, request: str = "r-1") -> None:
        """One request, from its arrival to its end."""
        async with asyncio.timeout(DEADLINE_S):
            ticket = await self.controller.acquire(RequestFacts(request, model, prompt_tokens=10))
        self.controller.first_byte(ticket)
        outcome = Outcome("done", 200, first_byte_s=0.1, seconds=0.5, prompt_tokens=10, output_tokens=5)
        self.controller.finished(ticket, outcome)


@contextlib.asynccontextmanager
async def serving_admin(
    directory: Path, *, num_slots: int = 2, keys: tuple[str, ...] = (ADMIN_KEY,)
) -> AsyncIterator[ServedAdmin]:
    """All of it, on the caller's loop; the core's invariants have to hold at the end."""
    node = FakeNode(num_slots)
    controller = Controller(waiting_max=100, directory=directory)
    reloads: list[str | ConfigError] = []

    async def reload() -> Reloaded:
        told = reloads.pop(0)
        if isinstance(told, ConfigError):
            raise told
        return Reloaded(told, ["a warning"])

    kept: dict[str, ModelConfig | None] = {}

    async def keep(name: str, model: ModelConfig | None) -> None:
        if name in UNKEEPABLE:
            raise UNKEEPABLE[name]("it can't be kept")
        kept[name] = model

    def check(model: ModelConfig) -> list[str]:
        if model.source == MISSING:
            raise ConfigError(f"{MISSING}: No such file or directory")
        return [f"{word}: not an option" for word in model.engine_arguments if word.startswith("--nonsense")]

    digests = [digest_of(key) for key in keys]
    admin = AdminApp(controller, key_digests=digests, reload=reload, keep=keep, check=check)
    await controller.start()
    await controller.add_node("local", node)
    listener = socket.create_server(("127.0.0.1", 0))
    started = asyncio.Event()
    running = asyncio.create_task(
        serve_app(_App(admin), IngressSettings(drain_s=1), sockets=[listener], started=started)
    )
    try:
        await asyncio.wait_for(started.wait(), DEADLINE_S)
        yield ServedAdmin(listener.getsockname()[1], node, controller, admin, reloads)
    finally:
        running.cancel()
        await asyncio.wait({running})
        await controller.close()
    controller.core.validate()


class AdminThread:
    """The same in a thread with a loop of its own, for callers that block."""

    def __init__(self, directory: Path, models: tuple[ModelConfig, ...] = ()) -> None:
        self.served: ServedAdmin
        self._directory = directory
        self._models = models
        self._running = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def do(self, act: Callable[[ServedAdmin], T]) -> T:
        """Call it on the loop."""

        async def acting() -> T:
            return act(self.served)

        return asyncio.run_coroutine_threadsafe(acting(), self._loop).result(DEADLINE_S)

    def answer_request(self, model: str) -> None:
        """One request, from its arrival to its end."""
        asyncio.run_coroutine_threadsafe(self.served.answer_request(model), self._loop).result(DEADLINE_S)

    async def _serve(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        async with serving_admin(self._directory) as self.served:
            for model in self._models:
                self.served.controller.deploy(model)
            self._running.set()
            await self._stopped.wait()

    def __enter__(self) -> AdminThread:
        self._thread.start()
        assert self._running.wait(DEADLINE_S)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
