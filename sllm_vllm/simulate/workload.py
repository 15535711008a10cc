"""Arriving requests: drawn from distributions, or read from a trace. Seeded; pure except for reading the trace."""

from __future__ import annotations

import csv
import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import log
from pathlib import Path

from sllm_vllm.errors import ConfigError

CV = 8.0
"""Coefficient of variation of the gaps between arrivals, from AlpaServe (OSDI 2023) and ServerlessLLM (OSDI 2024)."""
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """A request, with the length of its answer, which only the simulated engine knows in advance."""

    id: str
    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal token counts: their means, and the sigma of their logarithms."""

    prompt_mean: float
    output_mean: float
    sigma: float = 0.6
    tokens_max: int = 8192

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Tokens of a prompt and of its answer, at least one each."""
        return self._tokens(self.prompt_mean, rng), self._tokens(self.output_mean, rng)

    def _tokens(self, mean: float, rng: random.Random) -> int:
        drawn = rng.lognormvariate(log(mean) - self.sigma**2 / 2, self.sigma)
        return min(self.tokens_max, max(1, round(drawn)))


GSM8K = Lengths(prompt_mean=60.0, output_mean=120.0)
"""Assumed: a school problem is a paragraph, its worked answer two."""
SHAREGPT = Lengths(prompt_mean=220.0, output_mean=3.7 * 120.0, sigma=1.0)
"""Answers 3.7 times as long as GSM8K's, from ServerlessLLM's reported inference times. Prompts are assumed."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """How requests arrive. ``rate``: requests a second, of all models together. ``exponent``: the model of rank r gets
    requests in proportion to r ** -exponent; 0: all get the same. ``is_per_model``: each model's own arrivals have the
    CV, as in AlpaServe; otherwise all arrivals together have it, and each request draws its model."""

    rate: float
    cv: float = CV
    exponent: float = 0.5
    lengths: Lengths = GSM8K
    is_per_model: bool = True


def shares(models: Sequence[str], exponent: float, rng: random.Random) -> dict[str, float]:
    """Each model's share of the requests; the ranking is drawn at random."""
    ranked = list(models)
    rng.shuffle(ranked)
    weights = [rank**-exponent for rank in range(1, len(ranked) + 1)]
    return {model: weight / sum(weights) for model, weight in zip(ranked, weights, strict=True)}


def draw_requests(traffic: Traffic, models: Sequence[str], num_requests: int, *, seed: int) -> list[SimulatedRequest]:
    """The first ``num_requests`` arrivals, in the order of time."""
    rng = random.Random(f"workload {seed}")
    parts = shares(models, traffic.exponent, rng)
    if traffic.is_per_model:
        streams = [_named(gaps(traffic.rate * part, traffic.cv, rng), model) for model, part in parts.items()]
        arrivals: Iterator[tuple[float, str]] = heapq.merge(*streams)
    else:
        drawn = _draw_forever(parts, rng)
        arrivals = zip(gaps(traffic.rate, traffic.cv, rng), drawn, strict=False)
    return [
        SimulatedRequest(f"r{number}", at_s, model, *traffic.lengths.draw(rng))
        for number, (at_s, model) in enumerate(itertools.islice(arrivals, num_requests))
    ]


def gaps(rate: float, cv: float, rng: random.Random) -> Iterator[float]:
    """Yield arrival times whose gaps are Gamma distributed with mean 1 / rate.

    The first gap is the rest of one that began before time 0 (drawn in proportion to its length), since the process is
    observed from an arbitrary moment; otherwise every model would begin with a burst.
    """
    shape = 1 / cv**2
    scale = 1 / (rate * shape)
    at_s = rng.random() * rng.gammavariate(shape + 1, scale)
    while True:
        yield at_s
        at_s += rng.gammavariate(shape, scale)


def _named(times: Iterator[float], model: str) -> Iterator[tuple[float, str]]:
    for at_s in times:
        yield at_s, model


def _draw_forever(parts: dict[str, float], rng: random.Random) -> Iterator[str]:
    models, bounds = list(parts), list(itertools.accumulate(parts.values()))
    while True:
        yield rng.choices(models, cum_weights=bounds)[0]


def read_trace(
    path: Path, models: Sequence[str], num_requests: int, *, seed: int, rate: float | None = None, exponent: float = 0.5
) -> list[SimulatedRequest]:
    """The first rows of a trace, spread over models. ``rate``: stretch times to this many requests a second.

    Raises:
        ConfigError: it can't be read, or has other columns.
    """
    rng = random.Random(f"trace {seed}")
    parts = shares(models, exponent, rng)
    rows = sorted(_rows(path, num_requests))
    if not rows:
        raise ConfigError(f"{path} has no requests; give a trace with rows below its header")
    first_s, duration_s = rows[0][0], rows[-1][0] - rows[0][0]
    stretch = 1.0 if rate is None or duration_s <= 0 else (len(rows) - 1) / rate / duration_s
    names = _draw_forever(parts, rng)
    return [
        SimulatedRequest(f"r{number}", (at_s - first_s) * stretch, next(names), max(1, prompt), max(1, output))
        for number, (at_s, prompt, output) in enumerate(rows)
    ]


def _rows(path: Path, num_rows: int) -> list[tuple[float, int, int]]:
    try:
        with path.open(newline="") as file:
            return [_row(row) for row in itertools.islice(csv.DictReader(file), num_rows)]
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}; give the path of a csv file") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a trace ({error!r}); its columns must be {','.join(COLUMNS)}") from error


def _row(row: dict[str, str]) -> tuple[float, int, int]:
    at, prompt, output = (row[column] for column in COLUMNS)
    return datetime.fromisoformat(at).timestamp(), int(prompt), int(output)
