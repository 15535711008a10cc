"""Shows on one screen what this project is for: seconds to the first token, and a request that moves while it streams.

1. Stock ``vllm serve`` starts one model.
2. ``sllm-vllm serve`` has three models and two slots. The first request to a model forks its engine from the warm
   parent and converts the model; the next one, after its engine was stopped, loads the checkpoint from host memory.
3. A stream moves from one engine to another, and every token is compared with the same answer unmoved.

The models are tiny, with random weights: almost all of stock's time is imports and start-up, which is the same for any
model. ``python -m benchmarks.demo.loading`` compares the loading of a larger model. Exits with 1 if a token differs or
a request fails.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from benchmarks.cold_start.models import ensure_architecture
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.common.vllm_server import ServerFailed, VllmServer, stream_completion
from benchmarks.loading.bytecode import environment_of, warm_up
from benchmarks.router.migration import Stream
from benchmarks.router.process import Router, RouterFailed, running_router

MODELS = ("llama", "opt", "qwen2")
ENGINE_ARGUMENTS = {"enforce-eager": True, "max-model-len": 512}
PROMPT = "Hello, my name is"
QUESTION = {"prompt": PROMPT, "max_tokens": 16, "ignore_eos": True, "temperature": 0.0}
MOVED_TOKENS, MOVE_AFTER = 400, 20
TRIES_MAX = 10
"""Tries of a move: on a busy machine the short answer may end before it is moved."""
MOVABLE_S_MAX = 300.0
_TWO: dict[str, Any] = {"min_replicas": 2, "max_replicas": 2}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. ``first_s``: seconds to its first token; ``predicted_s``: what the router expected for the start."""

    token_ids: tuple[int, ...]
    first_s: float
    predicted_s: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """The answers of one model. ``stock`` is None where stock was not started."""

    model: str
    stock: Answer | None
    first: Answer
    again: Answer

    @property
    def is_identical(self) -> bool:
        """Whether all answers have the same tokens."""
        return len({one.token_ids for one in (self.stock, self.first, self.again) if one is not None}) == 1


@dataclass(frozen=True, slots=True)
class Move:
    """A stream that moved, beside the same answer unmoved. ``longest_pause_s``: between two of its events."""

    moved: tuple[int, ...]
    unmoved: tuple[int, ...]
    longest_pause_s: float

    @property
    def is_identical(self) -> bool:
        """Whether both have the same tokens, all of them."""
        return self.moved == self.unmoved and len(self.moved) == MOVED_TOKENS


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", help="of the models")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for models")
    arguments = parser.parse_args()
    return run_supervised(lambda workspace: run_demo(workspace, arguments.size), arguments.cache.resolve())


def run_demo(workspace: Workspace, size: str) -> int:
    """Run the demo in its workspace and return the exit status."""
    console = Console()
    progress = Progress(console)
    try:
        with progress.step("making three models with random weights"):
            models = {name: ensure_architecture(workspace, name, size) for name in MODELS}
            warm_up(environment_of(workspace))
        with progress.step(f"stock: `vllm serve {MODELS[0]}`"):
            stock = ask_stock(workspace, models[MODELS[0]])
        progress.say("ours: `sllm-vllm serve`, three models on two slots; its warm parent imports vLLM once")
        with running_router(workspace, models, slots=2) as router:
            rows = list(ask_all(router, stock, progress))
            with progress.step("a second engine for one model, and a stream that moves to it"):
                move = move_a_stream(router, models)
    except (RouterFailed, ServerFailed, OSError, subprocess.CalledProcessError) as error:
        console.print(str(error), style="bold red", markup=False, highlight=False)
        return 1
    console.print(table_of(rows))
    for line in verdicts_of(rows, move):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if move.is_identical and all(row.is_identical for row in rows) else 1


def ask_stock(workspace: Workspace, model: Path) -> Answer:
    """Start stock vLLM, ask it, and stop it.

    Raises:
        ServerFailed: the server failed.
    """
    arguments = ["--enforce-eager", "--max-model-len", str(ENGINE_ARGUMENTS["max-model-len"])]
    environment, log = environment_of(workspace), workspace.run / "stock.log"
    with VllmServer(model, arguments, environment=environment, log=log, without=["VLLM_PLUGINS"]) as server:
        server.wait_healthy()
        found = server.complete(QUESTION)
        return Answer(found.token_ids, found.first_token_s - server.start_s)


