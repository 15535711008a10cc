"""Ten thousand models: what their configuration, their start and a reload cost, and how long the loop stands still.

Bounds are five times those of a quiet machine; processor time is measured, so that other processes change little.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from benchmarks.router.many_models import watched, works_of, write_models
from sllm_vllm.router import controller as controller_module
from sllm_vllm.router.config.file import compare, parse_router_config
from sllm_vllm.router.config.sections import RouterConfig
from sllm_vllm.router.config.text import parse_yaml
from sllm_vllm.router.controller import Controller
from sllm_vllm.router.core.events import ModelDeployed, RequestArrived
from sllm_vllm.router.core.facts import ModelSpec, RequestFacts
from sllm_vllm.router.core.model_state import Request
from sllm_vllm.router.core.router import RouterCore
from sllm_vllm.router.gate import ServedModel
from tests.support.router_process import running_router

NUM_MODELS = 10_000
START_S_MAX = 25.0
PAUSE_S_MAX = 0.25
TRIES_MAX = 3

Result = TypeVar("Result")


def config_of(num_models: int, *, max_len: int = 512) -> RouterConfig:
    lines = [
        f"- {{name: org/m{number}, source: org/m{number}, engine_arguments: {{max-model-len: {max_len}}}}}"
        for number in range(num_models)
    ]
    return parse_router_config(parse_yaml("\n".join(["models:", *lines])).require_valid())


async def longest_pause_s(work: Awaitable[Result]) -> tuple[Result, float]:
    """The most processor time of this loop between two of its rounds while something is done."""
    pause_s = 0.0

    async def beat() -> None:
        nonlocal pause_s
        while True:
            begin_s = time.thread_time()
            await asyncio.sleep(0)
            pause_s = max(pause_s, time.thread_time() - begin_s)

    beating = asyncio.get_running_loop().create_task(beat())
    await asyncio.sleep(0)
    result = await work
    beating.cancel()
    return result, pause_s


async def test_ten_thousand_models_start_and_reload_without_a_pause(tmp_path: Path) -> None:
    begin_s = time.process_time()
    config = config_of(NUM_MODELS)
    controller = Controller(waiting_max=10, directory=tmp_path)
    await controller.start()
    await controller.measure(config.models)
    _, pause_s = await longest_pause_s(controller.change_models((), config.models))
    assert time.process_time() - begin_s < START_S_MAX
    assert pause_s < PAUSE_S_MAX
    assert [one.name for one in controller.served()] == [one.name for one in config.models]
    new = await asyncio.to_thread(config_of, NUM_MODELS - 1000, max_len=256)
    changes = await asyncio.to_thread(compare, config, new)
    _, pause_s = await longest_pause_s(controller.change_models(changes.removed, changes.restarted))
    assert pause_s < PAUSE_S_MAX
    assert len(controller.served()) == len(controller.core.models) == NUM_MODELS - 1000
    await controller.close()


async def test_each_deployed_model_is_listed_once_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_listed = 0

    def listed(name: str, created_unix_s: int, root: str, max_model_len: int | None) -> ServedModel:
        nonlocal num_listed
        num_listed += 1
        return ServedModel(name, created_unix_s, root, max_model_len)

    monkeypatch.setattr(controller_module, "ServedModel", listed)
    controller = Controller(waiting_max=10, directory=tmp_path)
    config = config_of(300)
    for model in config.models:
        controller.deploy(model)
        assert controller.served()[-1].name == model.name
    assert num_listed == 300
    assert controller.served() is controller.served()
    for model in config.models:
        controller.delete(model.name)
    assert num_listed == 300
    assert controller.served() == ()


class CountedRequests(dict[str, Request]):
    """Counts how often all of them are looked at."""

    num_looks = 0

    def values(self) -> Iterator[Request]:  # type: ignore[override]
        self.num_looks += 1
        return iter(list(super().values()))


def test_a_deployed_model_does_not_look_at_other_models_requests() -> None:
    core = RouterCore()
    core.handle(ModelDeployed(ModelSpec("a")), 0.0)
    for number in range(5):
        core.handle(RequestArrived(RequestFacts(f"r{number}", "a")), 0.0)
    requests = CountedRequests(core.requests)
    core.deployments._requests = requests
    for number in range(100):
        core.handle(ModelDeployed(ModelSpec(f"m{number}")), 0.0)
    assert requests.num_looks == 0


def test_a_router_with_ten_thousand_models_answers_others_while_it_reloads_and_lists_them(tmp_path: Path) -> None:
    """Pauses are measured from outside, in processor time of the router: see the benchmark."""
    write_models(tmp_path, NUM_MODELS)
    with running_router(tmp_path) as router, watched(router) as during:
        works = works_of(router, NUM_MODELS)
        for name in ("reload, 10 % changed", "GET /sllm/v1/models", "GET /v1/models", "GET /metrics"):
            for version in range(1, TRIES_MAX + 1):
                phase = during(name, partial(works[name], version))
                if phase.busy_s < PAUSE_S_MAX:
                    break
            else:
                pytest.fail(f"a pause, the best of {TRIES_MAX}: {phase}")
