"""The limits of a configuration, in the router's own process: who is refused how, and what a reload changes."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support.fake_engine import MAX_MODEL_LEN
from tests.support.router_process import Answer, RouterUnderTest, running_router, write_config
from tests.support.waiting import DEADLINE_S, wait_until


def waiting(router: RouterUnderTest, model: str) -> int:
    """How many of its requests wait, as an operator sees it."""
    answer = router.admin(f"models/{model}")
    assert answer.status == 200
    num: int = answer.body["waiting"]
    return num


def told(answer: Answer) -> tuple[int, str, bool]:
    """Status, code, and whether it says when to come again."""
    return answer.status, answer.body["error"]["code"], int(answer.headers.get("retry-after", "0")) >= 1


def config(directory: Path, waiting_max: int, **defaults: Any) -> None:
    server = {"port": 0, "waiting_max": waiting_max}
    write_config(directory, "hangs", "fine", slots=1, server=server, defaults={"queue_timeout": 4, **defaults})


def test_a_models_queue_is_full_and_whoever_waits_too_long_is_told(tmp_path: Path) -> None:
    config(tmp_path, 100, queue_max=1)
    with running_router(tmp_path) as router, ThreadPoolExecutor(1) as pool:
        first = router.post_later(pool, "hangs")
        wait_until(lambda: waiting(router, "hangs") == 1, "the first to wait")
        assert told(router.post("hangs")) == (429, "queue_full", True)
        assert told(first.result(DEADLINE_S)) == (503, "no_capacity", True)


def test_the_routers_queue_is_full_and_a_reload_makes_it_longer(tmp_path: Path) -> None:
    config(tmp_path, 1, queue_timeout=600)
    with ThreadPoolExecutor(2) as pool, running_router(tmp_path) as router:
        first = router.post_later(pool, "hangs")
        wait_until(lambda: waiting(router, "hangs") == 1, "the first to wait")
        refused = router.post("fine")
        assert told(refused) == (429, "queue_full", True)
        assert "all models" in refused.body["error"]["message"]
        config(tmp_path, 2, queue_timeout=600)
        assert router.admin("reload", "POST").status == 200
        second = router.post_later(pool, "fine")
        wait_until(lambda: waiting(router, "fine") == 1, "the second to wait beside the first")
        assert router.admin("models/hangs", "DELETE").status == 200
        assert (first.result(DEADLINE_S).status, second.result(DEADLINE_S).status) == (404, 200)


def test_the_list_of_models_has_the_length_that_the_engine_says(tmp_path: Path) -> None:
    write_config(tmp_path, "fine")

    def length(router: RouterUnderTest) -> object:
        with urllib.request.urlopen(f"{router.url}/v1/models/fine", timeout=DEADLINE_S) as answer:
            card = json.load(answer)
        assert card["root"] == "fine"  # and not where it is
        return card["max_model_len"]

    with running_router(tmp_path) as router:
        assert length(router) is None
        assert router.post("fine").status == 200
        wait_until(lambda: length(router) == MAX_MODEL_LEN, "the length")


def test_a_drained_node_starts_nothing_until_it_is_undrained(tmp_path: Path) -> None:
    write_config(tmp_path, "fine", slots=1)
    with running_router(tmp_path) as router, ThreadPoolExecutor(1) as pool:
        assert router.post("fine").status == 200
        assert router.admin("nodes/local/drain", "POST").body["is_drained"] is True
        wait_until(lambda: not router.pids("fine"), "its engine's end")
        later = router.post_later(pool, "fine")
        wait_until(lambda: waiting(router, "fine") == 1, "a request to wait")
        assert router.log.count("event=start ") == 1
        assert router.admin("nodes").body["nodes"][0]["is_drained"] is True
        assert router.admin("nodes/local/undrain", "POST").status == 200
        assert later.result(DEADLINE_S).status == 200
        assert router.log.count("event=start ") == 2
