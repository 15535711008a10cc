"""The router's overhead: what a stream must say is checked, figures are of the same round, nothing is left out."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.common.supervise import ROOT, Workspace
from benchmarks.common.vllm_server import HOST, free_port
from benchmarks.router.overhead import Outcome, Plan
from benchmarks.router.overhead_client import Client, Found, Load, Read, fault_of, read_events
from benchmarks.router.overhead_engine import MODEL, answer_of
from benchmarks.router.overhead_processes import Tree
from benchmarks.router.overhead_report import (
    DIRECT,
    OURS,
    OpenMemory,
    Sample,
    leads_of,
    percentile,
    rows_of,
    tables_of,
    verdicts_of,
)
from benchmarks.router.overhead_targets import PEERS, Peer, TargetFailed, ensure_peer
from tests.support.cases import every_case
from tests.support.waiting import wait_until

CHUNKS = 5


@pytest.fixture(scope="module")
def engine() -> Iterator[int]:
    """The port of a fake engine."""
    port = free_port()
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "router" / "overhead_engine.py"),
        "serve",
        "m",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command)
    try:
        wait_until(lambda: listens(port), "the engine")
        yield port
    finally:
        process.terminate()
        process.wait(30)


def listens(port: int) -> bool:
    async def connects() -> bool:
        try:
            _, writer = await asyncio.open_connection(HOST, port)
        except OSError:
            return False
        writer.close()
        return True

    return asyncio.run(connects())


def load_of(port: int, **fields: object) -> Load:
    values = {"host": HOST, "port": port, "model": MODEL, "key": "k", "streams": 3, "chunks": CHUNKS, "pace_ms": 2.0}
    return Load.model_validate({**values, "seconds": 0.0, "text": answer_of(CHUNKS), **fields})


async def found_of(load: Load) -> Found:
    client = Client(load)
    return await client.run(await client.connect())


@pytest.mark.parametrize("pace_ms", [0.0, 2.0])
async def test_streams_of_the_engine_are_right(engine: int, pace_ms: float) -> None:
    found = await found_of(load_of(engine, pace_ms=pace_ms))
    assert found.faults == []
    assert (found.chunks, found.nbytes) == (3 * CHUNKS, 3 * len(answer_of(CHUNKS)))
    assert len(found.firsts_ms) == 3
    assert min(found.firsts_ms) > 0


async def test_streams_are_repeated_on_their_connection_until_the_time_is_over(engine: int) -> None:
    found = await found_of(load_of(engine, seconds=0.3))
    assert found.faults == []
    assert len(found.firsts_ms) > 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (answer_of(CHUNKS)[:-1], "5 chunks of 35 bytes, not 5 of 34"),
        ("x" * len(answer_of(CHUNKS)), "the text is another"),
    ],
)
async def test_other_text_is_a_fault(engine: int, text: str, told: str) -> None:
    found = await found_of(load_of(engine, text=text))
    assert found.faults == [told] * 3


async def broken_server(answer: bytes) -> asyncio.Server:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(reply, HOST, 0)


@every_case(
    "answer, told",
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\ndata\r\n", "closed before the end"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 4\r\n\r\noops", "status 500: oops"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\ndata: {}\r\n\r\n", "there is no [DONE]"),
        (b"rubbish\r\n\r\n", "not HTTP"),
    ],
)
async def test_an_answer_that_is_no_stream_is_a_fault(answer: bytes, told: str) -> None:
    async with await broken_server(answer) as server:
        found = await found_of(load_of(server.sockets[0].getsockname()[1], streams=1))
    assert len(found.faults) == 1
    assert told in found.faults[0]


def test_tokens_count_where_the_text_is_not_known() -> None:
    load = load_of(1, text=None)
    assert fault_of(Read("", 0, CHUNKS, is_done=True), load) == ""
    assert fault_of(Read("", 0, CHUNKS - 1, is_done=True), load) == "4 tokens, not 5"


def test_events_are_read_with_roles_usage_and_empty_pieces() -> None:
    said = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": None}, {"content": "bc"}]
    events = [{"choices": [{"delta": delta}]} for delta in said]
    body = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events)
    body += b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n'
    assert read_events(body) == Read("abc", 2, 2, is_done=True)


@every_case("share, value", [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0)])
def test_a_percentile_is_one_of_the_values(share: float, value: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], share) == value
    assert percentile([7.0], share) == 7.0


def sample(target: str, *, number: int = 1, kind: str = "first", **fields: Any) -> Sample:
    values: dict[str, Any] = {"streams": 16, "p50_ms": 1.0, "p99_ms": 9.0, "num_firsts": 10, "chunks": 1000}
    values |= {"seconds": 1.0, "cpu_s": 0.1, "others": 0.0, **fields}
    return Sample(kind=kind, target=target, round=number, **values)


def test_what_is_added_is_compared_with_direct_in_the_same_round() -> None:
    samples = [sample(DIRECT, number=1, p50_ms=1.0), sample(DIRECT, number=2, p50_ms=10.0)]
    samples += [sample(OURS, number=1, p50_ms=1.5), sample(OURS, number=2, p50_ms=10.7)]
    direct, ours = rows_of(samples, [])
    assert direct.firsts[16, "P50"].median == 5.5
    added = ours.firsts[16, "P50"]
    assert (added.low, added.median, added.high) == pytest.approx((0.5, 0.6, 0.7))


def test_a_peer_that_leads_is_told_and_fails_the_verdict() -> None:
    samples = [sample(DIRECT, p50_ms=1.0), sample(OURS, p50_ms=2.0), sample("litellm", p50_ms=1.5)]
    samples += [sample(OURS, kind="stream", cpu_s=0.1), sample("litellm", kind="stream", cpu_s=0.2)]
    memories = [
        OpenMemory(target=name, streams=2, processes=1, idle_nbytes=0, open_nbytes=nbytes)
        for name, nbytes in ((OURS, 4096), ("litellm", 8192))
    ]
    rows = rows_of(samples, memories)
    _, ours, litellm = rows
    assert leads_of(litellm, ours) == ["16 P50 (0.50, ours 1.00)"]
    assert [verdict.is_met for verdict in verdicts_of(rows, "fake")] == [True, False]


def test_a_peer_that_is_missing_stands_in_the_table() -> None:
    rows = rows_of([sample(DIRECT), sample(OURS), sample(OURS, kind="stream")], [])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*tables_of(rows, {"litellm": "no such package\nmore"}, "fake"))
    assert console.export_text().count("not measured: no such package") == 2


def test_faults_of_all_loads_are_told() -> None:
    outcome = Outcome(Plan(1, 1.0), samples=[sample(OURS, faults=("wrong",))])
    outcome.memories.append(
        OpenMemory(target="litellm", streams=2, processes=1, idle_nbytes=0, open_nbytes=0, faults=("cut",))
    )
    assert outcome.faults() == ["ours at 16 streams: wrong", "litellm at 2 streams: cut"]


def test_a_tree_has_what_descends_but_for_what_is_left_out() -> None:
    script = """if True:
        import subprocess, sys, time
        subprocess.Popen(["sleep", "60"])
        while time.process_time() < 0.1:  # ten times the kernel's tick
            pass
        print("started", flush=True)
        sys.stdin.read()
    """
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    (grandchild,) = set(Tree(child.pid).pids()) - {child.pid}
    try:
        assert Tree(child.pid, (grandchild,)).pids() == [child.pid]
        assert Tree(child.pid).pss_nbytes() > Tree(child.pid, (grandchild,)).pss_nbytes() > 0
        assert Tree(child.pid).cpu_s() > 0
    finally:
        subprocess.run(["kill", str(grandchild)], check=True)
        child.communicate()


def workspace_in(tmp_path: Path) -> Workspace:
    for name in ("cache", "run", "tmp"):
        (tmp_path / name).mkdir()
    return Workspace(tmp_path / "cache", tmp_path / "run", tmp_path / "tmp")


def test_a_peer_that_cannot_be_installed_is_told_and_not_taken_for_made(tmp_path: Path) -> None:
    workspace = workspace_in(tmp_path)
    peer = Peer(name="nobody", package=str(tmp_path / "nothing"), version="1", setting="", command=lambda place: [])
    for _ in range(2):
        with pytest.raises(TargetFailed, match="could not be made"):
            ensure_peer(workspace, peer)
    assert (workspace.cache / "peers" / "nobody-1.log").read_text()


def test_every_peer_has_a_version_and_says_its_setting() -> None:
    assert [peer.requirement.partition("==")[2] for peer in PEERS] == [peer.version for peer in PEERS]
    assert all(peer.version and peer.setting for peer in PEERS)


@pytest.mark.e2e_long
def test_the_benchmark_runs_whole_without_peers(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "benchmarks.router.overhead", "--peers", "none", "--quick", "--seconds", "0.2"]
    command += ["--cache", str(tmp_path / "cache"), "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = {line["target"]: line for line in lines if line["kind"] == "overhead"}
    assert list(rows) == [DIRECT, OURS]
    assert list(rows[OURS]["added_ms"]) == [f"{n} {which}" for n in (1, 16, 64) for which in ("P50", "P99")]
    assert all(spread["median"] > 0 for spread in rows[OURS]["chunks_core_s"].values())
    assert str(tmp_path) not in file.read_text()
    assert [entry.name for entry in (tmp_path / "cache").glob("run-*")] == []
