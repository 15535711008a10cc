"""What a client notices of a live migration, and what it costs other requests: two real engines, a model of 1.2 GB.

A request streams on one of two replicas; after some tokens it is ordered to move to the other. The ways take turns;
each request has a prompt of its own, so that no prefix cache contains it:

* *rounds*: as the router does it: the target catches up before the switch;
* *no rounds*: the target computes everything at the switch;
* *restart*: the cost of preempting instead: the time until a new request with a prompt of the same length has produced
  the same number of tokens.

The gap is the pause between two events of the stream at the switch. Next to it stands the longest of all pauses after
the order, as a machine that is busy with the rounds may cause pauses, too. The time between events is the median of the
stream. The first move does not count: in it the target's kernels are compiled. During moves of prompts that are not too
long, another request streams on the target: its longest pause is what the rounds cost it, with prefills of 2,048 tokens
at once and of 256. Every moved stream must have all its tokens, each once. Exits with 1 if a request fails.

    python -m benchmarks.router.migration --json FILE
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.cached_model import ensure_model
from benchmarks.common.machine import machine
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.loading.bytecode import environment_of, warm_up
from benchmarks.router.process import Router, RouterFailed, running_router, write_config

MODEL = "m"
PROMPTS = (100, 1000, 4000)
ROUNDS = {100: 5, 1000: 3, 4000: 1}
TOKENS, MOVE_AT = 120, 20
PROMPT_SHARE = 8
"""The answer gets one token more per this many prompt tokens, so that it lasts until the target has caught up."""
BESIDE_MAX, OTHERS_TOKENS_MAX = 1000, 4000
"""Limits beside another stream: tokens of the moved prompt (longer ones take minutes), and of that stream."""
TRIES_MAX = 5
"""Tries of a move whose request ends first: engines that share processors stall now and then, moved or not."""
ANSWER_S_MAX = 900.0
GAP_TIMES_MAX = 3.0
SHARE_MAX = 0.1
ARGUMENTS = {
    "enforce-eager": True,
    "max-model-len": 6144,
    "hf-overrides": '{"max_position_embeddings": 8192}',
    "block-size": 32,
    "dtype": "bfloat16",
}
SETTINGS: dict[str, dict[str, object]] = {
    "rounds": {"switch_timeout": 600},
    "no rounds": {"rounds_max": 0, "switch_timeout": 600},
}
SMALL_PREFILLS: dict[str, object] = {"round_tokens_max": 256, "switch_timeout": 600}
_MOVED = re.compile(r"event=moved .*tokens=(\d+) rounds=(\d+) computed=(\d+) bytes=(\d+) held_ms=([\d.]+)")
_VOCABULARY = range(300, 8000)


@dataclass
class Streamed:
    """One stream: its tokens, and the time of each event with text, by ``time.monotonic``."""

    at_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    begun_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Number of tokens received so far."""
        return len(self.token_ids)

    def gaps_s(self, since_s: float = 0.0, until_s: float = float("inf")) -> list[float]:
        """The pauses between events that end within this period."""
        pairs = zip(self.at_s, self.at_s[1:], strict=False)
        return [after - before for before, after in pairs if since_s <= after <= until_s]

    def gap_at_s(self, at_s: float) -> float:
        """The pause that contains a moment."""
        pairs = zip(self.at_s, self.at_s[1:], strict=False)
        return next(after - before for before, after in pairs if before <= at_s <= after)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One move or restart. Times in seconds; ``apart_s``: the median time between events of the stream."""

    way: str
    prompt: int
    gap_s: float
    apart_s: float
    longest_s: float = 0.0
    """The longest pause after the order."""
    move_s: float = 0.0
    num_moved: int = 0
    num_rounds: int = 0
    num_filled: int = 0
    nbytes: int = 0
    held_s: float = 0.0
    """How long the router held back the source's stream at the switch; the gap also has parts before and after."""
    other_apart_s: float = 0.0
    other_gap_s: float = 0.0
    """Longest pause of the stream that ran on the target, while the other request moved."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default=",".join(map(str, PROMPTS)), help="tokens of prompts, with commas")
    parser.add_argument("--rounds", type=int, help="of each way and prompt; default: fewer for long prompts")
    parser.add_argument("--size", default="1.2GB", help="of the model, as random_models.py has it")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for models")
    arguments = parser.parse_args()
    arguments.prompts = [int(word) for word in arguments.prompts.split(",")]
    return run_supervised(lambda workspace: measure(workspace, arguments), arguments.cache.resolve())


def measure(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run the whole benchmark and return the exit status."""
    console, samples, status = Console(), list[Sample](), 0
    progress = Progress(console)
    with progress.step("making the model"):
        models = {MODEL: ensure_model(workspace, arguments.size)}
        warm_up(environment_of(workspace))
    try:
        with running_router(workspace, models, slots=2, **sections_of(SETTINGS["rounds"])) as router:
            bench = Bench(workspace, models, router)
            bench.wait_movable()
            bench.make_kernels(arguments.prompts[0])
            for prompt in arguments.prompts:
                for number in range(arguments.rounds or ROUNDS.get(prompt, 3)):
                    for sample in bench.round_of(prompt, with_other=number == 0 and prompt <= BESIDE_MAX):
                        samples.append(sample)
                        progress.say(
                            f"{sample.way}, prompt {prompt}: gap {sample.gap_s:.3f} s of {sample.apart_s:.3f} s"
                        )
    except (RouterFailed, OSError) as error:
        console.print(str(error), markup=False)
        status = 1
    verdicts = [verdict for prompt in arguments.prompts for verdict in verdicts_of(samples, prompt)]
    show(console, samples, verdicts)
    if arguments.json is not None:
        lines = [machine(), *({"kind": "move", **asdict(sample)} for sample in samples), *verdicts]
        arguments.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return status


