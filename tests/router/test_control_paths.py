"""What an engine would do for whoever runs it is never done for a client, not even if the body names a model."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from sllm_vllm.router.config.settings import IngressSettings
from tests.support.cases import every_case
from tests.support.fake_gate import EngineProcess, FakeGate, Served, running_engine, serving

CONTROLS = (
    "/abort_requests",
    "/collective_rpc",
    "/fault_tolerance/apply",
    "/finish_weight_update",
    "/inference/v1/generate",
    "/init_weight_transfer_engine",
    "/invocations",
    "/is_scaling_elastic_ep",
    "/pause",
    "/ping",
    "/release_kv_cache_memory",
    "/reset_encoder_cache",
    "/reset_mm_cache",
    "/reset_prefix_cache",
    "/resume",
    "/scale_elastic_ep",
    "/shutdown",
    "/shutdown_weight_transfer_engine",
    "/sleep",
    "/start_draft_weight_update",
    "/start_profile",
    "/start_weight_update",
    "/stop_profile",
    "/update_weight_version",
    "/update_weights",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/wake_up",
    "/weight_checker",
)
"""Of vLLM 0.32; the test below tells if another version has more."""
FORWARDED = (
    "/classify",
    "/cohere/v2/chat",
    "/cohere/v2/chat/render",
    "/detokenize",
    "/generative_scoring",
    "/pooling",
    "/rerank",
    "/score",
    "/tokenize",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/derender",
    "/v1/chat/completions/render",
    "/v1/completions",
    "/v1/completions/derender",
    "/v1/completions/render",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/messages/render",
    "/v1/rerank",
    "/v1/responses",
    "/v1/responses/render",
    "/v1/score",
    "/v1/systemone",
    "/v2/embed",
    "/v2/rerank",
)
WITHOUT_MODEL = ("/v1/responses/{response_id}/cancel",)
"""It names none, so there is nobody to send it to."""
_ROUTE = re.compile(r"@\w+\.(?:post|put|patch|delete|api_route)\(\s*\"([^\"]+)\"")


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with running_engine() as engine:
        yield engine


@pytest.fixture
async def served(engine: EngineProcess) -> AsyncIterator[Served]:
    async with serving(FakeGate([(engine.name, engine.url)]), IngressSettings(drain_s=1)) as served:
        yield served


def spellings(path: str) -> Iterator[str]:
    yield path
    yield f"{path}/"
    yield f"{path}?model=other"
    yield f"/{path}"
    yield f"/v1/..{path}"
    yield f"/v1/.{path}"
    yield f"/%2F{path[1:]}"
    yield f"{path[:-1]}%{ord(path[-1]):02x}"


@every_case("path", CONTROLS)
async def test_a_control_is_not_there(served: Served, engine: EngineProcess, path: str) -> None:
    for spelt in spellings(path):
        answer = await served.post({"model": "other"}, spelt)
        assert answer.status in {400, 404}, spelt
    assert (await served.post({"model": "other"}, path)).error["code"] == "not_found"
    assert served.gate.facts == []


@pytest.mark.parametrize("path", FORWARDED)
async def test_whatever_names_a_model_is_sent_to_it(served: Served, path: str) -> None:
    await served.post({"model": "other", "prompt": "hello"}, path)
    assert [facts.model for facts in served.gate.facts] == ["other"]


def test_every_order_of_the_installed_vllm_is_known_here() -> None:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    sources = Path(spec.origin).parent.joinpath("entrypoints").rglob("*.py")
    routes = {route for source in sources for route in _ROUTE.findall(source.read_text())}
    assert len(routes) > 30
    assert routes - {*CONTROLS, *FORWARDED, *WITHOUT_MODEL} == set()
