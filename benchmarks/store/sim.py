"""The store's cache under traffic, on a virtual clock: how long do loads take under each eviction policy?

Drives the store's real core (``sllm_vllm.store.core``) with events; only devices, clients and time are simulated.
Checkpoints are behind one of two slow hops, a disk or a remote, each of which reads one span at a time. A request for a
model that is on no GPU loads it through the cache. The model then stays on the GPU for ``keep_alive_s``; requests in
that time, or while it loads, cause no load. The same seed gives the same output.

    python -m benchmarks.store.sim
    python -m benchmarks.store.sim --trace AzureLLMInferenceTrace_conv.csv
"""

from __future__ import annotations

import argparse
import csv
import heapq
import itertools
import random
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from sllm_vllm.store.core.cache import Cache
from sllm_vllm.store.core.events import (
    Event,
    GiveSpan,
    LeaseClosed,
    LeaseOpened,
    PartitionKnown,
    PartitionSpec,
    ReadDone,
    SpansReleased,
    StartRead,
)
from sllm_vllm.store.core.policy import policy_named
from sllm_vllm.units import GIB, MIB

POLICIES = ("cost", "lru")
HOPS_BPS = {"disk": 2.0e9, "remote": 0.3e9}
COPY_BPS = 20.0e9
"""Rate from the pool to a GPU."""
SPAN_NBYTES = 128 * MIB
"""Larger than in the store, so that a run takes seconds. Policies only see how many spans a checkpoint has."""
SIZES_GB = (2.6, 5.5, 13.0, 16.0, 26.0, 30.0)
ARRIVALS_CV = 8.0
"""Coefficient of variation between arrivals, as in the evaluation of ServerlessLLM (Fu et al., OSDI 2024)."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One scenario. Models are numbered by popularity, the first the most popular."""

    seed: int
    num_models: int = 60
    num_requests: int = 3000
    rate_hz: float = 0.05
    zipf: float = 0.9
    remote_share: float = 0.3
    pool_nbytes: int = 256 * GIB
    keep_alive_s: float = 30.0
    validate_every: int = 10_000


