"""Checkpoints that go from node to node: before a start, and for a model that is hot."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sllm_vllm.errors import NodeError
from sllm_vllm.node.protocol import CheckpointReport, NodeReport
from sllm_vllm.router.admin.views import nodes_view, stores_view
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.controller import Controller, ControllerLimits
from sllm_vllm.router.core import foresight as copies
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Ticket
from tests.support.fake_gate import until
from tests.support.fake_node import FakeNode
from tests.support.waiting import DEADLINE_S

MODEL = ModelConfig(name="m", source="/models/m", max_replicas=2, ongoing_max=4, target_ongoing=4)
CHECKPOINT = CheckpointReport(name="m-c0ffee", nbytes=100, resident_nbytes=0, tiers=("DISK",), model="/models/m")
KEY = "the-peers-own-key"


class PullingNode(FakeNode):
    """One that others can pull from, and that pulls; a pull ends when it may."""

    def __init__(self, name: str, *, num_slots: int = 1) -> None:
        super().__init__(num_slots)
        self.peer = f"http://peer:{KEY}@{name}:1"
        self.pulled: list[str] = []
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.problem = ""

    async def report(self, *, with_memory: bool = False) -> NodeReport:
        return (await super().report(with_memory=with_memory)).model_copy(update={"peer": self.peer})

    async def pull_checkpoint(self, url: str) -> None:
        self.pulled.append(url)
        await self.may_end.wait()
        if self.problem:
            raise NodeError("store", self.problem, "look")
        self.checkpoints = (CHECKPOINT,)


@contextlib.asynccontextmanager
async def serving(directory: Path, *nodes: FakeNode, holders_max: int = 0) -> AsyncIterator[Controller]:
    """Over nodes `n0`, `n1`, …; the first one has the checkpoint, and no room for a start."""
    controller = Controller(waiting_max=10, directory=directory, bounds=ControllerLimits(holders_max=holders_max))
    await controller.start()
    controller.deploy(MODEL)
    nodes[0].checkpoints = (CHECKPOINT,)
    for number, node in enumerate(nodes):
        await controller.add_node(f"n{number}", node)
    try:
        yield controller
        controller.core.validate()
    finally:
        await controller.close()


async def ask(controller: Controller, name: str = "r") -> Ticket:
    return await asyncio.wait_for(controller.acquire(RequestFacts(name, "m")), DEADLINE_S)


async def test_a_start_pulls_from_the_node_that_has_it(tmp_path: Path) -> None:
    holder, other = PullingNode("n0"), PullingNode("n1")
    async with serving(tmp_path, holder, other) as controller:
        controller.drain("n0")
        assert await ask(controller)
        assert other.pulled == [f"{holder.peer}/{CHECKPOINT.name}"]
        assert len(other.orders) == 1
        assert not holder.pulled
        await until(lambda: controller.core.cluster.nodes["n1"].tiers, "the next report")


async def test_a_start_where_it_is_pulls_nothing(tmp_path: Path) -> None:
    holder, other = PullingNode("n0"), PullingNode("n1")
    async with serving(tmp_path, holder, other) as controller:
        assert await ask(controller)
        assert len(holder.orders) == 1
        assert not (holder.pulled)
        assert not (other.pulled)


async def test_a_pull_that_fails_costs_the_start_nothing_more(tmp_path: Path) -> None:
    holder, other = PullingNode("n0"), PullingNode("n1")
    other.problem = "the disk is full"
    async with serving(tmp_path, holder, other) as controller:
        controller.drain("n0")
        assert await ask(controller)
        assert len(other.orders) == 1


@pytest.mark.parametrize("lacking", ["a peer", "a puller"])
async def test_without_a_way_nothing_is_pulled(tmp_path: Path, lacking: str) -> None:
    holder = PullingNode("n0")
    other = PullingNode("n1") if lacking == "a peer" else FakeNode(1)
    holder.peer = "" if lacking == "a peer" else holder.peer
    async with serving(tmp_path, holder, other) as controller:
        controller.drain("n0")
        assert await ask(controller)
        assert len(other.orders) == 1
        assert not getattr(other, "pulled", [])


async def test_a_start_that_is_called_off_while_it_pulls_is_never_ordered(tmp_path: Path) -> None:
    holder, other = PullingNode("n0"), PullingNode("n1")
    other.may_end.clear()
    async with serving(tmp_path, holder, other) as controller:
        controller.drain("n0")
        asking = asyncio.create_task(ask(controller))
        await until(lambda: other.pulled, "the pull")
        controller.drain("n1")
        other.may_end.set()
        await until(lambda: not controller.core.cluster.replicas, "its slot to be free")
        assert other.orders == []
        controller.undrain("n1")
        assert await asking
        assert len(other.orders) == 1


async def test_a_hot_models_checkpoint_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "LOOK_S", 0.0)
    holder, other = PullingNode("n0"), PullingNode("n1")
    async with serving(tmp_path, holder, other, holders_max=2) as controller:
        await ask(controller, "r-0")
        assert not other.pulled
        await ask(controller, "r-1")
        await until(lambda: other.pulled == [f"{holder.peer}/{CHECKPOINT.name}"], "the copy")
        await until(lambda: controller.core.cluster.nodes["n1"].tiers, "it to be known")


async def test_operators_are_not_shown_the_key(tmp_path: Path) -> None:
    async with serving(tmp_path, PullingNode("n0")) as controller:
        assert KEY not in json.dumps([nodes_view(controller), stores_view(controller)])
