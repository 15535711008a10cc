"""Engines that die, hang or freeze while the whole router serves: what clients see, and that capacity comes back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.node.protocol import ReplicaReport
from sllm_vllm.router.engines import reason_of
from tests.support.router_process import RouterUnderTest, is_alive, running_router, write_config
from tests.support.store_checkpoints import make_checkpoint
from tests.support.store_daemon import store_daemon
from tests.support.waiting import wait_until

SOON = {"start_s": 5.5, "stop_s": 5.5, "health_s": 0.6}
"""Of an agent: as short as it takes them; an engine on a busy machine may still miss two answers."""
FAILED = ReplicaReport(
    id="m-1",
    model="m",
    state="failed",
    reason="exited with status 1",
    slots=(),
    pid=None,
    status=1,
    port=None,
    url=None,
    api_key=None,
    age_s=1.0,
    in_state_s=0.0,
    start=None,
    log="",
    tail=("Traceback (most recent call last):", "  For further information visit https://x", ""),
)
CAPACITY = 4
"""Requests at once."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2 * CAPACITY) as threads:
        yield threads


def assert_all_places_are_free(router: RouterUnderTest) -> None:
    wait_until(lambda: router.num_ongoing() == 0, "the places to be free")


def assert_all_capacity_is_back(router: RouterUnderTest, model: str, pool: ThreadPoolExecutor) -> None:
    """As many streams as may be at once all begin: a place that was lost would leave one of them in the queue."""
    assert_all_places_are_free(router)
    stuck = {"fake": {"stalls_after": 1}, "user": "full"}
    streams = list(pool.map(lambda _: router.streaming(model, **stuck), range(CAPACITY)))
    assert [stream.event()["choices"][0]["text"] for stream in streams] == ["full/0 "] * CAPACITY
    assert router.num_ongoing() == CAPACITY
    for stream in streams:
        stream.close()


