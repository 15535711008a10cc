"""How often answers of moved requests differ, compared with how often those of unmoved requests differ when repeated.

Two real engines. Each prompt is first answered once, alone; the other answers are compared with that one, token by
token:

* *again*: unmoved and alone a second time, its prompt now in the prefix cache;
* *beside*: unmoved, several at once, so that an engine's batches contain other rows;
* *moved*: alone, moved to the other engine while it is answered;
* *moved beside*: several at once, each moved.

In float32 nothing may differ. In bfloat16, sums taken in another order round differently, so that a token may lose to
one that is nearly as likely. How often that happens depends on the engine; this measures what moving adds to it. Every
second request is greedy, the others are sampled with a seed. Exits with 1 if a request fails, or if a moved one differs
in float32.

    python -m benchmarks.router.migration_noise --dtype bfloat16 --json FILE
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import statistics
import sys
import threading
import time
import urllib.error
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.cached_model import SIZES, ensure_model
from benchmarks.common.machine import machine
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.loading.bytecode import environment_of, warm_up
from benchmarks.router.migration import ANSWER_S_MAX, MODEL, Bench, Stream
from benchmarks.router.process import Router, RouterFailed, running_router

NUM_PROMPTS, PROMPT, TOKENS, MOVE_AT = 60, 100, 200, 20
AT_ONCE = 4
_MOVED = re.compile(r"event=moved request=(\S+)-[0-9a-f]{8} ")
_VOCABULARY = range(10, 500)
WAYS = ("again", "beside", "moved", "moved beside")


@dataclass(frozen=True, slots=True)
class Compared:
    """One answer compared with the first one to its prompt.

    ``differs_at``: position of the first different token; None if there is none. ``was_moved``: also False if a move
    was ordered and the answer ended first.
    """

    way: str
    prompt: int
    is_greedy: bool
    was_moved: bool
    differs_at: int | None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, help="how many, each asked five times")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each answer")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="requests beside each other")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model, as random_models.py has it")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for models")
    arguments = parser.parse_args()
    return run_supervised(lambda workspace: measure(workspace, arguments), arguments.cache.resolve())


def measure(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run the whole benchmark and return the exit status."""
    console, found, status = Console(), list[Compared](), 0
    progress = Progress(console)
    with progress.step("making the model"):
        models = {MODEL: ensure_model(workspace, arguments.size)}
        warm_up(environment_of(workspace))
    try:
        with running_router(workspace, models, slots=2, **sections_of(arguments.dtype)) as router:
            Bench(workspace, models, router).wait_movable()
            asker = Asker(router, arguments.tokens)
            for number in range(0, arguments.prompts, arguments.at_once):
                group = range(number, min(number + arguments.at_once, arguments.prompts))
                found.extend(asker.compare(group))
                progress.say(f"{group.stop} of {arguments.prompts} prompts")
    except (RouterFailed, OSError) as error:
        console.print(str(error), markup=False)
        status = 1
    show(console, found, arguments)
    if arguments.json is not None:
        setting = {"kind": "setting", "dtype": arguments.dtype, "size": arguments.size, "at_once": arguments.at_once}
        setting |= {"tokens": arguments.tokens}
        lines = [machine(), setting, *({"kind": "answer", **asdict(one)} for one in found)]
        arguments.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    is_wrong = arguments.dtype == "float32" and any(one.was_moved and one.differs_at is not None for one in found)
    return 1 if is_wrong else status


def sections_of(dtype: str) -> dict[str, Any]:
    """A configuration with two replicas that are kept running."""
    arguments = {"enforce-eager": True, "max-model-len": 1024, "block-size": 32, "dtype": dtype}
    defaults = {"engine_arguments": arguments, "min_replicas": 2, "max_replicas": 2}
    return {"defaults": defaults, "migration": {"moves_max": 16}}


