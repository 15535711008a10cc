"""What the router knows of its node right after something happened, and not only after the next report in turn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sllm_vllm.daemon import run_loops
from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.errors import ReplicaUnknown
from sllm_vllm.node.protocol import CheckpointReport, NodeReport, ReplicaOrder, ReplicaReport
from sllm_vllm.router import engines, node_watch
from sllm_vllm.router.admin.views import explain_view, nodes_view
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.controller import Controller, weights_nbytes
from sllm_vllm.router.core.cluster import ReplicaState
from sllm_vllm.router.core.events import PrefetchModel, ReplicaEnded
from sllm_vllm.router.core.facts import RequestFacts, Tier
from sllm_vllm.router.gate import Outcome
from sllm_vllm.router.node_watch import NodeWatch
from tests.support.cases import every_case
from tests.support.fake_gate import until
from tests.support.fake_node import FakeNode
from tests.support.waiting import DEADLINE_S

MODEL = "meta/tiny"
DONE = Outcome("done", 200, first_byte_s=None, seconds=0.1, prompt_tokens=None, output_tokens=None)


@pytest.fixture(autouse=True)
def never_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are read when something happened, or not at all."""
    monkeypatch.setattr(node_watch, "REPORT_S", 3600.0)


@contextlib.asynccontextmanager
async def running(node: FakeNode, directory: Path, *models: ModelConfig) -> AsyncIterator[Controller]:
    controller = Controller(waiting_max=10, directory=directory)
    await controller.measure(models)
    for model in models:
        controller.deploy(model)
    await controller.start()
    await controller.add_node("local", node)
    try:
        yield controller
    finally:
        await controller.close()
    controller.core.validate()


def checkpoint(model: str = MODEL, *, resident: int = 0) -> CheckpointReport:
    return CheckpointReport(name="tiny-1", nbytes=100, resident_nbytes=resident, tiers=("DISK",), model=model)


def tier_of(controller: Controller, model: str = MODEL) -> Tier:
    return controller.core.cluster.tier("local", model)


async def test_the_plan_after_a_start_knows_the_checkpoint_that_it_made(tmp_path: Path) -> None:
    node = FakeNode()
    node.may_be_ready.clear()
    async with running(node, tmp_path, ModelConfig(name=MODEL, max_replicas=2)) as controller:
        assert explain_view(controller, MODEL)["plans"][0]["tier"] == "REMOTE"
        asking = asyncio.create_task(controller.acquire(RequestFacts("r-1", MODEL)))
        await until(lambda: controller.replica_reports(), "the start")
        node.checkpoints = (checkpoint(resident=100),)
        node.may_be_ready.set()
        controller.finished(await asyncio.wait_for(asking, DEADLINE_S), DONE)
        await until(lambda: tier_of(controller) is Tier.HOST, "the new tier")
        assert explain_view(controller, MODEL)["plans"][0]["tier"] == "HOST"
        assert controller.core.models[MODEL].spec.nbytes == 100


async def test_the_plan_after_an_end_knows_what_left_memory(tmp_path: Path) -> None:
    node = FakeNode()
    node.checkpoints = (checkpoint(resident=100),)
    async with running(node, tmp_path, ModelConfig(name=MODEL, min_replicas=1)) as controller:
        await until(lambda: any(one.is_ready for one in controller.replica_reports().values()), "its replica")
        assert tier_of(controller) is Tier.HOST
        node.checkpoints = (checkpoint(),)
        controller.drain(next(iter(controller.replica_reports())))
        await until(lambda: tier_of(controller) is Tier.DISK, "the new tier")


async def test_a_warm_parent_that_has_imported_is_known_at_once(tmp_path: Path) -> None:
    node = FakeNode()
    node.is_warm.clear()
    async with running(node, tmp_path, ModelConfig(name=MODEL)) as controller:
        assert explain_view(controller, MODEL)["plans"][0]["is_warm"] is False
        node.is_warm.set()
        await until(lambda: explain_view(controller, MODEL)["plans"][0]["is_warm"], "a warm plan")


async def test_a_parent_that_imports_is_waited_for_in_the_plan(tmp_path: Path) -> None:
    node = FakeNode()
    node.is_warm.clear()
    node.warm_in_s = 1000.0
    async with running(node, tmp_path, ModelConfig(name=MODEL)) as controller:
        plan = explain_view(controller, MODEL)["plans"][0]
        assert plan["is_warm"] is True
        assert 900.0 < plan["terms"]["queue"] <= 1000.0
        assert 900.0 < nodes_view(controller)["nodes"][0]["warm_in_s"] <= 1000.0


