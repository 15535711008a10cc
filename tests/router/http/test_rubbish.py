"""Requests that hypothesis makes, against a real ingress: whatever comes, it is never the router that fails."""

from __future__ import annotations

import asyncio
import json

import hypothesis
from hypothesis import strategies as st

from sllm_vllm.router.http.openapi import openapi_document
from tests.support.fake_gate import MODELS, FakeGate, Served, running_engine, serving
from tests.support.waiting import DEADLINE_S

FUZZ_EXAMPLES = 300

PATHS = st.sampled_from([*openapi_document()["paths"], "/", "/v1/x", "*", "http://x/v1/score"]) | st.text(
    st.characters(codec="latin-1", exclude_characters=" \r\n\t"), max_size=30
)
BODIES = st.binary(max_size=100) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(MODELS),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["model", "stream", "prompt"]) | st.text(), inner),
    max_leaves=10,
).map(lambda value: json.dumps(value).encode())
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["authorization", "content-type", "x-request-id", "content-encoding", "origin", "x-any", "te"]),
        st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=40),
    ),
    max_size=5,
)


async def first_status(served: Served, data: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(data)
    async with asyncio.timeout(DEADLINE_S):
        line = await reader.readline()
    writer.close()
    return int(line.split()[1])


async def test_rubbish_never_makes_it_fail() -> None:
    """Hypothesis makes the requests; a loop of its own would cost a server for each."""
    requests: list[bytes] = []

    @hypothesis.settings(max_examples=FUZZ_EXAMPLES, database=None, deadline=None)
    @hypothesis.given(st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "PUT"]), PATHS, BODIES, HEADERS)
    def collect(method: str, path: str, body: bytes, headers: list[tuple[str, str]]) -> None:
        lines = [f"{method} {path} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in headers)]
        lines += ["connection: close", f"content-length: {len(body)}", "", ""]
        requests.append("\r\n".join(lines).encode("latin-1") + body)

    collect()
    with running_engine() as engine:
        async with serving(FakeGate([("a", engine.url)])) as served:
            statuses = {data: await first_status(served, data) for data in requests}
    assert {data: status for data, status in statuses.items() if status >= 500} == {}
    assert len(set(statuses.values())) > 3