DEFAULTS = Settings(seed=0)


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint of one partition, and the hop that it is behind."""

    spec: PartitionSpec
    hop: str


@dataclass(frozen=True, slots=True)
class Result:
    """The results of a policy. ``waits_s``: waiting time of every request; 0 if the model was on a GPU."""

    policy: str
    hit_rate: float
    load_times_s: list[float]
    waits_s: list[float]


@dataclass(slots=True)
class Load:
    """A model that is loading to a GPU, and the requests that wait for it."""

    token: int
    model: Model
    begin_s: float
    arrivals_s: list[float]
    num_copied: int = 0
    free_at_s: float = 0.0


@dataclass(slots=True)
class Hop:
    """A device that reads one span at a time."""

    bps: float
    queue: deque[StartRead] = field(default_factory=deque)
    is_busy: bool = False


class Simulation:
    """One run of one trace under one policy."""

    def __init__(self, settings: Settings, models: list[Model], policy: str) -> None:
        self._settings = settings
        self._models = models
        self._policy = policy
        self._cache = Cache(settings.pool_nbytes // SPAN_NBYTES, policy=policy_named(policy))
        self._hops = {name: Hop(bps) for name, bps in HOPS_BPS.items()}
        self._hop_of = {model.spec.id: self._hops[model.hop] for model in models}
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now_s = 0.0
        self._num_events = 0
        self._loads: dict[str, Load] = {}
        self._on_gpu_until_s: dict[str, float] = {}
        self._load_times_s: list[float] = []
        self._waits_s: list[float] = []

    def run(self, trace: list[tuple[float, int]]) -> Result:
        """Play a trace of (arrival, model number) to its end.

        Raises:
            AssertionError: an invariant of the cache is violated, or a load did not end.
        """
        for arrival_s, number in trace:
            self._at(arrival_s, lambda model=self._models[number]: self._request(model))  # type: ignore[misc]
        while self._agenda:
            self._now_s, _, act = heapq.heappop(self._agenda)
            act()
        self._cache.validate()
        assert not self._loads, f"loads that never end: {[load.token for load in self._loads.values()]}"
        counters = self._cache.snapshot().counters
        num_given = counters.num_hits + counters.num_misses
        return Result(self._policy, counters.num_hits / num_given, self._load_times_s, self._waits_s)

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (when_s, next(self._order), act))

    def _tell(self, event: Event) -> None:
        self._num_events += 1
        for action in self._cache.handle(event, self._now_s):
            if isinstance(action, StartRead):
                hop = self._hop_of[action.partition]
                hop.queue.append(action)
                self._read_next(hop)
            elif isinstance(action, GiveSpan):
                self._copy(action)
        if self._num_events % self._settings.validate_every == 0:
            self._cache.validate()

    def _request(self, model: Model) -> None:
        name = model.spec.id
        if self._on_gpu_until_s.get(name, 0.0) > self._now_s:
            self._on_gpu_until_s[name] = self._now_s + self._settings.keep_alive_s
            self._waits_s.append(0.0)
        elif name in self._loads:
            self._loads[name].arrivals_s.append(self._now_s)
        else:
            load = Load(len(self._load_times_s) + len(self._loads) + 1, model, self._now_s, [self._now_s])
            self._loads[name] = load
            self._tell(PartitionKnown(model.spec, HOPS_BPS[model.hop]))
            self._tell(LeaseOpened(load.token, name, hold=False))

    def _read_next(self, hop: Hop) -> None:
        if hop.queue and not hop.is_busy:
            hop.is_busy = True
            read = hop.queue.popleft()
            self._at(self._now_s + SPAN_NBYTES / hop.bps, lambda: self._read_done(hop, read))

    def _read_done(self, hop: Hop, read: StartRead) -> None:
        hop.is_busy = False
        self._tell(ReadDone(read.partition, read.span, read.slot))
        self._read_next(hop)

    def _copy(self, gift: GiveSpan) -> None:
        load = next(load for load in self._loads.values() if load.token == gift.token)
        load.free_at_s = max(load.free_at_s, self._now_s) + SPAN_NBYTES / COPY_BPS
        self._at(load.free_at_s, lambda: self._copied(load, gift.span))

    def _copied(self, load: Load, span: int) -> None:
        load.num_copied += 1
        self._tell(SpansReleased(load.token, (span,)))
        if load.num_copied == len(load.model.spec.order):
            self._tell(LeaseClosed(load.token))
            self._load_times_s.append(self._now_s - load.begin_s)
            self._waits_s.extend(self._now_s - arrival_s for arrival_s in load.arrivals_s)
            self._on_gpu_until_s[load.model.spec.id] = self._now_s + self._settings.keep_alive_s
            del self._loads[load.model.spec.id]


def random_models(settings: Settings) -> list[Model]:
    """Checkpoints of different sizes; size and hop do not depend on popularity."""
    chance = random.Random(f"models {settings.seed}")
    models = []
    for number in range(settings.num_models):
        num_spans = max(1, round(chance.choice(SIZES_GB) * 1e9 / SPAN_NBYTES))
        spec = PartitionSpec(f"model-{number:04}", f"model-{number:04}", (*range(num_spans),), num_spans * SPAN_NBYTES)
        models.append(Model(spec, "remote" if chance.random() < settings.remote_share else "disk"))
    return models


def random_arrivals(settings: Settings) -> Iterator[float]:
    """Arrivals in bursts: times between arrivals are Gamma-distributed."""
    chance = random.Random(f"arrivals {settings.seed}")
    shape = 1 / ARRIVALS_CV**2
    now_s = 0.0
    for _ in range(settings.num_requests):
        now_s += chance.gammavariate(shape, 1 / (shape * settings.rate_hz))
        yield now_s


def traced_arrivals(path: Path, settings: Settings) -> Iterator[float]:
    """Times of arrival from a CSV file with a column TIMESTAMP, in seconds since the first.

    They keep the pattern of the file's first requests, but are stretched to the rate of the settings: the original is
    the traffic of a whole service, too much for a node that loads models.
    """
    with path.open(newline="") as file:
        rows = itertools.islice(csv.DictReader(file), settings.num_requests)
        # Python parses microseconds; the trace has one digit more.
        stamps = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    stretch = len(stamps) / settings.rate_hz / max(1e-9, stamps[-1] - stamps[0])
    yield from ((stamp - stamps[0]) * stretch for stamp in stamps)


def assigned(arrivals_s: Iterator[float], settings: Settings) -> list[tuple[float, int]]:
    """A model for each arrival, with Zipf-distributed popularity."""
    chance = random.Random(f"popularity {settings.seed}")
    weights = [1 / (rank + 1) ** settings.zipf for rank in range(settings.num_models)]
    return [(arrival_s, chance.choices(range(settings.num_models), weights)[0]) for arrival_s in arrivals_s]


def simulate(settings: Settings, trace: Path | None = None) -> list[Result]:
    """Simulate the same traffic under each policy.

    Raises:
        AssertionError: an invariant of the cache is violated.
    """
    arrivals_s = random_arrivals(settings) if trace is None else traced_arrivals(trace, settings)
    traffic = assigned(arrivals_s, settings)
    models = random_models(settings)
    return [Simulation(settings, models, policy).run(traffic) for policy in POLICIES]


def table(results: list[Result]) -> str:
    """The results as text, one line per policy."""
    lines = ["policy  loads  byte hit rate  load time: mean      p50      p99  waiting"]
    for result in results:
        times_s = sorted(result.load_times_s)
        mean_s, p50_s, p99_s = statistics.fmean(times_s), times_s[len(times_s) // 2], times_s[len(times_s) * 99 // 100]
        lines.append(
            f"{result.policy:6}  {len(times_s):5}  {result.hit_rate:13.1%}  {mean_s:13.2f} s  {p50_s:5.2f} s  "
            f"{p99_s:5.1f} s  {sum(result.waits_s):5.0f} s"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.sim", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="CSV with TIMESTAMP,ContextTokens,GeneratedTokens; else bursts")
    parser.add_argument("--models", type=int, default=DEFAULTS.num_models, help="checkpoints")
    parser.add_argument("--requests", type=int, default=DEFAULTS.num_requests, help="requests at most")
    parser.add_argument("--rate-hz", type=float, default=DEFAULTS.rate_hz, help="requests a second")
    parser.add_argument("--pool-gib", type=int, default=DEFAULTS.pool_nbytes // GIB)
    parser.add_argument("--validate-every", type=int, default=DEFAULTS.validate_every, help="events")
    options = parser.parse_args(arguments)
    settings = Settings(
        options.seed,
        num_models=options.models,
        num_requests=options.requests,
        rate_hz=options.rate_hz,
        pool_nbytes=options.pool_gib * GIB,
        validate_every=options.validate_every,
    )
    print(f"seed {settings.seed}, {settings.num_models} checkpoints, pool {options.pool_gib} GiB")
    try:
        print(table(simulate(settings, options.trace)))
    except AssertionError as error:
        print(f"an invariant broke with seed {settings.seed}: {error!r}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
