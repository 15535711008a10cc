"""The Serve application on a real Ray cluster, over engines that start in a moment; whatever can die is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from tests.support.ray_bench import RayBench, end_of, fake_sections, ray_bench
from tests.support.router_process import Stream, is_alive
from tests.support.waiting import wait_until

NODES = ("a", "b")
CAPACITY = 2
"""Requests at once, of an engine."""
NUM_EVENTS = 20
"""Of a stream that something is killed under."""
MODELS: dict[str, dict[str, Any]] = {"fine": {}, "family": {"max_replicas": 1}, "noisy": {"max_replicas": 1}}
"""As many replicas as there are places."""
INGRESSES = {"ingress_min": 2, "ingress_max": 2}
DEFAULTS = {"ongoing_max": CAPACITY, "target_ongoing": CAPACITY, "max_replicas": 2, "keep_alive": 600}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayBench]:
    """Two nodes with two places each, and two ingresses."""
    directory = tmp_path_factory.mktemp("ray")
    with ray_bench(directory, *NODES) as bench:
        bench.deploy(fake_sections(directory, MODELS, ray=INGRESSES, defaults=DEFAULTS))
        bench.wait_for_nodes(*NODES)
        yield bench


@pytest.fixture
def go(tmp_path: Path) -> Path:
    """The file that begun streams wait for."""
    return tmp_path / "go"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def begun_stream(bench: RayBench, model: str, user: str, go: Path) -> Stream:
    """One that has begun, and goes on when this file is there: so it does not end before something is killed."""
    fake = {"events": NUM_EVENTS, "pace_s": 0.03, "stalls_after": 1, "stalls_until": str(go)}
    stream = bench.router.streaming(model, user=user, fake=fake)
    assert stream.event()["choices"][0]["text"] == f"{user}/0 "
    return stream


def pids_on(bench: RayBench, node: str) -> list[int]:
    """Of the engines there."""
    return [one["report"]["pid"] for one in bench.replicas() if one["node"] == node]


def assert_whole(stream: Stream, user: str) -> None:
    texts = [event["choices"][0]["text"] for event in stream.rest() if isinstance(event, dict) and event.get("choices")]
    assert [text for text in texts if text] == [f"{user}/{number} " for number in range(1, NUM_EVENTS)]


def assert_all_capacity_is_back(bench: RayBench, model: str, pool: ThreadPoolExecutor) -> None:
    """As many streams as may be at once all begin."""
    wait_until(lambda: bench.router.num_ongoing() == 0, "all places to be free")
    stuck = {"fake": {"stalls_after": 1}, "user": "full"}
    streams = list(pool.map(lambda _: bench.router.streaming(model, **stuck), range(2 * CAPACITY)))
    assert [stream.event()["choices"][0]["text"] for stream in streams] == ["full/0 "] * len(streams)
    for stream in streams:
        stream.close()
    wait_until(lambda: bench.router.num_ongoing() == 0, "them to be gone")


def ends_expected(bench: RayBench, lost: str) -> set[str]:
    """Of streams that fill all replicas of ``fine``, when a node of theirs is lost."""
    assert lost in bench.nodes_of("fine")
    return {"engine_failed", "[DONE]"} if bench.nodes_of("fine") - {lost} else {"engine_failed"}


def test_models_are_served_from_all_nodes_and_everything_is_held_by_the_agents(
    bench: RayBench, pool: ThreadPoolExecutor
) -> None:
    for model in ("fine", "family", "noisy"):
        assert bench.router.post(model).status == 200
    assert bench.router.post("nobody's").status == 404
    bench.assert_nothing_is_held_twice()
    assert_all_capacity_is_back(bench, "fine", pool)


def test_a_controller_that_is_killed_costs_no_stream_and_no_request(
    bench: RayBench, pool: ThreadPoolExecutor, go: Path
) -> None:
    streams = [begun_stream(bench, "fine", f"u{num}", go) for num in range(2)]
    replicas = {one["id"] for one in bench.replicas()}
    bench.kill_controller()
    go.touch()
    later = [bench.router.post_later(pool, "family", user=f"v{num}") for num in range(4)]
    for num, stream in enumerate(streams):
        assert_whole(stream, f"u{num}")
    assert [one.result().status for one in later] == [200] * len(later)
    bench.wait_for_nodes(*NODES)
    kept = {one["id"] for one in bench.replicas()}
    assert replicas <= kept
    bench.assert_nothing_is_held_twice()
    assert_all_capacity_is_back(bench, "fine", pool)


def test_what_was_deployed_by_hand_outlives_the_controller(bench: RayBench) -> None:
    added = {"name": "by-hand", "source": "/models/fine"}
    assert bench.router.admin("models", "POST", added).status == 201
    bench.kill_controller()
    wait_until(lambda: bench.router.admin("models").status == 200, "the next controller")
    names = {one["name"] for one in bench.router.admin("models").body["models"]}
    assert names == {*MODELS, "by-hand"}
    assert bench.router.admin("models/by-hand", "DELETE").status == 200
    bench.wait_for_nodes(*NODES)


def test_an_agent_that_is_killed_costs_its_own_streams_alone(
    bench: RayBench, pool: ThreadPoolExecutor, go: Path
) -> None:
    stays = begun_stream(bench, "noisy", "stays", go)
    streams = [begun_stream(bench, "fine", f"u{num}", go) for num in range(2 * CAPACITY)]
    (other,) = set(NODES) - bench.nodes_of("noisy")
    expected = ends_expected(bench, other)
    engines = pids_on(bench, other)
    bench.kill_agent(other)
    wait_until(lambda: not any(map(is_alive, engines)), "its engines' end")
    go.touch()
    assert {end_of(stream) for stream in streams} == expected
    assert_whole(stays, "stays")
    assert bench.router.post("fine").status == 200
    bench.wait_for_nodes(*NODES)
    bench.assert_nothing_is_held_twice()
    assert_all_capacity_is_back(bench, "fine", pool)


def test_an_ingress_that_is_killed_costs_its_own_streams_alone(
    bench: RayBench, pool: ThreadPoolExecutor, go: Path
) -> None:
    streams = [begun_stream(bench, "fine", f"u{num}", go) for num in range(2 * CAPACITY)]
    bench.kill_ingress()
    go.touch()
    assert {end_of(stream) for stream in streams} <= {"[DONE]", "cut"}  # Serve does not tell which had how many
    assert_all_capacity_is_back(bench, "fine", pool)


def test_all_ingresses_that_are_killed_come_back_and_give_back_their_places(
    bench: RayBench, pool: ThreadPoolExecutor, go: Path
) -> None:
    wait_until(lambda: len(bench.ingresses()) == INGRESSES["ingress_min"], "both")
    streams = [begun_stream(bench, "fine", f"u{num}", go) for num in range(2 * CAPACITY)]
    for pid in bench.ingresses():
        os.kill(pid, signal.SIGKILL)
    assert {end_of(stream) for stream in streams} == {"cut"}
    wait_until(lambda: len(bench.ingresses()) == INGRESSES["ingress_min"], "their successors")
    assert_all_capacity_is_back(bench, "fine", pool)


def test_a_node_that_is_lost_is_written_off_and_another_takes_its_place(
    bench: RayBench, pool: ThreadPoolExecutor, go: Path
) -> None:
    stays = begun_stream(bench, "noisy", "stays", go)
    streams = [begun_stream(bench, "fine", f"u{num}", go) for num in range(2 * CAPACITY)]
    (gone,) = set(NODES) - bench.nodes_of("noisy")
    expected = ends_expected(bench, gone)
    engines = pids_on(bench, gone)
    bench.kill_node(gone)
    wait_until(lambda: not any(map(is_alive, engines)), "its engines' end")
    go.touch()
    ends = {end_of(stream) for stream in streams}
    assert ends & {"engine_failed", "cut"}
    assert ends <= expected | {"cut"}, "cut: of an ingress that was there, too"
    assert end_of(stays) in ("[DONE]", "cut")
    assert bench.router.post("fine").status == 200
    bench.wait_for_nodes(*bench.nodes)
    bench.add_node("c")
    bench.wait_for_nodes(*bench.nodes)
    bench.assert_nothing_is_held_twice()
    assert_all_capacity_is_back(bench, "fine", pool)
