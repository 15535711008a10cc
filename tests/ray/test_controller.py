"""When the controller on Ray begins to give tickets. Nodes are names here; the real ones are in test_ray.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("ray")

from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.ray import controller as ray_controller
from sllm_vllm.ray.controller import RayController
from sllm_vllm.ray.nodes import RayNodeFacts
from tests.support.waiting import DEADLINE_S

NODES = ("a", "b")


class Service:
    """Of ``GateService``, what is asked here."""

    def __init__(self, controller: TwoNodes) -> None:
        self.controller = controller
        self.opened_with: set[str] = set()
        self.is_open = asyncio.Event()

    def open(self) -> None:
        if not self.is_open.is_set():
            self.opened_with = set(self.controller.joined)
            self.is_open.set()


class TwoNodes(RayController):
    """Two nodes are there from the first look on; one of them does not join at once."""

    def __init__(self, directory: Path, *, failures: int) -> None:
        super().__init__("{}", str(directory), 1.0)
        self.failures = failures
        self.num_tries = 0

    @property
    def joined(self) -> set[str]:
        return set(self._nodes)

    async def _look(self) -> list[RayNodeFacts]:
        return [RayNodeFacts(id=name, name=name, address="127.0.0.1", num_gpus=0, num_cpus=2) for name in NODES]

    async def _join(self, node: RayNodeFacts, service: Service) -> None:  # type: ignore[override]
        if node.name == "b":
            self.num_tries += 1
            if self.num_tries <= self.failures:
                return
        self._nodes[node.id] = None  # type: ignore[assignment]


async def opened_with(controller: TwoNodes) -> set[str]:
    """The nodes that had joined when tickets were given for the first time."""
    service = Service(controller)
    first_s = asyncio.get_running_loop().time()
    following = RunLoops().start("a", lambda: controller._follow_cluster(service, first_s=first_s))  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(DEADLINE_S):
            await service.is_open.wait()
    finally:
        following.cancel()
    return service.opened_with


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_controller, "LOOK_S", 0.01)


async def test_no_ticket_is_given_before_a_node_whose_join_failed_has_joined(tmp_path: Path) -> None:
    """Else what runs there would be started a second time elsewhere."""
    controller = TwoNodes(tmp_path, failures=3)
    assert await opened_with(controller) == {"a", "b"}
    assert controller.num_tries == 4


async def test_a_node_that_never_joins_holds_tickets_up_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_controller, "JOIN_S_MAX", 0.1)
    assert await opened_with(TwoNodes(tmp_path, failures=1_000_000)) == {"a"}
