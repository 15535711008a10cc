"""The router's keep-alive compared with fixed ones: cold starts and idle seconds, on generated patterns and on traces.

    python -m benchmarks.router.keep_alive [--startup 20] [--trace FILE.csv …]

A trace has the columns of the Azure LLM inference traces. Its requests are spread over twelve models and stretched
twentyfold in time, so that models have pauses.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from sllm_vllm.router.core.keep_alive import DEFAULT_LIMITS
from sllm_vllm.simulate.keep_alive import PATTERNS, Cost, arrivals_of, replay
from sllm_vllm.simulate.workload import read_trace

HOURS = 24.0
SEEDS = 5
MODELS = [f"m{number}" for number in range(12)]
STRETCH = 20.0
ROWS_MAX = 100_000
PATIENT_WORTH = 43.0
"""``idle_worth`` of the variant that is to beat a fixed keep-alive of ten minutes."""


def trace_arrivals(path: Path, seed: int) -> list[list[float]]:
    """Times of arrival in a trace, one list for each model."""
    found: dict[str, list[float]] = defaultdict(list)
    for request in read_trace(path, MODELS, ROWS_MAX, seed=seed, exponent=1.5):
        found[request.model].append(request.at_s * STRETCH)
    return list(found.values())


def measure(arrivals: list[list[float]], startup_s: float) -> dict[str, Cost]:
    """The cost of every rule on the same arrivals."""
    patient = replace(DEFAULT_LIMITS, idle_worth=PATIENT_WORTH)
    rules: dict[str, Cost] = {}
    for name, fixed_s, limits in (
        ("5 min", 300.0, DEFAULT_LIMITS),
        ("ours", None, DEFAULT_LIMITS),
        ("10 min", 600.0, DEFAULT_LIMITS),
        (f"ours, idle_worth {PATIENT_WORTH:g}", None, patient),
    ):
        costs = (replay(times, startup_s=startup_s, fixed_s=fixed_s, limits=limits) for times in arrivals)
        rules[name] = sum(costs, Cost())
    return rules


def main() -> None:
    """Print one JSON object per line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--startup", type=float, default=20.0, help="seconds that a start takes")
    parser.add_argument("--trace", type=Path, action="append", default=[], help="csv file of arrivals")
    options = parser.parse_args()
    sets = {name: [arrivals_of(pattern, HOURS, seed) for seed in range(SEEDS)] for name, pattern in PATTERNS.items()}
    for path in options.trace:
        sets[path.stem] = [times for seed in range(SEEDS) for times in trace_arrivals(path, seed)]
    for name, arrivals in sets.items():
        for rule, cost in measure(arrivals, options.startup).items():
            line = {"kind": "keep_alive", "pattern": name, "startup_s": options.startup, "rule": rule}
            print(json.dumps({**line, "num_cold": cost.num_cold, "idle_s": round(cost.idle_s)}))


if __name__ == "__main__":
    main()
