"""A router that is told to stop while it serves: what runs may end within the time for it, and is told after that."""

from __future__ import annotations

import signal
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.router_process import is_alive, running_router, write_config
from tests.support.waiting import wait_until


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_streams_that_run_end_whole_and_nobody_new_is_let_in(tmp_path: Path) -> None:
    write_config(tmp_path, "fine")
    with running_router(tmp_path) as router:
        stream = router.streaming("fine", user="me", fake={"events": 30, "pace_s": 0.05})
        first = stream.event()
        router.process.send_signal(signal.SIGTERM)
        *rest, usage, done = stream.rest()
        assert [event["choices"][0]["text"] for event in (first, *rest)] == [f"me/{number} " for number in range(30)]
        assert (usage["usage"]["completion_tokens"], done) == (30, "[DONE]")
        wait_until(lambda: router.process.poll() is not None, "the router to end")
        assert router.process.returncode == 0
        assert not is_alive(first["pid"])
        with pytest.raises(urllib.error.URLError):
            router.post("fine")
        assert "Traceback" not in router.log


def test_what_does_not_end_in_time_is_told_so(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """A stream gets an error event and a proper end; who waits for an engine, or for its answer, gets 503."""
    write_config(tmp_path, "fine", "hangs")
    with running_router(tmp_path, agent={"stop_s": 5.5}, ingress={"drain_s": 1}) as router:
        stream = router.streaming("fine", user="me", fake={"stalls_after": 1})
        first = stream.event()
        waiting = [
            router.post_later(pool, "fine", user="plain", fake={"waits_for": "/nowhere"}),
            router.post_later(pool, "hangs"),
        ]
        wait_until(lambda: "waits plain" in router.said_by_engines() and router.pids("hangs"), "both to wait")
        router.process.send_signal(signal.SIGTERM)
        (last,) = stream.rest()
        assert last["error"]["code"] == "stopping"
        for one in waiting:
            answer = one.result()
            assert (answer.status, answer.body["error"]["code"]) == (503, "stopping")
            assert int(answer.headers["retry-after"]) >= 1
        wait_until(lambda: router.process.poll() is not None, "the router to end")
        assert router.process.returncode == 0
        assert not is_alive(first["pid"])
        assert "Traceback" not in router.log