async def test_a_prefetch_is_followed_to_its_end(tmp_path: Path) -> None:
    node = FakeNode()
    node.store = ""
    node.checkpoints = (checkpoint(resident=10),)
    async with running(node, tmp_path, ModelConfig(name=MODEL)) as controller:
        controller._do(PrefetchModel(MODEL, "local"))
        await until(lambda: node.prefetched, "the order")
        assert tier_of(controller) is Tier.DISK
        node.checkpoints = (checkpoint(resident=100),)
        await until(lambda: tier_of(controller) is Tier.HOST, "the new tier")


async def test_with_many_nodes_each_is_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_watch, "REPORT_S", 0.01)
    monkeypatch.setattr(node_watch, "PAUSE_S", 0.0)
    nodes = [FakeNode(), FakeNode()]

    def watching(node: FakeNode, num_nodes: int) -> NodeWatch:
        return NodeWatch("n", node, {}, tell=lambda _: None, on_lost=lambda _: None, num_nodes=lambda: num_nodes)

    watches = [watching(nodes[0], 1), watching(nodes[1], 10_000)]
    loops = RunLoops()
    tasks = [loops.start("reports", watch.follow_report) for watch in watches]
    await until(lambda: nodes[0].num_reports > 5, "reports of the one that is alone")
    assert nodes[1].num_reports == 0
    watches[1].refresh()
    await until(lambda: nodes[1].num_reports == 1, "one that is asked for")
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize("store", ["", "no daemon answers"])
async def test_a_prefetch_that_comes_to_nothing_is_not_followed_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    monkeypatch.setattr(node_watch, "_PREFETCH_PAUSE_S_MAX", 0.1)
    node = FakeNode()
    node.store = store
    node.checkpoints = (checkpoint(resident=10),)
    async with running(node, tmp_path, ModelConfig(name=MODEL)) as controller:
        controller._do(PrefetchModel(MODEL, "local"))
        await until(lambda: not controller._members["local"].watch._prefetches, "nobody to look for it")
        assert tier_of(controller) is Tier.DISK
        assert (node.num_reports < 4) == bool(store)


async def test_the_very_first_start_is_planned_with_what_the_node_has(tmp_path: Path) -> None:
    node = FakeNode()
    node.may_be_ready.clear()
    node.checkpoints = (checkpoint(),)
    async with running(node, tmp_path, ModelConfig(name=MODEL, min_replicas=1)) as controller:
        (prediction,) = controller.core.scaling.predictions.values()
        assert prediction.tier == "DISK"
        controller.deploy(ModelConfig(name="again", source=MODEL, min_replicas=1))
        assert [one.tier for one in controller.core.scaling.predictions.values()] == ["DISK", "DISK"]


@every_case("written", ["weights", "./weights", "a/../weights", "absolute"])
async def test_a_directory_is_measured_before_there_is_a_checkpoint(tmp_path: Path, written: str) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (tmp_path / "a").mkdir()
    (weights / "model.safetensors").write_bytes(b"x" * 12345)
    source = str(weights) if written == "absolute" else written
    node = FakeNode()
    node.may_be_ready.clear()
    model = ModelConfig.model_validate(
        {"name": MODEL, "source": source, "min_replicas": 1}, context={"directory": tmp_path}
    )
    async with running(node, tmp_path, model) as controller:
        assert controller.core.models[MODEL].spec.nbytes == 12345
        (prediction,) = controller.core.scaling.predictions.values()
        defaults = controller.core.estimator.defaults
        expected_s = defaults.weights_fixed_s + 12345 / defaults.tier_bps[Tier.REMOTE]
        assert expected_s in prediction.expected.terms.values()


async def test_a_checkpoint_is_found_under_another_spelling_of_its_path(tmp_path: Path) -> None:
    node = FakeNode()
    node.checkpoints = (checkpoint("/models//tiny/"), checkpoint("other"))
    models = (ModelConfig(name="a", source="/models/tiny"), ModelConfig(name="b", source="/models/x/../tiny"))
    async with running(node, tmp_path, *models, ModelConfig(name="c", source="/models/none")) as controller:
        assert [tier_of(controller, name) for name in "abc"] == [Tier.DISK, Tier.DISK, Tier.REMOTE]


async def test_a_replica_that_the_agent_does_not_know_any_more_gives_its_slot_back(tmp_path: Path) -> None:
    class Forgetful(FakeNode):
        async def watch(self, replica_id: str) -> AsyncIterator[ReplicaReport]:
            yield self.lives[replica_id].report
            raise ReplicaUnknown(replica_id, "no replica has this id", "see `sllm-vllm ps --all`")

    async with running(Forgetful(num_slots=1), tmp_path, ModelConfig(name=MODEL, min_replicas=1)) as controller:
        await until(lambda: controller.core.models[MODEL].back_off.num_failures, "a failed start")
        ends = [what for _, what in controller.core.events if isinstance(what, ReplicaEnded)]
        assert ends[0] == ReplicaEnded(ends[0].replica, "no replica has this id", is_fault=True, is_unseen=True)


