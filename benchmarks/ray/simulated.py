"""A controller with simulated nodes, without agents, for ``scale.py``. Reports come through Ray, as in reality."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from sllm_vllm.node.protocol import (
    CheckpointReport,
    NodeReport,
    ReplicaOrder,
    ReplicaReport,
    SlotReport,
    StartReport,
    WarmReport,
)
from sllm_vllm.ray.session import Answer, ControllerGone, Held, News, Note, SessionWelcome, Unknown
from sllm_vllm.ray.sessions import GateService
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.controller import Controller
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Failure, Outcome, Ticket

SLOTS, CHECKPOINTS = 8, 20
DONE = Outcome("done", 200, first_byte_s=None, seconds=0.01, prompt_tokens=None, output_tokens=None)


class Reporter:
    """The agents' side of reports, for all simulated nodes. An actor, so that reports come through Ray."""

    async def report(self, name: str, replicas: tuple[ReplicaReport, ...]) -> NodeReport:
        """The report of one node."""
        return NodeReport(
            version="0",
            pid=1,
            uptime_s=1.0,
            platform="cpu",
            slots=tuple(SlotReport(slot=slot, what=f"cpu {slot}", replica=None) for slot in range(SLOTS)),
            replicas=replicas,
            warm=WarmReport(pid=2, problem="", num_forks=0, import_s=1.0),
            checkpoints=tuple(_checkpoint(name, number) for number in range(CHECKPOINTS)),
            hops={"disk": {"bps": 2e9, "limit_bps": None}},
            store="",
            timings=(),
        )


def _checkpoint(name: str, number: int) -> CheckpointReport:
    model = f"/models/{name}" if number == 0 else f"/models/{name}-{number}"
    return CheckpointReport(name=f"c-{number}", nbytes=1 << 34, resident_nbytes=0, tiers=("disk",), model=model)


class SimulatedNode:
    """A node whose replicas are ready at once, and whose reports come from the ``Reporter``."""

    is_here = False

    def __init__(self, name: str, reporter: Any) -> None:  # noqa: ANN401 - Ray has no types
        self._name = name
        self._reporter = reporter
        self._replicas: dict[str, ReplicaReport] = {}

    async def ensure_replica(self, order: ReplicaOrder) -> ReplicaReport:
        """See ``NodeAgent``."""
        assert order.id is not None
        report = self._replicas[order.id] = _ready(order)
        return report

    async def stop_replica(self, replica_id: str) -> ReplicaReport:
        """See ``NodeAgent``; here replicas never stop."""
        return self._replicas[replica_id]

    async def watch(self, replica_id: str) -> AsyncIterator[ReplicaReport]:
        """See ``NodeAgent``."""
        yield self._replicas[replica_id]
        await asyncio.Event().wait()

    async def report(self, *, with_memory: bool = False) -> NodeReport:
        """See ``NodeAgent``."""
        report: NodeReport = await self._reporter.report.remote(self._name, tuple(self._replicas.values()))
        return report

    async def wait_warm(self, timeout_s: float) -> bool:
        """See ``NodeAgent``."""
        return True

    async def prefetch_model(self, arguments: tuple[str, ...]) -> None:
        """See ``NodeAgent``."""


def _ready(order: ReplicaOrder) -> ReplicaReport:
    assert order.id is not None
    start = StartReport(phase="ready", seconds={"process": 0.1}, total_s=0.1, nbytes=None, is_warm=True)
    return ReplicaReport(
        id=order.id,
        model=order.model,
        state="ready",
        reason="",
        slots=(0,),
        pid=1,
        status=None,
        port=1,
        url="http://127.0.0.1:1",
        api_key="none",
        age_s=0.0,
        in_state_s=0.0,
        start=start,
        log="",
        labels=order.labels,
    )


class SimulatedController:
    """A controller over simulated nodes, as ``RayController`` is over real ones: a ``ControllerLink`` through Ray
    calls.
    """

    def __init__(self, reporter: Any, num_nodes: int) -> None:  # noqa: ANN401 - Ray has no types
        self._names = [f"n-{number:04}" for number in range(num_nodes)]
        self._reporter = reporter

    async def start(self) -> list[str]:
        """Add all nodes, with a replica on each; returns the models."""
        self._controller = Controller(waiting_max=100_000, directory=Path("/tmp"))
        await self._controller.start()
        limits = {"ongoing_max": 10_000, "target_ongoing": 10_000, "keep_alive": 3600.0}
        for name in self._names:
            self._controller.deploy(ModelConfig(name=name, source=f"/models/{name}", **limits))  # type: ignore[arg-type]
        for name in self._names:
            await self._controller.add_node(name, SimulatedNode(name, self._reporter))
        self._service = GateService(self._controller, IngressSettings(), clock=time.monotonic)
        self._service.open()
        for number, name in enumerate(self._names):
            ticket = await self._controller.acquire(RequestFacts(f"first-{number}", name))
            self._controller.finished(ticket, DONE)
        self._sweeping = asyncio.create_task(self._sweep())
        return self._names

    def processor_s(self) -> float:
        """Processor seconds that this process has used so far."""
        return time.process_time()

    async def enter(self, ingress: str, held: Sequence[Held]) -> SessionWelcome:
        """See ``ControllerLink``."""
        return await self._service.enter(ingress, held)

    async def acquire(self, ingress: str, facts: RequestFacts) -> Answer:
        """See ``ControllerLink``."""
        return await self._service.acquire(ingress, facts)

    async def note(self, ingress: str, notes: Sequence[Note]) -> bool:
        """See ``ControllerLink``."""
        return await self._service.note(ingress, notes)

    async def poll(self, ingress: str, version: int) -> News | Unknown:
        """See ``ControllerLink``."""
        return await self._service.poll(ingress, version)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._service.sweep()


class SimulatedLink:
    """A ``ControllerLink`` to a ``SimulatedController``."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401 - Ray has no types
        self._actor = actor

    async def enter(self, ingress: str, held: Sequence[Held]) -> SessionWelcome:
        """See ``ControllerLink``."""
        welcome: SessionWelcome = await self._actor.enter.remote(ingress, held)
        return welcome

    async def acquire(self, ingress: str, facts: RequestFacts) -> Answer:
        """See ``ControllerLink``."""
        answer: Answer = await self._actor.acquire.remote(ingress, facts)
        return answer

    async def retry(self, ingress: str, ticket: Ticket, *, facts: RequestFacts, failure: Failure) -> Answer:
        """See ``ControllerLink``; no ticket fails here."""
        raise ControllerGone(failure.reason)

    async def note(self, ingress: str, notes: Sequence[Note]) -> bool:
        """See ``ControllerLink``."""
        return bool(await self._actor.note.remote(ingress, notes))

    async def poll(self, ingress: str, version: int) -> News | Unknown:
        """See ``ControllerLink``."""
        news: News | Unknown = await self._actor.poll.remote(ingress, version)
        return news
