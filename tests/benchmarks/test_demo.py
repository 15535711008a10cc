"""The demo: its table, its judgement, its server, and the whole of it on a tiny model."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from rich.console import Console

from benchmarks.common import vllm_server
from benchmarks.common.cached_model import SIZES, ensure_model, model_path
from benchmarks.common.supervise import ROOT, Workspace
from benchmarks.common.vllm_server import Completion, ServerFailed, VllmServer
from benchmarks.demo.__main__ import MOVED_TOKENS, Answer, Move, Row, verdicts_of
from benchmarks.demo.__main__ import table_of as story_table
from benchmarks.demo.loading import Start, problems_of, table_of
from benchmarks.loading.bytecode import bytecode_environment
from benchmarks.loading.spans import SpanReceiver, logged_load_s
from sllm_vllm.config import child_environment
from tests.support.cases import every_case
from tests.support.process_tree import Identity, alive, descendants, read_until

START_TIMEOUT_S = 900.0
END_TIMEOUT_S = 300.0


def start_of(name: str, outcome: str) -> Start:
    return Start(
        name=name,
        outcome=outcome,
        nbytes=2_000_000_000,
        load_model_s=2.0,
        first_token_s=20.0,
        completions=(Completion((1, 2), (3, 4), 0.0),),
    )


def three(**changes: Any) -> list[Start]:
    """Stock, converted and loaded; the last one with changes."""
    last = dataclasses.replace(start_of("3 sllm", "loaded"), **changes)
    return [start_of("1 stock", "stock"), start_of("2 sllm", "converted"), last]


def text_of(starts: list[Start], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table_of(starts))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --------------------------------------------------------------------------------------------------- table, judgement


def test_table_has_a_row_a_start() -> None:
    lines = [line for line in text_of(three()).splitlines() if " s  " in line]
    assert [line.partition("  ")[0].strip() for line in lines] == ["1 stock", "2 sllm: converted", "3 sllm: loaded"]
    assert all("2.00 s" in line and "1.00 GB/s" in line and "20.0 s" in line for line in lines)
    assert ["tokens identical: yes" in line for line in lines] == [False, True, True]


def test_table_says_what_is_warm_and_how_many_cpus() -> None:
    text = " ".join(text_of(three()).split())
    assert "both in the page cache" in text
    assert "CPUs" in text


def test_table_without_a_measured_load_shows_a_dash() -> None:
    assert "3 sllm: loaded - -" in " ".join(text_of(three(load_model_s=None)).split())


def test_nothing_is_wrong_with_equal_tokens_and_the_right_outcomes() -> None:
    assert problems_of(three()) == []


def test_other_token_is_a_problem() -> None:
    starts = three(completions=(Completion((1, 2), (3, 5), 0.0),))
    assert problems_of(starts) == ["3 sllm: answer 0 is [3, 5], the stock engine's is [3, 4]"]
    assert "tokens identical: NO" in text_of(starts)


def test_other_prompt_token_is_a_problem() -> None:
    assert problems_of(three(completions=(Completion((1, 9), (3, 4), 0.0),)))


def test_no_token_at_all_is_a_problem() -> None:
    nothing = (Completion((1, 2), (), 0.0),)
    starts = [dataclasses.replace(start, completions=nothing) for start in three()]
    assert len(problems_of(starts)) == 3


@every_case("outcome", ["converted", "unconverted", "stock"])
def test_third_start_that_did_not_load_is_a_problem(outcome: str) -> None:
    problems = problems_of(three(outcome=outcome))
    assert problems == [f"the starts were stock, converted, {outcome}, not stock, converted, loaded"]


# ----------------------------------------------------------------------------------------------------- the whole story


TOLD = Answer((1, 2), 1.5, 1.25)


def test_a_row_compares_all_its_answers() -> None:
    assert Row("m", None, TOLD, TOLD).is_identical
    assert Row("m", Answer((1, 2), 30.0), TOLD, TOLD).is_identical
    for changed in (Row("m", Answer((1,), 30.0), TOLD, TOLD), Row("m", None, TOLD, Answer((1, 3), 1.5))):
        assert not changed.is_identical


@every_case(
    "moved, unmoved, is_identical",
    [(MOVED_TOKENS, MOVED_TOKENS, True), (MOVED_TOKENS, MOVED_TOKENS - 1, False), (20, 20, False)],
)
def test_a_moved_stream_needs_all_its_tokens(moved: int, unmoved: int, *, is_identical: bool) -> None:
    assert Move((7,) * moved, (7,) * unmoved, 0.1).is_identical == is_identical


def test_the_story_is_told_with_its_factor() -> None:
    rows = [Row("m", Answer((1, 2), 30.0), TOLD, TOLD), Row("n", None, TOLD, TOLD)]
    (factor, move) = verdicts_of(rows, Move((7,) * MOVED_TOKENS, (8,) * MOVED_TOKENS, 0.1))
    assert factor == "m: 20.0 times sooner than stock"
    assert "DIFFERENT" in move
    table = story_table(rows)
    assert [list(column.cells) for column in table.columns][1:] == [
        ["30.00", "—"],
        ["1.50", "1.50"],
        ["1.50", "1.50"],
        ["(1.25)", "(1.25)"],
        ["identical", "identical"],
    ]


# ----------------------------------------------------------------------------------------------- model, spans, server


def test_sizes_are_those_of_the_random_models() -> None:
    from benchmarks.common import random_models

    assert set(SIZES) == set(random_models.SIZES)


def test_model_that_is_there_is_used(tmp_path: Path) -> None:
    model_path(tmp_path, "tiny").mkdir()
    workspace = Workspace(cache=tmp_path, run=tmp_path / "none", tmp=tmp_path)
    assert ensure_model(workspace, "tiny") == model_path(tmp_path, "tiny")


def test_model_that_can_not_be_made_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(subprocess.CalledProcessError, match="random_models"):
        ensure_model(Workspace(cache=tmp_path, run=tmp_path / "run", tmp=tmp_path), "no such size")
    bytecode = tmp_path / "bytecode"  # Python's, where the installation has none
    assert [path for path in tmp_path.iterdir() if path != bytecode] == [tmp_path / "run"]


def test_child_environment_is_ours_with_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_TEST_KEPT", "a")
    monkeypatch.setenv("SLLM_TEST_CHANGED", "a")
    found = child_environment(SLLM_TEST_CHANGED="b", SLLM_TEST_NEW="c")
    assert [found[f"SLLM_TEST_{name}"] for name in ("KEPT", "CHANGED", "NEW")] == ["a", "b", "c"]


def test_bytecode_stays_where_it_is_if_python_may_write_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert bytecode_environment(tmp_path) == {}


def test_span_is_received_once_and_found_by_its_prefix() -> None:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    spans.add(name="Load weights", start_time_unix_nano=0, end_time_unix_nano=1_000_000_000)
    spans.add(name="Loading (CPU)", start_time_unix_nano=500_000_000, end_time_unix_nano=3_000_000_000)
    with SpanReceiver() as receiver:
        receiver.receive(request.SerializeToString())
        assert receiver.wait_for("Loading (", 0.0) == pytest.approx(2.5)
        assert receiver.wait_for("Warmup", 0.0) is None


def test_logged_load_is_the_last_one() -> None:
    log = "x Model loading took 1.2 GiB memory and 3.500000 seconds\nModel loading took 2 GiB memory and 4.25 seconds"
    assert logged_load_s(log) == 4.25
    assert logged_load_s("nothing of the kind") is None


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], VllmServer]:
    """Factory of servers whose ``vllm`` is a shell script."""

    def make(script: str) -> VllmServer:
        command = tmp_path / "vllm"
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
        monkeypatch.setattr(vllm_server, "vllm_command", lambda: command)
        return VllmServer(tmp_path, [], environment={}, log=tmp_path / "log")

    return make


def test_server_that_dies_is_noticed_at_once_and_quoted(fake_vllm: Callable[[str], VllmServer]) -> None:
    lines = "\n".join(f"echo line {number}" for number in range(40))
    with fake_vllm(f"{lines}\nexit 3") as server, pytest.raises(ServerFailed, match="ended with status 3"):
        server.wait_healthy()
    assert server.log_tail().splitlines() == [f"line {number}" for number in range(10, 40)]


def test_server_is_stopped_with_its_children(fake_vllm: Callable[[str], VllmServer]) -> None:
    with fake_vllm("sleep 1000 & sleep 1000") as server:
        assert server._process is not None
        group = server._process.pid
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


# ---------------------------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo-cache")


@pytest.fixture
def tmp() -> Iterator[Path]:
    """A temporary directory with a short path: vLLM makes sockets in it."""
    with tempfile.TemporaryDirectory(prefix="demo-") as path:
        yield Path(path)


@pytest.fixture
def demo(cache: Path, tmp: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The demo on a tiny model, with a temporary directory of its own."""
    command = [sys.executable, "benchmarks/demo/loading.py", "--size", "tiny", "--cache", str(cache)]
    environment = child_environment(TMPDIR=str(tmp))
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield process
    process.terminate()
    process.communicate(timeout=END_TIMEOUT_S)