class Asker:
    """Sends the requests of all ways to one router."""

    def __init__(self, router: Router, num_tokens: int) -> None:
        self._router = router
        self._num_tokens = num_tokens
        self._num_asked = 0

    def compare(self, prompts: Sequence[int]) -> Iterator[Compared]:
        """Compare the answers to these prompts, in all ways.

        Raises:
            RouterFailed: a request was not answered, or not to its end.
        """
        first = {prompt: self._ask([prompt])[0] for prompt in prompts}
        yield from self._held("again", first, [self._ask([prompt])[0] for prompt in prompts])
        yield from self._held("beside", first, self._ask(prompts))
        yield from self._held("moved", first, [self._ask([prompt], move=True)[0] for prompt in prompts])
        yield from self._held("moved beside", first, self._ask(prompts, move=True))

    def _ask(self, prompts: Sequence[int], *, move: bool = False) -> list[Named]:
        """Send all prompts at once and wait for the answers; with ``move``, move each once it has some tokens."""
        asked = [self._begin(prompt) for prompt in prompts]
        movers = [threading.Thread(target=self._order, args=(one,), daemon=True) for one in asked if move]
        for mover in movers:
            mover.start()
        for one in asked:
            one.stream.join(ANSWER_S_MAX)
            if one.stream.streamed.num_tokens != self._num_tokens:
                told = (
                    f"{one.name}: {one.stream.streamed.num_tokens} tokens of {self._num_tokens}: {one.stream.problem}"
                )
                raise RouterFailed(f"{told}\n{self._router.log_tail()}")
        for mover in movers:
            mover.join()
        return asked

    def _begin(self, prompt: int) -> Named:
        chance = random.Random(prompt)
        tokens = [chance.choice(_VOCABULARY) for _ in range(PROMPT)]
        sampling: dict[str, object] = {} if is_greedy(prompt) else {"temperature": 1.0, "seed": prompt}
        self._num_asked += 1
        name = f"p{prompt}-{self._num_asked}"
        stream = Stream(self._router.url, tokens, self._num_tokens, name=name, **sampling)
        stream.start()
        return Named(name, prompt, stream)

    def _order(self, one: Named) -> None:
        """Order a request to the replica where it is not running."""
        while one.stream.streamed.num_tokens < MOVE_AT:
            if not one.stream.is_alive():
                return
            time.sleep(0.002)
        for request in self._router.admin("requests")["requests"]:
            if request["id"].startswith(f"{one.name}-"):
                with contextlib.suppress(urllib.error.HTTPError):  # it has just ended and counts as not moved
                    self._router.admin(f"requests/{request['id']}/migrate", method="POST")

    def _held(self, way: str, first: dict[int, Named], answers: Iterable[Named]) -> Iterator[Compared]:
        moved = set(_MOVED.findall(self._router.log.read_text()))
        for one in answers:
            if one.name in moved or not way.startswith("moved"):
                at = differs_at(first[one.prompt].stream.streamed.token_ids, one.stream.streamed.token_ids)
                yield Compared(way, one.prompt, is_greedy(one.prompt), one.name in moved, at)
            else:
                yield Compared(way, one.prompt, is_greedy(one.prompt), was_moved=False, differs_at=None)


@dataclass(frozen=True, slots=True)
class Named:
    """A request with its name: an answer under way, or complete."""

    name: str
    prompt: int
    stream: Stream


def is_greedy(prompt: int) -> bool:
    """Whether the request with this prompt is greedy: every second one is."""
    return prompt % 2 == 0


def differs_at(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which two answers of equal length differ."""
    return next((at for at, (mine, its) in enumerate(zip(one, other, strict=True)) if mine != its), None)


def show(console: Console, found: Sequence[Compared], arguments: argparse.Namespace) -> None:
    """Print the results as a table."""
    title = f"answers that differ from the first one, {arguments.dtype}, {arguments.at_once} at once"
    table = Table(title=title, title_justify="left", box=None)
    for name in ("way", "answers", "differ", "share", "greedy", "seeded", "first at, median"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way in WAYS:
        of = [one for one in found if one.way == way and (one.was_moved or not way.startswith("moved"))]
        differ = [one for one in of if one.differs_at is not None]
        share = f"{len(differ) / len(of):.1%}" if of else "-"
        kinds = [str(sum(one.is_greedy is greedy for one in differ)) for greedy in (True, False)]
        at = f"{statistics.median(one.differs_at or 0 for one in differ):.0f}" if differ else "-"
        table.add_row(way, str(len(of)), str(len(differ)), share, *kinds, at)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