def sections_of(migration: dict[str, object]) -> dict[str, Any]:
    """A configuration with two replicas that are kept running, and the settings of migrations between them."""
    defaults = {"engine_arguments": ARGUMENTS, "min_replicas": 2, "max_replicas": 2}
    return {"defaults": defaults, "migration": migration, "kv_memory": "1GiB"}


class Bench:
    """One router with two replicas; moves one request at a time."""

    def __init__(self, workspace: Workspace, models: dict[str, Path], router: Router) -> None:
        self._workspace = workspace
        self._models = models
        self._router = router
        self._chance = random.Random(0)

    def wait_movable(self) -> None:
        """Wait until both replicas are ready and have passed the check that they can take over requests.

        Raises:
            RouterFailed: an engine failed, or they were not movable after ``ANSWER_S_MAX``.
        """
        deadline_s = time.monotonic() + ANSWER_S_MAX
        while sum(one["is_movable"] for one in self._router.admin("replicas")["replicas"]) < 2:
            failed = [one["back_off"] for one in self._router.admin("models")["models"] if one["back_off"]]
            if failed or time.monotonic() > deadline_s:
                raise RouterFailed(f"two movable replicas never came\n{self._router.log_tail()}")
            time.sleep(0.2)

    def make_kernels(self, prompt: int) -> None:
        """Move one request with a prompt of this length, untimed, so that the target compiles its kernels."""
        self._set(SETTINGS["rounds"])
        self._move("first", prompt)

    def round_of(self, prompt: int, *, with_other: bool) -> Iterator[Sample]:
        """Measure each way once; with ``with_other``, also moves beside another stream."""
        for way, settings in SETTINGS.items():
            self._set(settings)
            yield self._move(way, prompt)
        yield self._restart(prompt)
        if with_other:
            for way, settings in (("rounds of 2048", SETTINGS["rounds"]), ("rounds of 256", SMALL_PREFILLS)):
                self._set(settings)
                yield self._move(way, prompt, with_other=True)
            self._set(SETTINGS["rounds"])

    def _set(self, migration: dict[str, object]) -> None:
        write_config(self._workspace, self._models, slots=2, **sections_of(migration))
        self._router.admin("reload", method="POST")

    def _move(self, way: str, prompt: int, *, with_other: bool = False) -> Sample:
        for _ in range(TRIES_MAX):
            if (sample := self._try_move(way, prompt, with_other=with_other)) is not None:
                return sample
        raise RouterFailed(f"no request was moved in time\n{self._router.log_tail()}")

    def _try_move(self, way: str, prompt: int, *, with_other: bool) -> Sample | None:
        """Move one request; None if it ended before it was moved."""
        num_moved_before = len(_MOVED.findall(self._router.log.read_text()))
        num = (TOKENS + prompt // PROMPT_SHARE) * (3 if with_other else 1)
        stream = self._begin(prompt, num)
        self._wait_tokens(stream, MOVE_AT)
        other = self._begin(20, min(10 * num, OTHERS_TOKENS_MAX)) if with_other else None
        if other is not None:
            self._wait_tokens(other, MOVE_AT)
        ordered_s = time.monotonic()
        moving = min(self._router.admin("requests")["requests"], key=lambda one: -one["age_s"])
        self._router.admin(f"requests/{moving['id']}/migrate", method="POST")
        found = self._wait_moved(num_moved_before, stream)
        moved_s = time.monotonic()
        self._wait_end(stream, num)
        if other is not None:
            other.stop.set()
        if not found:
            return None
        num_moved, num_rounds, num_filled, nbytes = map(int, found[:4])
        held_s = float(found[4]) / 1000
        return Sample(
            way=way,
            prompt=prompt,
            gap_s=stream.streamed.gap_at_s(moved_s - held_s / 2),
            apart_s=statistics.median(stream.streamed.gaps_s()),
            longest_s=max(stream.streamed.gaps_s(ordered_s)),
            move_s=moved_s - ordered_s,
            num_moved=num_moved,
            num_rounds=num_rounds,
            num_filled=num_filled,
            nbytes=nbytes,
            held_s=held_s,
            other_apart_s=statistics.median(other.streamed.gaps_s(until_s=ordered_s)) if other else 0.0,
            other_gap_s=max(other.streamed.gaps_s(ordered_s, moved_s), default=0.0) if other else 0.0,
        )

    def _restart(self, prompt: int) -> Sample:
        stream = self._begin(prompt, MOVE_AT + 1)
        self._wait_end(stream, MOVE_AT + 1)
        took = stream.streamed
        return Sample(
            way="restart", prompt=prompt, gap_s=took.at_s[-1] - took.begun_s, apart_s=statistics.median(took.gaps_s())
        )

    def _begin(self, prompt: int, num_tokens: int) -> Stream:
        tokens = [self._chance.choice(_VOCABULARY) for _ in range(prompt)]
        stream = Stream(self._router.url, tokens, num_tokens)
        stream.start()
        return stream

    def _wait_tokens(self, stream: Stream, num_tokens: int) -> None:
        while stream.streamed.num_tokens < num_tokens and stream.is_alive():
            time.sleep(0.005)
        if not stream.is_alive():
            raise RouterFailed(f"a stream ended too early: {stream.problem}\n{self._router.log_tail()}")

    def _wait_end(self, stream: Stream, num_tokens: int) -> None:
        stream.join(ANSWER_S_MAX)
        if stream.streamed.num_tokens != num_tokens:
            told = f"{stream.streamed.num_tokens} tokens of {num_tokens}: {stream.problem}"
            raise RouterFailed(f"{told}\n{self._router.log_tail()}")

    def _wait_moved(self, num_before: int, stream: Stream) -> Sequence[str]:
        """The fields that the router logs about the ordered move; empty if the request ends first."""
        while stream.is_alive():
            log = self._router.log.read_text()
            if len(found := _MOVED.findall(log)) > num_before:
                told: Sequence[str] = found[-1]
                return told
            time.sleep(0.01)
        return ()


class Stream(threading.Thread):
    """A client that reads a stream to its end, or until ``stop`` is set. Greedy unless ``sampling`` says otherwise."""

    def __init__(
        self, url: str, prompt: list[int] | str, num_tokens: int, *, name: str = "", **sampling: object
    ) -> None:
        super().__init__(daemon=True)
        self.streamed = Streamed()
        self.problem = ""
        self.stop = threading.Event()
        body: dict[str, object] = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        body |= {"stream": True, "return_token_ids": True, **sampling}
        headers = {"Content-Type": "application/json"} | ({"X-Request-Id": name} if name else {})
        self._request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)

    def run(self) -> None:
        """Read the stream and record the time of each event."""
        self.streamed.begun_s = time.monotonic()
        try:
            with urllib.request.urlopen(self._request, timeout=ANSWER_S_MAX) as answer:
                for line in answer:
                    if self.stop.is_set():
                        return
                    if line.startswith(b"data: {"):
                        self._note(json.loads(line[6:]))
        except (OSError, ValueError, LookupError) as error:
            self.problem = repr(error)

    def _note(self, event: dict[str, Any]) -> None:
        if token_ids := event["choices"][0]["token_ids"]:
            self.streamed.at_s.append(time.monotonic())
            self.streamed.token_ids.extend(token_ids)


