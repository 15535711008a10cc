"""Shows what this project does, in two minutes: the stock engine and ours, side by side on this machine.

Starts ``vllm serve`` on a random Llama three times: stock; with ``--load-format sllm`` for the first time, which
converts the model; and with it again, which loads the checkpoint. Asks each engine the same questions over HTTP and
compares the token ids. Prints one table. Exits with 1 if a token differs, if the third start did not load from the
checkpoint, or if a server failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common.cached_model import SIZES, ensure_model, model_path, weight_files
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.common.vllm_server import Completion, ServerFailed, VllmServer
from benchmarks.loading import page_cache
from benchmarks.loading.bytecode import environment_of, warm_up
from benchmarks.loading.claimed_memory import ClaimedMemory
from benchmarks.loading.spans import RUNNER_SPAN_PREFIX, SpanReceiver, logged_load_s
from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, PARTITION_DIR
from sllm_vllm.units import format_bps, format_nbytes

PROMPTS = ("Hello, my name is", "The capital of France is", "Once upon a time there was a")
SAMPLINGS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95, "seed": 1234})
NUM_TOKENS = 16
ENGINE_ARGUMENTS = ("--enforce-eager", "--max-model-len", "512")
SPAN_TIMEOUT_S = 10.0
PUBLISH_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of the engine, and its results."""

    name: str
    outcome: str
    """``stock``, or what our loader reports: ``converted``, ``loaded``, ``unconverted``."""
    nbytes: int
    load_model_s: float | None
    first_token_s: float
    """From the start of the process to the first token of the first answer."""
    completions: tuple[Completion, ...]

    @property
    def tokens(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Token ids of every question and answer."""
        return [(completion.prompt_token_ids, completion.token_ids) for completion in self.completions]


class DemoFailed(Exception):
    """The demo did not show what it promises. The message is written for the user."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.2GB", help="size of the model")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for the model and the checkpoint")
    arguments = parser.parse_args()
    return run_supervised(lambda workspace: run_demo(workspace, arguments.size), arguments.cache.resolve())