def test_of_an_engine_that_is_killed_streams_are_told_and_the_unanswered_get_another(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    go = tmp_path / "go"
    write_config(tmp_path, "fine", defaults={"ongoing_max": CAPACITY, "target_ongoing": CAPACITY})
    with running_router(tmp_path) as router:
        stream = router.streaming("fine", user="me", fake={"stalls_after": 2})
        begun = [stream.event() for _ in range(2)]
        wish = {"user": "plain", "fake": {"waits_for": str(go)}}
        plain = [router.post_later(pool, "fine", **wish) for _ in range(CAPACITY - 1)]
        wait_until(lambda: router.said_by_engines().count("waits plain") == len(plain), "all to be in the engine")
        os.kill(begun[0]["pid"], signal.SIGKILL)
        go.touch()

        (last,) = stream.rest()
        assert [event["choices"][0]["text"] for event in begun] == ["me/0 ", "me/1 "]
        assert last["error"].keys() == {"message", "type", "param", "code"}
        assert last["error"]["code"] == "engine_failed"
        answers = [one.result() for one in plain]
        assert [answer.status for answer in answers] == [200] * len(plain)
        assert begun[0]["pid"] not in {answer.body["pid"] for answer in answers}
        assert router.log.count("event=start ") == 2
        wait_until(lambda: router.log.count("status=200 outcome=done") == len(plain), "the lines of the requests")
        assert router.log.count("attempts=2") == len(plain)
        assert_all_capacity_is_back(router, "fine", pool)


def test_a_request_that_kills_its_engine_costs_one_and_is_refused_when_it_comes_again(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    write_config(tmp_path, "fine")
    with running_router(tmp_path) as router:
        poison: dict[str, Any] = {"user": "poison", "fake": {"waits_for": "/nowhere"}}
        dying = router.post_later(pool, "fine", **poison)
        kill_who_has(router, "waits poison", 1)
        answer = dying.result()
        assert (answer.status, answer.body["error"]["code"]) == (502, "request_killed_engine")
        assert "signal 9" in answer.body["error"]["message"]
        again = router.post("fine", **poison)
        assert (again.status, again.body["error"]["code"]) == (502, "request_killed_engine")
        assert 590 <= int(again.headers["retry-after"]) <= 600
        assert router.post("fine").status == 200
        assert router.log.count("event=start ") == 2


def test_a_request_that_kills_its_engine_is_found_among_others_that_had_nothing_yet(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """Each is asked again, alone; so one more engine is lost, and no answer but the killer's."""
    go = tmp_path / "go"
    write_config(tmp_path, "fine", defaults={"ongoing_max": CAPACITY, "target_ongoing": CAPACITY})
    with running_router(tmp_path) as router:
        others = [
            router.post_later(pool, "fine", user=f"plain{num}", fake={"waits_for": str(go)})
            for num in range(CAPACITY - 1)
        ]
        wait_until(
            lambda: router.said_by_engines().count("waits plain") == len(others), "the others to be in the engine"
        )
        dying = router.post_later(pool, "fine", user="poison", fake={"waits_for": "/nowhere"})
        kill_who_has(router, "waits poison", 1)
        go.touch()
        kill_who_has(router, "waits poison", 2)
        assert (dying.result().status, dying.result().body["error"]["code"]) == (502, "request_killed_engine")
        assert [one.result().status for one in others] == [200] * len(others)
        assert router.log.count("event=start ") <= 3
        assert_all_capacity_is_back(router, "fine", pool)


def test_a_start_that_hangs_is_ended_and_made_again_for_who_waits(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    go = tmp_path / "go"
    write_config(tmp_path, "late", defaults={"environment": {"FAKE_ENGINE_GO": str(go)}, "start_timeout": 6})
    with running_router(tmp_path, agent=SOON) as router:
        waiting = router.post_later(pool, "late")
        wait_until(lambda: router.pids("late"), "it to start")
        (first,) = router.pids("late")
        wait_until(lambda: "not healthy within 6 s" in router.log, "its time to be over")
        wait_until(lambda: not is_alive(first), "its end")
        go.touch()
        answer = waiting.result()
        assert (answer.status, answer.body["pid"] == first) == (200, False)
        assert_all_places_are_free(router)


@pytest.mark.parametrize("how", ["stopped", "freezes"])
def test_an_engine_that_freezes_is_replaced_and_who_waited_is_answered(
    tmp_path: Path, pool: ThreadPoolExecutor, how: str
) -> None:
    """Stopped by a signal it does not heed SIGTERM either; one that accepts nothing more does."""
    go = tmp_path / "go"
    write_config(tmp_path, "freezes", defaults={"ongoing_max": CAPACITY, "target_ongoing": CAPACITY})
    with running_router(tmp_path, agent=SOON) as router:
        stream = router.streaming("freezes", user="me", fake={"stalls_after": 1})
        begun = stream.event()
        wish = {"user": "plain", "fake": {"waits_for": str(go)}}
        plain = [router.post_later(pool, "freezes", **wish) for _ in range(CAPACITY - 1)]
        wait_until(lambda: router.said_by_engines().count("waits plain") == len(plain), "all to be in the engine")
        queued = [router.post_later(pool, "freezes") for _ in range(CAPACITY)]
        if how == "stopped":
            os.kill(begun["pid"], signal.SIGSTOP)
        else:
            router.ask_engine("/freeze", post=True)
        wait_until(lambda: "hung: 3 health answers missed" in router.log, "it to be found hung")
        go.touch()
        (last,) = stream.rest()
        assert last["error"]["code"] == "engine_failed"
        answers = [one.result() for one in (*plain, *queued)]
        assert [answer.status for answer in answers] == [200] * len(answers)
        assert begun["pid"] not in {answer.body["pid"] for answer in answers}
        wait_until(lambda: not is_alive(begun["pid"]), "its end")
        assert_all_capacity_is_back(router, "freezes", pool)


def test_without_its_store_the_router_serves_and_says_so(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """First the store's daemon stands still, which nobody may wait for; then it is gone."""
    make_checkpoint(tmp_path / "store", "/models/fine")
    with store_daemon(tmp_path / "store", log_dir=tmp_path) as store:
        write_config(tmp_path, "fine", "family", "turns-ill", slots=3)
        with running_router(tmp_path) as router:
            assert router.admin("stores").body["stores"][0]["problem"] == ""
            os.kill(store.process.pid, signal.SIGSTOP)
            assert router.post("fine").status == 200
            store.kill()
            wait_until(lambda: router.admin("stores").body["stores"][0]["problem"], "the loss to be known")
            names = [one["name"] for one in router.admin("stores").body["stores"][0]["checkpoints"]]
            assert len(names) == 1  # it lies on the disk
            assert [router.post(model).status for model in ("fine", "family", "turns-ill")] == [200] * 3
            assert "Traceback" not in router.log


def kill_who_has(router: RouterUnderTest, said: str, num: int) -> None:
    """Kill the only engine once its kind has said something so many times."""
    wait_until(lambda: router.said_by_engines().count(said) == num, "an engine to have it")
    (pid,) = router.pids("fine")
    os.kill(pid, signal.SIGKILL)


def test_the_reason_of_an_end_is_the_exception_and_the_last_line() -> None:
    cause = "ModuleNotFoundError: No module named 'torchvision'"
    last = "For further information visit https://x"
    assert reason_of(FAILED) == f"exited with status 1: {last}"
    told = reason_of(FAILED.model_copy(update={"cause": cause}))
    assert told == f"exited with status 1: {cause} (its last line: {last})"
    told = reason_of(FAILED.model_copy(update={"cause": cause, "tail": (f"(Worker pid=1) {cause}",)}))
    assert told == f"exited with status 1: {cause}"
    assert reason_of(FAILED.model_copy(update={"tail": ()})) == "exited with status 1"


def test_the_last_line_of_a_killed_engine_is_no_reason() -> None:
    assert reason_of(FAILED.model_copy(update={"status": -9, "reason": "ended by signal 9"})) == "ended by signal 9"