def ask_all(router: Router, stock: Answer, progress: Progress) -> Iterator[Row]:
    """Ask each model twice, with no engine of it running.

    Raises:
        RouterFailed, ServerFailed: an engine did not end, or an answer failed.
    """
    first = {}
    for name in MODELS:
        with progress.step(f"the first request to {name}"):
            first[name] = ask(router, name)
    for name in MODELS:
        router.end_replicas(name)
        with progress.step(f"a request to {name}, whose engine was stopped"):
            again = ask(router, name)
        yield Row(name, stock if name == MODELS[0] else None, first[name], again)


def ask(router: Router, model: str) -> Answer:
    """Ask a model of the router.

    Raises:
        ServerFailed: there was no whole answer.
    """
    begun_s = time.monotonic()
    found = stream_completion(urlsplit(router.url).port or 80, {**QUESTION, "model": model})
    last = router.admin(f"explain/{model}")["last"]
    return Answer(found.token_ids, found.first_token_s - begun_s, last and last["expected_s"])


def move_a_stream(router: Router, models: Mapping[str, Path]) -> Move:
    """Run two engines of the first model, and move a stream from one to the other.

    Raises:
        RouterFailed: an engine or a request failed, or each answer ended before it was moved.
    """
    model, *others = MODELS
    for name in others:
        router.end_replicas(name)
    router.admin("models", method="POST", body={"name": model, "source": str(models[model]), **_TWO})
    deadline_s = time.monotonic() + MOVABLE_S_MAX
    while sum(one["is_movable"] for one in router.admin("replicas")["replicas"]) < 2:
        if time.monotonic() > deadline_s:
            raise RouterFailed(f"there were no two engines to move between\n{router.log_tail()}")
        time.sleep(0.1)
    unmoved, _ = _streamed(router, model)
    for _ in range(TRIES_MAX):
        stream, request = _streamed(router, model, moves=True)
        if request is not None and f"event=moved request={request} " in router.log.read_text():
            pauses_s = stream.streamed.gaps_s()
            return Move(tuple(stream.streamed.token_ids), tuple(unmoved.streamed.token_ids), max(pauses_s))
    raise RouterFailed(f"each answer ended before it was moved\n{router.log_tail()}")


def _streamed(router: Router, model: str, *, moves: bool = False) -> tuple[Stream, str | None]:
    """Read a stream to its end. With ``moves``, order a move once it has begun; also return the request's id."""
    stream = Stream(router.url, PROMPT, MOVED_TOKENS, model=model)
    stream.start()
    while moves and stream.is_alive() and stream.streamed.num_tokens < MOVE_AFTER:
        time.sleep(0.002)
    request = _order_move(router) if moves else None
    stream.join()
    if stream.problem:
        raise RouterFailed(f"a stream failed: {stream.problem}\n{router.log_tail()}")
    return stream, request


def _order_move(router: Router) -> str | None:
    """Order the only request to move; None if it has ended."""
    for one in router.admin("requests")["requests"]:
        with contextlib.suppress(HTTPError):  # it ended meanwhile
            router.admin(f"requests/{one['id']}/migrate", method="POST")
            return str(one["id"])
    return None


def table_of(rows: list[Row]) -> Table:
    """The table of seconds to the first token."""
    table = Table(title="seconds to the first token", title_justify="left", box=None)
    for name in ("model", "stock", "first request", "stopped, again", "(predicted)", "tokens"):
        table.add_column(name, justify="left" if name in ("model", "tokens") else "right")
    for row in rows:
        seconds = [row.stock, row.first, row.again]
        told = ["—" if one is None else f"{one.first_s:.2f}" for one in seconds]
        predicted = "—" if row.again.predicted_s is None else f"({row.again.predicted_s:.2f})"
        table.add_row(row.model, *told, predicted, "identical" if row.is_identical else "DIFFERENT")
    return table


def verdicts_of(rows: list[Row], move: Move) -> Iterator[str]:
    """What the figures come to, in words."""
    for row in rows:
        if row.stock is not None:
            yield f"{row.model}: {row.stock.first_s / row.again.first_s:.1f} times sooner than stock"
    what = f"a stream of {MOVED_TOKENS} tokens moved between two engines, longest pause {move.longest_pause_s:.2f} s"
    yield f"{what}: {'every token identical' if move.is_identical else 'tokens DIFFERENT'}"


if __name__ == "__main__":
    sys.exit(main())