async def test_a_replica_that_an_operator_has_its_agent_stop_has_no_fault(tmp_path: Path) -> None:
    """Else a request that it has at that moment would be refused as one that kills engines."""
    node = FakeNode(num_slots=1)
    async with running(node, tmp_path, ModelConfig(name=MODEL, min_replicas=1)) as controller:
        await until(lambda: controller.core.cluster.replicas, "a replica")
        (replica,) = controller.core.cluster.replicas
        await until(lambda: controller.core.cluster.replicas[replica].state is ReplicaState.READY, "it to be ready")
        await node.stop_replica(replica)
        await until(lambda: replica not in controller.core.cluster.replicas, "it to end")
        ends = [what for _, what in controller.core.events if isinstance(what, ReplicaEnded)]
        assert [(one.replica, one.is_fault) for one in ends] == [(replica, False)]


@every_case(
    "files, nbytes",
    [
        ({}, 0),
        ({"config.json": 9}, 0),
        ({"a.safetensors": 3, "b.safetensors": 4, "pytorch_model.bin": 100}, 7),
        ({"pytorch_model-1.bin": 5, "pytorch_model-2.bin": 6, "training_args.bin": 1}, 11),
        ({"model.safetensors": 3, "consolidated.safetensors": 3}, 3),
        ({"consolidated.safetensors": 3}, 3),
        ({"model.pt": 8}, 8),
    ],
)
def test_weights_are_measured_by_the_files_that_are_read(tmp_path: Path, files: dict[str, int], nbytes: int) -> None:
    for name, size in files.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert weights_nbytes(tmp_path) == nbytes


def test_what_is_no_directory_has_no_weights(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert [weights_nbytes(path) for path in (tmp_path / "none", tmp_path / "file", tmp_path / ("x" * 5000))] == [0] * 3


async def test_an_order_that_fails_as_nobody_foresaw_gives_its_slot_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = FakeNode()
    async with running(node, tmp_path, ModelConfig(name=MODEL)) as controller:
        with monkeypatch.context() as patched:
            patched.setattr(node, "ensure_replica", failing_order)
            asking = asyncio.create_task(controller.acquire(RequestFacts("r-1", MODEL)))
            await until(lambda: controller.core.models[MODEL].back_off.num_failures, "a failed start")
        controller.finished(await asyncio.wait_for(asking, DEADLINE_S), DONE)


async def test_a_watch_that_fails_as_nobody_foresaw_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, failures = FakeNode(), [OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread")]
    monkeypatch.setattr(engines, "WATCH_AGAIN_S", 0.01)
    watch = node.watch

    def watch_or_fail(replica_id: str) -> AsyncIterator[ReplicaReport]:
        if failures:
            raise failures.pop()
        return watch(replica_id)

    monkeypatch.setattr(node, "watch", watch_or_fail)
    async with running(node, tmp_path, ModelConfig(name=MODEL)) as controller:
        controller.finished(await asyncio.wait_for(controller.acquire(RequestFacts("r-1", MODEL)), DEADLINE_S), DONE)
    assert not failures


async def failing_order(order: ReplicaOrder) -> ReplicaReport:
    raise OSError(errno.EMFILE, "Too many open files")


async def test_a_router_is_not_ready_while_a_loop_of_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_loops, "SETTLED_S", 1.0)
    node = FakeNode()
    async with running(node, tmp_path, ModelConfig(name=MODEL)) as controller:
        assert controller.is_ready()
        with monkeypatch.context() as patched:
            patched.setattr(node, "report", failing_report)
            controller._members["local"].watch.refresh()
            await until(lambda: not controller.is_ready(), "it to be told")
        await until(controller.is_ready, "the next step to succeed")


async def test_a_router_is_not_ready_while_a_loop_of_its_agent_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = FakeNode()
    async with running(node, tmp_path, ModelConfig(name=MODEL)) as controller:
        report = await node.report()

        async def told() -> NodeReport:
            return report.model_copy(update={"problem": "the agent's tick: Too many open files"})

        with monkeypatch.context() as patched:
            patched.setattr(node, "report", told)
            controller._members["local"].watch.refresh()
            await until(lambda: not controller.is_ready(), "it to be told")
        controller._members["local"].watch.refresh()
        await until(controller.is_ready, "the agent to work again")


async def failing_report() -> NodeReport:
    raise OSError(errno.EMFILE, "Too many open files")
