"""A request that kills its engine beside twelve streams on two real engines: one engine ends, no stream differs."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ModelDir
from tests.e2e.resume_cases import CARRYING, CASES, Case, completion
from tests.e2e.resumed import COMPLETIONS, Answer, Client
from tests.e2e.test_migration_exact import differs
from tests.e2e.test_resume_exact import with_marks
from tests.e2e.test_router_faults import START_MAX_S
from tests.e2e.test_router_moves import expect_no_port
from tests.support.router_process import RouterUnderTest, running_router, write_config
from tests.support.vllm_server import SERVER_ENVIRONMENT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.e2e_long

NUM_TOKENS = 400
POISON = [7, 7, 7, 7]
NAMES = (
    *("greedy", "seed", "seed-top-p-top-k", "penalties-and-seed", "stop-string-never", "bad-words"),
    *("n", "chat", "json-schema", "chat-tool-parsed", "logprobs"),
)
UNSEEDED = "unseeded"
_PLUGIN = f"""
import os, time

def register():
    from vllm.v1.engine.core import EngineCore
    stock = EngineCore.step

    def step(self):
        time.sleep(0.03)
        if any(list(one.prompt_token_ids or ())[:4] == {POISON} for one in self.scheduler.requests.values()):
            os._exit(77)
        return stock(self)

    EngineCore.step = step
"""


def write_plugin(directory: Path) -> Path:
    """One of vLLM's that is slow, and dies of a prompt; returns what belongs on PYTHONPATH."""
    information = directory / "poisoned_engine-1.0.dist-info"
    information.mkdir(parents=True)
    (directory / "poisoned_engine.py").write_text(_PLUGIN)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: poisoned-engine\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[vllm.general_plugins]\npoisoned = poisoned_engine:register\n")
    return directory


@pytest.fixture
def router(model_dir: ModelDir, tmp_path: Path) -> Iterator[RouterUnderTest]:
    """Two engines of one model on two slots."""
    arguments = {
        "enforce-eager": True,
        "max-model-len": 1024,
        "block-size": 32,
        "max-num-seqs": 16,
        "dtype": "float32",
        "reasoning-parser": "deepseek_r1",
        "tool-call-parser": "hermes",
        "enable-auto-tool-choice": True,
    }
    source = with_marks(model_dir("llama", dtype="float32"), tmp_path / "model")
    one = {"name": "m", "source": str(source), "keep_alive": 3600, "max_replicas": 2}
    sections: dict[str, Any] = {
        "node": {"slots": 2, "kv_memory": "64MiB", "node_dir": "./node"},
        "defaults": {"engine_arguments": arguments, "queue_timeout": START_MAX_S},
    }
    write_config(tmp_path, **sections, models=[one])
    variables = {**SERVER_ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    del variables["VLLM_CPU_KVCACHE_SPACE"]  # the agent's own share counts
    variables["PYTHONPATH"] = str(write_plugin(tmp_path / "plugin"))
    with running_router(tmp_path, environment=variables) as running:
        running.answer_s_max = START_MAX_S
        wait_until(lambda: "event=warm_parent_ready" in running.log, "the warm parent")
        write_config(tmp_path, **sections, models=[{**one, "min_replicas": 2}])
        assert running.admin("reload", "POST").status == 200
        wait_until(lambda: movable(running) == 2, "two engines that take over requests")
        yield running


def movable(router: RouterUnderTest) -> int:
    return sum(one["is_movable"] for one in router.admin("replicas").body["replicas"])


def cases() -> dict[str, Case]:
    """Long ones: an engine is to die before they end."""
    known = {**CASES, **CARRYING, UNSEEDED: completion(temperature=1.0)}
    return {
        name: (path, {**body, "max_tokens": NUM_TOKENS}) for name, (path, body) in known.items() if name in chosen()
    }


def chosen() -> tuple[str, ...]:
    return (*NAMES, UNSEEDED)


def ask_all(client: Client, pool: ThreadPoolExecutor, on_begun: Callable[[], None]) -> dict[str, Answer]:
    """All at once; ``on_begun`` is called when each has some tokens, in a thread of its own."""
    begun = dict.fromkeys(chosen(), False)

    def ask(name: str, path: str, body: dict[str, Any]) -> Answer:
        answer = Answer()
        for found in client.chunks(path, {**body, "stream": True}):
            answer.add(found)
            begun[name] = begun[name] or sum(map(len, answer.token_ids)) > 8
        return answer

    asked: dict[str, Future[Answer]] = {
        name: pool.submit(ask, name, path, body) for name, (path, body) in cases().items()
    }
    wait_until(lambda: all(begun.values()), "all streams to have begun")
    on_begun()
    return {name: one.result() for name, one in asked.items()}


def poisoned(client: Client) -> tuple[int, dict[str, Any], str]:
    """Status, error and Retry-After of the request that engines die of."""
    try:
        client.ask(COMPLETIONS, {"prompt": POISON, "max_tokens": 4})
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"], error.headers["retry-after"]
    raise AssertionError("no engine died")


def test_a_poison_beside_twelve_streams_ends_one_engine_and_no_stream(router: RouterUnderTest) -> None:
    client = Client(router.url, "m")
    for engine in router.admin("replicas").body["replicas"]:
        expect_no_port(router, engine["id"])
    refusals: list[tuple[int, dict[str, Any], str]] = []
    assert len(cases()) == 12
    with ThreadPoolExecutor(16) as pool:
        whole = ask_all(client, pool, lambda: None)
        moved = ask_all(client, pool, lambda: refusals.append(poisoned(client)))
    assert [(status, error["code"]) for status, error, _ in refusals] == [(502, "request_killed_engine")]
    problems = {name: differs(whole[name], moved[name]) for name in NAMES}
    assert {name: problem for name, problem in problems.items() if problem} == {}
    assert len(moved[UNSEEDED].token_ids[0]) == NUM_TOKENS
    wait_until(lambda: router.log.count("attempts=2") >= 4, "the lines of the streams of the engine that died")
    status, error, retry_after = poisoned(client)
    assert (status, error["code"]) == (502, "request_killed_engine")
    assert 0 < int(retry_after) <= 600
    wait_until(lambda: movable(router) == 2, "another engine")
    assert router.log.count("event=start ") == 3
