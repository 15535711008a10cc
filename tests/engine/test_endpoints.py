"""Our routes: behind the engine's key, with infinities in their JSON, and honest about an engine that can't resume."""

from __future__ import annotations

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from sllm_vllm.engine.endpoints import SllmEndpoints, _respond
from sllm_vllm.engine.hook_points import HookPoints
from sllm_vllm.engine.self_test import why_unable
from tests.support.cases import every_case
from tests.support.waiting import DEADLINE_S


class App:
    """Stands in for FastAPI: keeps the routes."""

    def __init__(self) -> None:
        self.routes: dict[str, Any] = {}

    def add_middleware(self, kind: Any, **arguments: Any) -> None:
        self.middleware = (kind, arguments)

    def add_route(self, path: str, answer: Any, methods: list[str]) -> None:
        assert methods == ["GET"]
        self.routes[path] = answer


class Engine:
    """Stands in for AsyncLLM: no requests, and hooks that are missing."""

    _client_count = 1

    def __init__(self) -> None:
        self.sllm_points = HookPoints()
        self.output_processor = SimpleNamespace(request_states={})
        cache, model = SimpleNamespace(block_size=16), SimpleNamespace(max_model_len=64, model="m")
        self.vllm_config = SimpleNamespace(
            cache_config=cache,
            model_config=model,
            speculative_config=None,
            kv_transfer_config=None,
        )
        self.engine_core = SimpleNamespace(call_utility_async=self._call)

    async def _call(self, name: str) -> list[str]:
        raise AttributeError(name)


@pytest.fixture
def endpoints() -> Any:
    made = SllmEndpoints()
    yield made
    REGISTRY.unregister(made._supported)


async def ask(endpoints: SllmEndpoints, path: str, authorization: str = "", **params: str) -> tuple[int, Any]:
    app = App()
    endpoints.attach_router(app)
    request = SimpleNamespace(headers={"authorization": authorization}, path_params=params)
    answer = await app.routes[path](request)
    return answer.status_code, json.loads(answer.body)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial begins as soon as nothing is in flight."""
    monkeypatch.setattr("sllm_vllm.engine.endpoints.QUIET_S", 0.0)


async def started(endpoints: SllmEndpoints, *keys: str) -> None:
    await endpoints.init_state(Engine(), None, SimpleNamespace(api_key=list(keys) or None))
    assert endpoints._trial is not None
    await asyncio.wait_for(endpoints._trial, DEADLINE_S)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("", 401),
        ("Bearer", 401),
        ("Bearer third", 401),
        ("Basic first", 401),
        ("Bearer first", 200),
        ("bearer second", 200),
    ],
)
async def test_every_route_wants_one_of_the_engines_keys(
    endpoints: SllmEndpoints, authorization: str, status: int
) -> None:
    await started(endpoints, "first", "second")
    for path in ("/sllm/state", "/sllm/requests"):
        assert (await ask(endpoints, path, authorization))[0] == status
    found, _ = await ask(endpoints, "/sllm/requests/{id}/tokens", authorization, id="unknown")
    assert found == (404 if status == 200 else 401)


async def test_an_engine_that_cant_resume_says_why_and_serves_on(
    endpoints: SllmEndpoints, caplog: pytest.LogCaptureFixture
) -> None:
    await started(endpoints)
    status, state = await ask(endpoints, "/sllm/state")
    assert (status, state["resume"]) == (200, False)
    assert "sllm_hook_problems" in state["reason"]
    assert endpoints._engine.sllm_points.problems == [state["reason"]]  # the answer to a body that asks anyway
    assert REGISTRY.get_sample_value("sllm_engine_resume_supported") == 0
    assert [record for record in caplog.records if "event=resume supported=false" in record.getMessage()]


@pytest.mark.parametrize("ends", [True, False])
async def test_the_trial_waits_for_a_quiet_moment_but_not_for_ever(
    endpoints: SllmEndpoints, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    clock = SimpleNamespace(now_s=0.0)

    async def at(now_s: float) -> None:
        """Set the clock, and let the trial look at it."""
        clock.now_s = now_s
        for _ in range(10):
            await asyncio.sleep(0)

    monkeypatch.setattr("sllm_vllm.engine.endpoints.time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr("sllm_vllm.engine.endpoints._LOOK_S", 0)
    monkeypatch.setattr("sllm_vllm.engine.endpoints.QUIET_S", 1.0)
    engine = Engine()
    engine.output_processor.request_states["r"] = "in flight"
    await endpoints.init_state(engine, None, SimpleNamespace(api_key=None))
    trial = endpoints._trial
    assert trial is not None
    for half_s in range(50):
        await at(half_s / 2)
        assert not trial.done()
    status, state = await ask(endpoints, "/sllm/state")
    assert (status, state["resume"], state["reason"]) == (200, None, "the trial has not ended")
    if ends:
        engine.output_processor.request_states.clear()
        await at(25.4)
        assert not trial.done()
        await at(25.5)
    else:
        for half_s in range(50, 61):
            assert not trial.done()
            await at(half_s / 2)
    await asyncio.wait_for(trial, DEADLINE_S)
    assert (await ask(endpoints, "/sllm/state"))[1]["resume"] is False


async def test_a_hook_that_is_missing_is_the_reason() -> None:
    engine = Engine()
    engine.sllm_points.problems.append("a module: there is no such function")
    assert await why_unable(engine) == "a module: there is no such function"


async def test_several_api_servers_are_the_reason() -> None:
    engine = Engine()
    engine._client_count = 2
    assert "several API servers" in await why_unable(engine)


@every_case("name, reason", [("speculative_config", "speculates"), ("kv_transfer_config", "KV")])
async def test_a_kind_of_engine_that_resumes_nothing_is_the_reason(name: str, reason: str) -> None:
    engine = Engine()
    setattr(engine.vllm_config, name, "set")
    assert reason in await why_unable(engine)


async def test_an_id_of_several_requests_is_a_conflict(endpoints: SllmEndpoints) -> None:
    await started(endpoints)
    states = [SimpleNamespace(request_id=id_, external_req_id="cmpl-a-0", parent_req=None) for id_ in "xy"]
    endpoints._engine.output_processor.request_states = {one.request_id: one for one in states}
    status, told = await ask(endpoints, "/sllm/requests/{id}/tokens", id="a")
    assert (status, told) == (409, {"error": "2 requests in flight have the id a"})


def test_infinities_go_through() -> None:
    assert json.loads(_respond({"logprob": -math.inf}, 200).body) == {"logprob": -math.inf}