def assert_nothing_left(cache: Path, tmp: Path, processes: set[Identity]) -> None:
    """No process, no file in the temporary directory, and in the cache only what may be used again."""
    assert alive(processes) == set()
    assert list(tmp.iterdir()) == []
    assert {path.name for path in cache.iterdir()} <= {".lock", "bytecode", "llama-tiny"}


@pytest.mark.e2e_long
def test_demo_shows_identical_tokens_and_leaves_nothing(demo: subprocess.Popen[bytes], cache: Path, tmp: Path) -> None:
    read_until(demo, "3 sllm: asking", START_TIMEOUT_S)
    processes = descendants(demo.pid)
    output, _ = demo.communicate(timeout=END_TIMEOUT_S)
    assert demo.returncode == 0, output.decode()
    assert output.decode().count("tokens identical: yes") == 2
    assert len(processes) >= 4  # the work, and three of vLLM
    assert_nothing_left(cache, tmp, processes)


@pytest.mark.e2e_long
@pytest.mark.parametrize("moment", ["1 stock: starting", "1 stock: asking"])
def test_interrupted_demo_leaves_nothing(moment: str, demo: subprocess.Popen[bytes], cache: Path, tmp: Path) -> None:
    read_until(demo, moment, START_TIMEOUT_S)
    processes = descendants(demo.pid)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=END_TIMEOUT_S)
    assert demo.returncode == 128 + signal.SIGINT, output.decode()
    assert processes
    assert_nothing_left(cache, tmp, processes)


@pytest.mark.e2e_long
def test_failing_server_is_told_with_its_log(tmp_path: Path) -> None:
    """A model whose weights are missing: the stock start fails."""
    cache = tmp_path / "cache"
    (cache / "llama-tiny").mkdir(parents=True)
    (cache / "llama-tiny" / "model.safetensors").write_bytes(b"no weights")
    command = [sys.executable, "benchmarks/demo/loading.py", "--size", "tiny", "--cache", str(cache)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
    assert done.returncode == 1
    assert f"the whole log is in {cache / 'failed.log'}" in done.stdout
    assert (cache / "failed.log").read_text().splitlines()[-1] in done.stdout


@pytest.mark.e2e_long
def test_the_story_of_tiny_models(tmp_path: Path, tmp: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.demo", "--cache", str(tmp_path)]
    environment = child_environment(TMPDIR=str(tmp))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=4 * END_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("identical") == 4  # three models, and the stream
    assert list(tmp.iterdir()) == []