def run_demo(workspace: Workspace, size: str) -> int:
    """Run the demo in its workspace and return the exit status."""
    console = Console()
    progress = Progress(console)
    try:
        starts = list(start_all(workspace, size, progress))
    except DemoFailed as error:
        console.print(f"\n{error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(table_of(starts))
    problems = problems_of(starts)
    for problem in problems:
        console.print(problem, style="bold red", markup=False, highlight=False, soft_wrap=True)
    return 1 if problems else 0


def start_all(workspace: Workspace, size: str, progress: Progress) -> Iterator[Start]:
    """Start the engine in each of the three ways.

    Raises:
        DemoFailed: the model could not be made, or a server failed; its log is kept in the cache.
    """
    verb = "using" if model_path(workspace.cache, size).exists() else "making"
    try:
        with progress.step(f"model: {verb} a random Llama of {size}, kept in {workspace.cache}"):
            model = ensure_model(workspace, size)
        with progress.step("importing vLLM once, so that the first start is no slower than the others"):
            warm_up(environment_of(workspace))
    except subprocess.CalledProcessError as error:
        raise DemoFailed(f"{error}\n{error.output}") from None
    store, report = workspace.run / "store", workspace.run / "report.json"
    extra = json.dumps({"store_dir": str(store), "report_path": str(report)})
    ours = ("--load-format", "sllm", "--model-loader-extra-config", extra)
    for name, arguments in (
        ("1 stock", ("--load-format", "auto")),
        ("2 sllm", ours),
        ("3 sllm", ours),
    ):
        yield start_once(workspace, model, name, arguments=arguments, progress=progress)


def start_once(workspace: Workspace, model: Path, name: str, *, arguments: Sequence[str], progress: Progress) -> Start:
    """Start the engine, ask it all questions, stop it.

    Raises:
        DemoFailed: the server failed.
    """
    files = weight_files(model)
    nbytes = sum(file.stat().st_size for file in files)
    page_cache.prepare([*files, *(workspace.run / "store").glob(f"*/{PARTITION_DIR}/*")], "warm")
    log = workspace.run / "vllm.log"
    with SpanReceiver() as spans, contextlib.ExitStack() as stack:
        with progress.step(f"{name}: having weights in the page cache and free memory at hand"):
            memory = stack.enter_context(ClaimedMemory(nbytes))
        environment = {**environment_of(workspace), **spans.environment()}
        try:
            with VllmServer(model, [*ENGINE_ARGUMENTS, *arguments], environment=environment, log=log) as server:
                with progress.step(f"{name}: starting `vllm serve`"):
                    server.wait_loading()
                    memory.release()
                    server.wait_healthy()
                    load_model_s = spans.wait_for(RUNNER_SPAN_PREFIX, SPAN_TIMEOUT_S) or logged_load_s(log.read_text())
                with progress.step(f"{name}: asking {len(PROMPTS) * len(SAMPLINGS)} questions"):
                    completions = tuple(server.complete(question) for question in questions())
                outcome = outcome_of(workspace.run / "report.json", "sllm" in arguments, progress)
        except ServerFailed as error:
            kept = shutil.copy(log, workspace.cache / "failed.log")
            raise DemoFailed(f"{name}: {error}\n{server.log_tail()}\nthe whole log is in {kept}") from None
    return Start(
        name=name,
        outcome=outcome,
        nbytes=nbytes,
        load_model_s=load_model_s,
        first_token_s=completions[0].first_token_s - server.start_s,
        completions=completions,
    )


def questions() -> Iterator[dict[str, Any]]:
    """The questions for every start, asked one after the other, so that no batch depends on timing."""
    for prompt in PROMPTS:
        for sampling in SAMPLINGS:
            yield {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, **sampling}


def outcome_of(report: Path, is_ours: bool, progress: Progress) -> str:
    """The outcome that our loader reported. After a conversion, waits until the checkpoint is published.

    Raises:
        ServerFailed: there is no report, or the checkpoint was not published in time.
    """
    if not is_ours:
        return "stock"
    try:
        told = json.loads(report.read_text())
    except OSError as error:
        raise ServerFailed(f"the loader left no report: {error}") from None
    if told["outcome"] == "converted":
        manifest = Path(told["checkpoint"]) / MANIFEST_NAME
        deadline_s = time.monotonic() + PUBLISH_TIMEOUT_S
        with progress.step("waiting until the checkpoint is on the disk"):
            while not manifest.exists():
                if time.monotonic() > deadline_s:
                    raise ServerFailed(f"the checkpoint was not published in {PUBLISH_TIMEOUT_S:.0f} s")
                time.sleep(0.05)
    return str(told["outcome"])


def problems_of(starts: Sequence[Start]) -> list[str]:
    """Everything that is not as promised, in words; empty if all is well."""
    different = (start for start in starts if not identical(starts[0], start))
    problems = [f"{start.name}: {difference_of(starts[0], start)}" for start in different]
    found, wanted = [start.outcome for start in starts], ["stock", "converted", "loaded"]
    if found != wanted:
        problems.append(f"the starts were {', '.join(found)}, not {', '.join(wanted)}")
    return problems


def identical(reference: Start, start: Start) -> bool:
    """Whether all tokens are the same, and every answer has some."""
    return start.tokens == reference.tokens and all(answer for _, answer in start.tokens)


def difference_of(reference: Start, start: Start) -> str:
    """The first answer that differs, in words."""
    for number, (wanted, found) in enumerate(zip(reference.tokens, start.tokens, strict=True)):
        if wanted != found or not found[1]:
            return f"answer {number} is {list(found[1])}, the stock engine's is {list(wanted[1])}"
    raise AssertionError("they are identical")


def table_of(starts: Sequence[Start]) -> Table:
    """The table that the demo prints."""
    nbytes = starts[0].nbytes
    caption = (
        f"{format_nbytes(nbytes)} of weights, source and checkpoint both in the page cache; {os.cpu_count()} CPUs; "
        "memory is free and, on a virtual machine, backed by its host. "
        "load_model: the whole of it, by vLLM's own trace span; a first start also writes the checkpoint. "
        f"{len(starts[0].completions)} answers a start, greedy and sampled."
    )
    table = Table(
        title="vllm serve, three starts", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("start", no_wrap=True)
    for column in ("load_model", "bytes/s", "start to\nfirst token"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for start in starts:
        seconds = start.load_model_s
        same = f"tokens identical: {'yes' if identical(starts[0], start) else 'NO'}"
        table.add_row(
            start.name if start.outcome == "stock" else f"{start.name}: {start.outcome}",
            "-" if seconds is None else f"{seconds:.2f} s",
            format_bps(start.nbytes / seconds if seconds else None),
            f"{start.first_token_s:.1f} s",
            "reference" if start is starts[0] else same,
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
