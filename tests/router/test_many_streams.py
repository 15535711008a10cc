"""Hundreds of clients that stream at once through the whole router; the benchmark has a thousand, for a minute."""

from __future__ import annotations

from pathlib import Path

from benchmarks.router.streams import MODEL, Plan, limits_of, problem_of, stream_all
from sllm_vllm.router.engine_client.connection import IDLE_MAX
from tests.support.cases import every_case
from tests.support.router_process import running_router, write_config
from tests.support.waiting import wait_until

MIB = 1 << 20
PLAN = Plan(clients=200, seconds=3.0, events=10, pace_s=0.1, warm_up=2)
WHOLE = (
    'data: {"choices": [{"text": "a/0 "}]}\n\ndata: {"choices": [{"text": "a/1 "}]}\n\n'
    'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n'
)


async def test_two_hundred_streams_at_once_are_whole_and_their_own(tmp_path: Path) -> None:
    write_config(tmp_path, MODEL, defaults=limits_of(PLAN.clients))
    with running_router(tmp_path) as router:
        descriptors = router.num_descriptors()
        tally = await stream_all(router.address, router.process.pid, PLAN)
        assert tally.problems == []
        assert tally.streams >= 3 * PLAN.clients
        assert tally.events == tally.streams * PLAN.events
        assert max(tally.open) == PLAN.clients
        assert max(tally.memory) - tally.memory[0] < 64 * MIB
        wait_until(lambda: router.num_ongoing() == 0, "all places to be free")
        wait_until(lambda: router.num_descriptors() <= descriptors + IDLE_MAX, "the clients' connections to be closed")
        assert "Traceback" not in router.log


@every_case(
    "data, problem",
    [
        (WHOLE, ""),
        (WHOLE.replace("a/1", "b/1"), "'b/1 '"),
        (WHOLE.replace("a/0", "a/1").replace("a/1", "a/0"), "'a/0 '"),
        (WHOLE.partition("\n\n")[2], "1 of 2 events"),
        (WHOLE.partition("\n\n")[0] + "\n\n" + WHOLE, "3 of 2 events"),
        (WHOLE.replace("data: [DONE]\n\n", ""), "1 of 2 events"),
        (WHOLE + "data: more", "its end"),
        ("", "0 of 2 events"),
    ],
)
def test_what_is_wrong_with_a_stream_is_found(data: str, problem: str) -> None:
    found = problem_of(data.encode(), "a", 2)
    assert (problem in found) if problem else found == ""