def verdicts_of(samples: Sequence[Sample], prompt: int) -> list[dict[str, Any]]:
    """The verdicts on the two goals, for one length of prompt."""
    of = {way: [one for one in samples if one.way == way and one.prompt == prompt] for way in SETTINGS}
    if not all(of.values()):
        return []
    gap_s = statistics.median(one.gap_s for one in of["rounds"])
    times = gap_s / statistics.median(one.apart_s for one in of["rounds"])
    share = gap_s / statistics.median(one.gap_s for one in of["no rounds"])
    return [
        {"kind": "verdict", "what": f"prompt {prompt}: gap over the distance of events", "figure": round(times, 2)}
        | {"is_met": times <= GAP_TIMES_MAX},
        {"kind": "verdict", "what": f"prompt {prompt}: gap over that without rounds", "figure": round(share, 3)}
        | {"is_met": share <= SHARE_MAX},
    ]


def show(console: Console, samples: Sequence[Sample], verdicts: Sequence[dict[str, Any]]) -> None:
    """Print tables of the samples, and the verdicts."""
    table = Table(title="what a client notices, medians", title_justify="left", box=None)
    for name in (
        "prompt",
        "way",
        "n",
        "gap s",
        "most",
        "longest s",
        "apart s",
        "move s",
        "rounds",
        "computed",
        "kB sent",
    ):
        table.add_column(name, justify="left" if name == "way" else "right")
    for prompt, way in dict.fromkeys((one.prompt, one.way) for one in samples if not one.other_apart_s):
        table.add_row(*_row([one for one in samples if (one.prompt, one.way) == (prompt, way)]))
    console.print(table)
    beside = Table(title="what another stream on the target notices", title_justify="left", box=None)
    for name in ("prompt", "way", "events apart s", "longest pause s"):
        beside.add_column(name, justify="left" if name == "way" else "right")
    for one in samples:
        if one.other_apart_s:
            beside.add_row(str(one.prompt), one.way, f"{one.other_apart_s:.3f}", f"{one.other_gap_s:.3f}")
    console.print(beside)
    for verdict in verdicts:
        console.print(
            f"{verdict['what']}: {verdict['figure']}: {'yes' if verdict['is_met'] else 'NO'}", highlight=False
        )


def _row(found: Sequence[Sample]) -> list[str]:
    def median(name: str) -> float:
        return float(statistics.median(getattr(one, name) for one in found))

    times = [f"{median('gap_s'):.3f}", f"{max(one.gap_s for one in found):.3f}"]
    times += [f"{median(name):.3f}" for name in ("longest_s", "apart_s")]
    counts = [f"{median(name):.0f}" for name in ("num_rounds", "num_filled")]
    head = [str(found[0].prompt), found[0].way, str(len(found))]
    return [*head, *times, f"{median('move_s'):.2f}", *counts, f"{median('nbytes') / 1000:.1f}"]


if __name__ == "__main__":
    sys.exit(main())
