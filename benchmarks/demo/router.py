"""Three models behind one address, on two slots: the router with the official ``openai`` client.

Sends completions and chats, plain and streamed, to every model in turn, so that engines start, stop and start again.
Prints for each cold start the seconds that the router expected and the seconds that it took, term by term. Exits with 1
if a request fails, or if a model's answers differ between two of its engines.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletionUserMessageParam
from rich.console import Console
from rich.table import Table

from benchmarks.cold_start.models import ensure_architecture
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.loading.bytecode import environment_of, warm_up
from benchmarks.router.process import Router, RouterFailed, running_router

ARCHITECTURES = ("llama", "opt", "qwen2")
ORDER = ("llama", "opt", "llama", "qwen2", "opt", "llama", "qwen2", "qwen2", "llama")
"""There are two slots: from the fourth request on, most need a model whose engine was stopped."""
QUESTION = "Hello, my name is"
MESSAGE: ChatCompletionUserMessageParam = {"role": "user", "content": QUESTION}
NUM_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. ``start``: what the router says about the start that it needed; None if an engine was running."""

    model: str
    is_chat: bool
    is_stream: bool
    text: str
    first_s: float
    start: dict[str, Any] | None


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
    with progress.step("making models"):
        models = {name: ensure_architecture(workspace, name, size) for name in ARCHITECTURES}
        warm_up(environment_of(workspace))
    try:
        progress.say("starting the router; its warm parent imports vLLM once")
        with running_router(workspace, models, slots=2) as router:
            asked = []
            for nth, model in enumerate(ORDER):
                asked.append(_ask(router, model, is_chat=False, is_stream=bool(nth % 2)))
                asked.append(_ask(router, model, is_chat=True, is_stream=not nth % 2))
    except (RouterFailed, openai.OpenAIError) as error:
        console.print(str(error), markup=False)
        return 1
    _print_requests(console, asked)
    _print_starts(console, [one for one in asked if one.start is not None])
    is_same = all(len(texts) == 1 for texts in _texts(asked).values())
    console.print(f"answers of one model, from one engine or another: {'identical' if is_same else 'DIFFERENT'}")
    return 0 if is_same else 1


def _texts(asked: list[Asked]) -> dict[tuple[str, bool], set[str]]:
    """The answers, by model and kind of question."""
    texts: dict[tuple[str, bool], set[str]] = {}
    for one in asked:
        texts.setdefault((one.model, one.is_chat), set()).add(one.text)
    return texts


def _ask(router: Router, model: str, *, is_chat: bool, is_stream: bool) -> Asked:
    was_running = model in router.running()
    client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0)
    begun_s, first_s, parts = time.monotonic(), 0.0, []
    for part in (_chat if is_chat else _completion)(client, model, is_stream=is_stream):
        first_s = first_s or time.monotonic() - begun_s
        parts.append(part)
    start = None if was_running else router.admin(f"explain/{model}")["last"]
    return Asked(model, is_chat, is_stream, "".join(parts), first_s, start)


def _completion(client: openai.OpenAI, model: str, *, is_stream: bool) -> Iterator[str]:
    """Yield parts of the answer as they arrive."""
    if not is_stream:
        whole = client.completions.create(model=model, prompt=QUESTION, max_tokens=NUM_TOKENS, temperature=0)
        yield whole.choices[0].text
        return
    for event in client.completions.create(
        model=model, prompt=QUESTION, max_tokens=NUM_TOKENS, temperature=0, stream=True
    ):
        yield "".join(choice.text for choice in event.choices)


def _chat(client: openai.OpenAI, model: str, *, is_stream: bool) -> Iterator[str]:
    """Yield parts of the answer as they arrive."""
    if not is_stream:
        whole = client.chat.completions.create(
            model=model, messages=[MESSAGE], max_completion_tokens=NUM_TOKENS, temperature=0
        )
        yield whole.choices[0].message.content or ""
        return
    for event in client.chat.completions.create(
        model=model, messages=[MESSAGE], max_completion_tokens=NUM_TOKENS, temperature=0, stream=True
    ):
        yield "".join(choice.delta.content or "" for choice in event.choices)


def _print_requests(console: Console, asked: list[Asked]) -> None:
    table = Table(title="requests", title_justify="left", box=None)
    for name in ("model", "as", "engine", "first byte, or answer"):
        table.add_column(name)
    for one in asked:
        how = f"{'chat' if one.is_chat else 'completion'}, {'stream' if one.is_stream else 'plain'}"
        table.add_row(one.model, how, "was there" if one.start is None else "started", f"{one.first_s:.2f} s")
    console.print(table)


def _print_starts(console: Console, started: list[Asked]) -> None:
    """Print the expected and the actual seconds, from the router's decision to the first byte."""
    terms = [entry["term"] for entry in (started[0].start or {"terms": []})["terms"]]
    table = Table(title="cold starts, seconds", title_justify="left", box=None)
    for name in ("model", "tier", "", *terms, "all"):
        table.add_column(name, justify="left" if name in ("model", "tier", "") else "right")
    for one in started:
        start = one.start or {}
        tier = f"{start['tier']}, {'warm' if start['is_warm'] else 'cold'}"
        for what, names in (("expected", (one.model, tier)), ("taken", ("", ""))):
            key = "expected_s" if what == "expected" else "actual_s"
            seconds = [entry[key] for entry in start["terms"]] + [start[key]]
            table.add_row(*names, what, *(f"{value:.2f}" for value in seconds))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
