"""How well the router predicts how long a start takes: starts real engines, one after the other, and compares.

A real router serves four models of three architectures on two slots. A model's engine, if any, is stopped before the
model is asked, so each request starts one, in a free slot or in place of another engine. After each start the
prediction made before it is compared with the actual time, from the decision to the first byte. The first starts of
each model are for the router to learn from; the others are judged. Prints a table, and whether the median error is at
most 10 % and the 95th percentile at most 25 %. For comparison it prints the error that remains because the machine
itself varies: that of predicting, in hindsight, the median of these very starts, by model and by whether another engine
had to stop. Exits with 1 if a request fails.

    python -m benchmarks.cold_start.start_predictions --json FILE
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cold_start.models import ensure_architecture
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.loading.bytecode import environment_of, warm_up
from benchmarks.router.process import Router, RouterFailed, running_router

MODELS = (("llama", "tiny"), ("opt", "tiny"), ("qwen2", "tiny"), ("llama", "0.5GB"))
MEDIAN_MAX = 0.10
P95_MAX = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """One start. ``nth``: its number among the model's starts, from 1. Seconds from the decision to the first byte."""

    model: str
    nth: int
    kind: str
    tier: str
    is_warm: bool
    expected_s: float
    actual_s: float
    terms: list[dict[str, Any]]

    @property
    def error(self) -> float:
        """Error of the prediction, as a share of the actual time."""
        return abs(self.expected_s - self.actual_s) / self.actual_s


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teach", type=int, default=5, help="starts of each model that are not judged")
    parser.add_argument("--starts", type=int, default=36, help="starts that are judged")
    parser.add_argument("--seed", type=int, default=0, help="of the order of models")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for models")
    arguments = parser.parse_args()
    return run_supervised(lambda workspace: measure(workspace, arguments), arguments.cache.resolve())


def measure(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run all starts and return the exit status."""
    console = Console()
    progress = Progress(console)
    with progress.step("making models"):
        models = {f"{name}-{size}": ensure_architecture(workspace, name, size) for name, size in MODELS}
        warm_up(environment_of(workspace))
    try:
        with running_router(workspace, models, slots=2) as router:
            guesses = _take_guesses(router, list(models), arguments=arguments, progress=progress)
    except (RouterFailed, OSError) as error:
        console.print(str(error), markup=False)
        return 1
    judged = [guess for guess in guesses if guess.nth > arguments.teach]
    verdict = _verdict(judged)
    _print(console, judged, verdict)
    if arguments.json is not None:
        lines = [{"kind": "start_prediction", **asdict(guess), "error": round(guess.error, 4)} for guess in guesses]
        arguments.json.write_text("".join(json.dumps(line) + "\n" for line in [*lines, verdict]))
    return 0


def _take_guesses(
    router: Router, models: list[str], *, arguments: argparse.Namespace, progress: Progress
) -> list[Guess]:
    """Ask the models in random order, all equally often, until enough starts have been judged."""
    chance = random.Random(arguments.seed)
    counts = dict.fromkeys(models, 0)
    guesses: list[Guess] = []
    while sum(max(0, count - arguments.teach) for count in counts.values()) < arguments.starts:
        model = min(models, key=lambda name: (counts[name], chance.random()))
        router.end_replicas(model)  # so about half of the starts find a free slot; the others evict
        router.complete(model)
        last = router.admin(f"explain/{model}")["last"]
        if last is None or last["actual_s"] is None:
            raise RouterFailed(f"nothing was predicted for {model}")
        counts[model] += 1
        guess = Guess(
            model=model,
            nth=counts[model],
            kind=last["kind"],
            tier=last["tier"],
            is_warm=last["is_warm"],
            expected_s=last["expected_s"],
            actual_s=last["actual_s"],
            terms=last["terms"],
        )
        guesses.append(guess)
        progress.say(f"{model}, start {guess.nth}: {guess.expected_s:.2f} s expected, {guess.actual_s:.2f} s taken")
    return guesses


def _verdict(judged: list[Guess]) -> dict[str, Any]:
    median, p95 = _median_and_p95([guess.error for guess in judged])
    floor_median, floor_p95 = _median_and_p95(_errors_in_hindsight(judged))
    return {
        "kind": "verdict",
        "what": "error of predicted starts",
        "n": len(judged),
        "median": round(median, 4),
        "p95": round(p95, 4),
        "median_in_hindsight": round(floor_median, 4),
        "p95_in_hindsight": round(floor_p95, 4),
        "is_met": median <= MEDIAN_MAX and p95 <= P95_MAX,
    }


def _median_and_p95(errors: list[float]) -> tuple[float, float]:
    ordered = sorted(errors)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def _errors_in_hindsight(judged: list[Guess]) -> list[float]:
    """Errors of the best-fitting constant per model and kind: no prediction of a repeated start can do much better."""
    alike: dict[tuple[str, str], list[float]] = {}
    for guess in judged:
        alike.setdefault((guess.model, guess.kind), []).append(guess.actual_s)
    return [abs(statistics.median(taken) - one) / one for taken in alike.values() for one in taken]


def _print(console: Console, judged: list[Guess], verdict: dict[str, Any]) -> None:
    table = Table(title="starts, predicted and taken", title_justify="left", box=None)
    for name in ("model", "starts", "taken, median", "error, median", "error, most"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for model in sorted({guess.model for guess in judged}):
        of_model = [guess for guess in judged if guess.model == model]
        taken_s = statistics.median(guess.actual_s for guess in of_model)
        errors = [guess.error for guess in of_model]
        row = (f"{taken_s:.2f} s", f"{statistics.median(errors):.0%}", f"{max(errors):.0%}")
        table.add_row(model, str(len(of_model)), *row)
    console.print(table)
    is_met = "yes" if verdict["is_met"] else "NO"
    console.print(
        f"{verdict['n']} starts: median error {verdict['median']:.1%} (at most {MEDIAN_MAX:.0%}), "
        f"95th percentile {verdict['p95']:.1%} (at most {P95_MAX:.0%}): {is_met}"
    )
    console.print(
        f"in hindsight, by the median of these starts: {verdict['median_in_hindsight']:.1%}, "
        f"95th percentile {verdict['p95_in_hindsight']:.1%}"
    )


if __name__ == "__main__":
    sys.exit(main())
