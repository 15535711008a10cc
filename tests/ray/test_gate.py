"""An ingress and a controller in different processes, without the processes: what is lost, repeated and restarted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from sllm_vllm.ray import gate as remote_gate
from sllm_vllm.ray.gate import RemoteGate
from sllm_vllm.ray.session import SILENT_S_MAX, Answer, ControllerGone, Held, News, Note, SessionWelcome, Unknown
from sllm_vllm.ray.sessions import GateService
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.controller import Controller, ControllerLimits
from sllm_vllm.router.core.facts import FailureSign, RequestFacts
from sllm_vllm.router.gate import Failure, MoveOrder, MoveReport, Outcome, Rejected, Ticket
from tests.support.fake_gate import until
from tests.support.fake_node import FakeNode
from tests.support.waiting import DEADLINE_S

T = TypeVar("T")
MODEL = "meta/tiny"
UNREACHED = FailureSign.UNREACHED
DONE = Outcome("done", 200, first_byte_s=None, seconds=0.1, prompt_tokens=None, output_tokens=None)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_gate, "PAUSE_S", 0.01)


class Link:
    """A way to a service that may be away, and whose answers may be lost on their way back."""

    def __init__(self) -> None:
        self.service: GateService | None = None
        self.lost: set[str] = set()
        """Calls whose next answer is lost."""
        self.changed = asyncio.Event()
        """Set and replaced when the service is gone: what waits for it fails."""

    async def enter(self, ingress: str, held: Sequence[Held]) -> SessionWelcome:
        return await self._call("enter", lambda service: service.enter(ingress, held))

    async def acquire(self, ingress: str, facts: RequestFacts) -> Answer:
        return await self._call("acquire", lambda service: service.acquire(ingress, facts))

    async def retry(self, ingress: str, ticket: Ticket, *, facts: RequestFacts, failure: Failure) -> Answer:
        return await self._call("retry", lambda service: service.retry(ingress, ticket, facts=facts, failure=failure))

    async def note(self, ingress: str, notes: Sequence[Note]) -> bool:
        return await self._call("note", lambda service: service.note(ingress, notes))

    async def poll(self, ingress: str, version: int) -> News | Unknown:
        return await self._call("poll", lambda service: service.poll(ingress, version))

    def kill(self) -> None:
        self.service = None
        self.changed.set()
        self.changed = asyncio.Event()

    async def _call(self, name: str, call: Callable[[GateService], Coroutine[Any, Any, T]]) -> T:
        if self.service is None:
            raise ControllerGone("it is away")
        answering = asyncio.ensure_future(call(self.service))
        dying = asyncio.ensure_future(self.changed.wait())
        await asyncio.wait({answering, dying}, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            raise ControllerGone("it died")
        dying.cancel()
        if name in self.lost:
            self.lost.remove(name)
            raise ControllerGone("its answer was lost")
        return answering.result()


class Bench:
    """One node, which outlives controllers; one gate; a controller at a time."""

    def __init__(self, directory: Path, node: FakeNode) -> None:
        self.node = node
        self.link = Link()
        self.settings: list[IngressSettings] = []
        self.gate = RemoteGate("i-1", self.link, on_settings=self.settings.append)
        self.now_s = 0.0
        self._directory = directory

    async def start_controller(self, *, is_open: bool = True) -> None:
        self.controller = Controller(waiting_max=10, directory=self._directory, bounds=ControllerLimits(moves_max=1))
        await self.controller.start()
        self.controller.deploy(ModelConfig(name=MODEL, max_replicas=2, ongoing_max=1, target_ongoing=1))
        self.service = GateService(self.controller, IngressSettings(), clock=lambda: self.now_s)
        self.link.service = self.service
        if is_open:
            await self.open()

    async def open(self) -> None:
        await self.controller.add_node("local", self.node, self.service.held_by_replica)
        self.service.open()

    async def kill_controller(self) -> None:
        """As SIGKILL does: it says nothing more to anybody."""
        self.link.kill()
        await self.controller.close()

    async def ask(self, name: str) -> Ticket:
        return await asyncio.wait_for(self.gate.acquire(RequestFacts(name, MODEL)), DEADLINE_S)

    def requests(self) -> dict[str, str | None]:
        """Where the core believes each to be."""
        return {name: one.replica for name, one in self.controller.core.requests.items()}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, FakeNode(num_slots=2))
    await bench.start_controller()
    await asyncio.wait_for(bench.gate.start(), DEADLINE_S)
    yield bench
    await bench.gate.close()
    await bench.controller.close()
    bench.controller.core.validate()


async def test_a_request_from_its_arrival_to_its_end(bench: Bench) -> None:
    ticket = await bench.ask("r")
    assert bench.requests() == {"r": ticket.replica}
    bench.gate.first_byte(ticket)
    bench.gate.finished(ticket, DONE)
    await until(lambda: not bench.requests(), "its end to be told")
    assert list(bench.controller.outcomes) == [(ticket, DONE)]
    await until(lambda: [one.name for one in bench.gate.served()] == [MODEL], "the models")
    await until(bench.gate.is_ready, "it to be ready")


async def test_a_refusal_comes_as_it_was_made(bench: Bench) -> None:
    with pytest.raises(Rejected) as caught:
        await bench.gate.acquire(RequestFacts("r", "nobody's"))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


async def test_a_client_that_leaves_while_it_waits_leaves_nothing(bench: Bench) -> None:
    bench.node.may_be_ready.clear()
    asking = asyncio.create_task(bench.ask("r"))
    await until(lambda: "r" in bench.requests(), "its arrival")
    asking.cancel()
    await until(lambda: not bench.requests(), "it to be gone")


@pytest.mark.parametrize("call", ["acquire", "retry"])
async def test_an_answer_that_is_lost_costs_no_second_place(bench: Bench, call: str) -> None:
    if call == "acquire":
        bench.link.lost.add(call)
        ticket = await bench.ask("r")
    else:
        first = await bench.ask("r")
        bench.link.lost.add(call)
        ticket = await asyncio.wait_for(bench.gate.retry(first, Failure("connection reset", UNREACHED)), DEADLINE_S)
    assert bench.requests() == {"r": ticket.replica}
    ongoing = [one.ongoing for one in bench.controller.core.cluster.replicas.values() if one.ongoing]
    assert ongoing == [{"r"}]


async def test_a_controller_that_comes_back_knows_what_runs_and_serves_who_waited(bench: Bench) -> None:
    first = await bench.ask("first")
    await bench.kill_controller()
    waiting = asyncio.create_task(bench.ask("second"))
    ended = Outcome("done", 200, first_byte_s=None, seconds=9.0, prompt_tokens=None, output_tokens=None)
    await bench.start_controller(is_open=False)
    await until(lambda: bench.service.num_ingresses == 1, "the ingress to be back")
    assert not waiting.done()
    await bench.open()
    second = await waiting
    assert bench.requests() == {"first": first.replica, "second": second.replica}
    assert second.replica != first.replica  # which is full, and the new controller knows
    bench.gate.finished(first, ended)
    await until(lambda: set(bench.requests()) == {"second"}, "its end")


async def test_what_ended_while_the_controller_was_away_takes_no_place(bench: Bench) -> None:
    ticket = await bench.ask("r")
    await bench.kill_controller()
    bench.gate.finished(ticket, DONE)
    await bench.start_controller()
    again = await bench.ask("s")
    assert again.replica == ticket.replica
    assert bench.requests() == {"s": ticket.replica}


async def test_a_retry_of_what_a_new_controller_never_sent_is_a_request(bench: Bench) -> None:
    ticket = await bench.ask("r")
    await bench.kill_controller()
    for life in bench.node.lives.values():
        life.become("failed")
    await bench.start_controller()
    await until(lambda: bench.service.num_ingresses == 1, "the ingress to be back")
    again = await asyncio.wait_for(bench.gate.retry(ticket, Failure("connection reset", UNREACHED)), DEADLINE_S)
    assert again.replica != ticket.replica


async def test_an_ingress_that_dies_gives_back_its_places(bench: Bench) -> None:
    await bench.ask("r")
    bench.node.may_be_ready.clear()
    waiting = asyncio.create_task(bench.ask("s"))
    await until(lambda: set(bench.requests()) == {"r", "s"}, "both")
    await bench.gate.close()
    bench.now_s += SILENT_S_MAX + 1
    bench.service.sweep()
    await until(lambda: not bench.requests(), "both to be gone")
    assert bench.service.num_ingresses == 0
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting


async def test_an_ingress_that_was_written_off_too_soon_says_what_it_holds(bench: Bench) -> None:
    ticket = await bench.ask("r")
    bench.now_s += SILENT_S_MAX + 1
    bench.service.sweep()
    await until(lambda: bench.requests() == {"r": ticket.replica}, "it to be known again")


async def moving(bench: Bench) -> tuple[Ticket, MoveOrder]:
    """A request that was ordered to move."""
    orders: list[MoveOrder] = []
    first = await bench.ask("a")
    ticket = await bench.ask("b")
    bench.gate.finished(first, DONE)
    bench.gate.follow(ticket, orders.append)
    await until(lambda: "b" in bench.controller._followers, "it to be followed")
    for replica in bench.controller.core.cluster.replicas.values():
        replica.is_movable = True
    assert bench.controller.migrate("b", None) == ""
    await until(lambda: orders, "the order")
    assert orders[0].target.replica == first.replica
    return ticket, orders[0]


async def test_a_request_moves_when_it_is_told_to(bench: Bench) -> None:
    ticket, order = await moving(bench)
    bench.gate.moved(ticket, order, MoveReport())
    await until(lambda: bench.requests() == {"b": order.target.replica}, "it to be there")


async def test_a_move_that_comes_to_its_end_under_another_controller_is_believed(bench: Bench) -> None:
    ticket, order = await moving(bench)
    await bench.kill_controller()
    await bench.start_controller()
    await until(lambda: bench.requests() == {"b": ticket.replica}, "it to be known again")
    bench.gate.moved(ticket, order, MoveReport())
    await until(lambda: bench.requests() == {"b": order.target.replica}, "it to be there")


async def test_a_move_that_failed_is_over(bench: Bench) -> None:
    ticket, order = await moving(bench)
    bench.gate.not_moved(ticket, order, MoveReport(), reason="its target died", is_lasting=False)
    await until(lambda: not bench.controller.core.moves.moving, "it to be told")
    assert bench.requests() == {"b": ticket.replica}


async def test_settings_that_change_are_told(bench: Bench) -> None:
    bench.service.set_settings(IngressSettings(requests_max=7))
    await until(lambda: bench.settings[-1].requests_max == 7, "the new ones")
