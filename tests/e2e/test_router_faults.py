"""The router over real vLLM whose warm parent and engines are killed while it serves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ModelDir
from tests.support.router_process import RouterUnderTest, is_alive, running_router, write_config
from tests.support.vllm_server import SERVER_ENVIRONMENT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.e2e_long

MODELS = ("llama", "opt")
START_MAX_S = 400.0
"""Of a request that a cold engine is started for, on a busy machine."""


@pytest.fixture
def router(model_dir: ModelDir, tmp_path: Path) -> Iterator[RouterUnderTest]:
    """One that forks its engines, on two slots; its warm parent is ready."""
    write_config(
        tmp_path,
        node={"slots": 2, "kv_memory": "64MiB", "node_dir": "./node"},
        defaults={
            "engine_arguments": {"enforce-eager": True, "max-model-len": 512},
            "keep_alive": 3600,
            "queue_timeout": START_MAX_S,
        },
        models=[{"name": name, "source": str(model_dir(name))} for name in MODELS],
    )
    variables = {**SERVER_ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    del variables["VLLM_CPU_KVCACHE_SPACE"]  # the agent's own share counts
    with running_router(tmp_path, environment=variables) as running:
        running.answer_s_max = START_MAX_S
        wait_until(lambda: "event=warm_parent_ready" in running.log, "the warm parent")
        yield running


def ask(router: RouterUnderTest, model: str) -> str:
    """What it says to a prompt that is always the same."""
    answer = router.post(model, max_tokens=16, temperature=0)
    assert answer.status == 200, answer
    text: str = answer.body["choices"][0]["text"]
    return text


def engine_of(router: RouterUnderTest, model: Path) -> int:
    """The only one's pid."""
    (one,) = (one for one in router.node.report().replicas if one.pid and one.model == str(model))
    assert one.pid is not None
    return one.pid


def test_a_warm_parent_that_is_killed_costs_no_request(router: RouterUnderTest, model_dir: ModelDir) -> None:
    said = ask(router, "llama")
    engine = engine_of(router, model_dir("llama"))
    parent = router.node.report().warm.pid
    assert parent is not None
    os.kill(parent, signal.SIGKILL)
    assert ask(router, "opt")  # at once: from a cold engine, or the next parent
    assert ask(router, "llama") == said
    assert engine_of(router, model_dir("llama")) == engine

    wait_until(lambda: router.node.report().warm.pid not in (None, parent), "another parent")
    os.kill(engine, signal.SIGKILL)
    wait_until(lambda: not is_alive(engine), "the engine's end")
    assert ask(router, "llama") == said
    starts = [one.start for one in router.node.report().timings if one.model == str(model_dir("llama"))]
    assert [start.is_warm for start in starts] == [True, True]


def test_a_stream_whose_only_engine_is_killed_goes_on_at_the_next_one(
    router: RouterUnderTest, model_dir: ModelDir
) -> None:
    said = ask(router, "llama")
    stream = router.streaming("llama", max_tokens=480, ignore_eos=True, return_token_ids=True)
    begun = [stream.event() for _ in range(3)]
    os.kill(engine_of(router, model_dir("llama")), signal.SIGKILL)
    *events, last = begun + stream.rest()
    assert last == "[DONE]"
    assert sum(len(event["choices"][0]["token_ids"]) for event in events) == 480
    assert ask(router, "llama") == said
    wait_until(lambda: router.num_ongoing() == 0, "all places to be free")
