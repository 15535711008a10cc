"""How long starts, stops and first tokens take, learned from past ones. Pure; owned by the router's core.

Every term is a median or line fitted to its last samples. A term without samples falls back to the
nearest one with samples: the same model on other nodes, other models on the same node, other models on other nodes,
and finally the defaults.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from math import exp, inf, log
from statistics import stdev
from typing import Generic, TypeVar

from sllm_vllm.router.core.facts import Estimate, ModelSpec, PrefillSample, ResumeSample, StartSample, Term, Tier

SAMPLE_WEIGHTS = (1, 1, 2, 2, 3, 3, 4, 4)
"""Weights of a number's last samples, newest last. Their weighted median is the estimate, so that a single outlier
changes nothing and a lasting change is followed after three samples.

No single sample outweighs the others, however few there are; of eight, the newest three do.
"""

POINTS_MAX = 16
"""Points kept per line. The fit tolerates up to four outliers among them."""

SPREAD_MIN = 0.1
"""Two points give a slope if they are this share of the largest x apart; closer ones give mostly noise."""

SLOPES_MIN = 3

RECORD_KEYS_MAX = 4_096
"""Keys of each table that are written to a record: the most recently used."""

SOUND_MAX = 1e18
"""Samples from this value on are rejected as invalid; sums and rates of smaller ones stay finite."""

Key = tuple[str | None, str | None]
"""Model and node; None means any."""

Point = tuple[int, float]
"""Tokens or bytes, and the seconds they took."""

Line = tuple[float, float]
"""Slope, in seconds per token or byte, and offset, in seconds."""


def weighted_median(samples: Sequence[float]) -> float:
    """Return the lower weighted median of the last eight samples or fewer; ``samples`` has the newest last."""
    newest = samples[-len(SAMPLE_WEIGHTS) :]
    ranked = sorted(zip(newest, SAMPLE_WEIGHTS[-len(newest) :], strict=True))
    passed = list(accumulate(weight for _, weight in ranked))
    return ranked[bisect_left(passed, passed[-1] / 2)][0]


def _median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def fit_line(points: Sequence[Point], *, guess: Line) -> Line:
    """Return the slope and offset of y over x, neither negative, after Theil and Sen: the median slope of all pairs.

    If the points are too close together for a slope, the guessed offset is used, and each point gives a slope from it.
    A point not above the guessed offset gives no slope; the guessed one is used for it.
    """
    apart = SPREAD_MIN * max(x for x, _ in points)
    slopes = [
        (other_y - y) / (other_x - x)
        for index, (x, y) in enumerate(points)
        for other_x, other_y in points[:index]
        if abs(other_x - x) > apart
    ]
    if len(slopes) < SLOPES_MIN:
        slope, offset = guess
        slopes = [(y - offset) / x if y > offset else slope for x, y in points if x > 0] or [slope]
    slope = max(0.0, _median(slopes))
    offset = _median([y - slope * x for x, y in points])
    if offset < 0:  # fit a line through the origin instead
        return _median([y / x for x, y in points if x > 0]), 0.0
    return slope, offset


def is_sound(value: float) -> bool:
    return not isinstance(value, bool) and 0 <= value < SOUND_MAX


class Track:
    """The last samples of one number, and their weighted median."""

    __slots__ = ("samples", "value")

    def __init__(self) -> None:
        self.samples: tuple[float, ...] = ()
        self.value = 0.0

    def note(self, sample: float) -> None:
        self.samples = (*self.samples, sample)[-len(SAMPLE_WEIGHTS) :]
        self.value = weighted_median(self.samples)

    def restore(self, sample: object) -> None:
        if isinstance(sample, int | float) and is_sound(sample):
            self.note(sample)


class FittedLine:
    """The last points of one line. Fitted on demand, because prefills are recorded more often than estimated."""

    __slots__ = ("_fit", "_guess", "samples")

    def __init__(self, guess: Line) -> None:
        self.samples: tuple[Point, ...] = ()
        self._guess = guess
        self._fit: Line | None = None

    def note(self, sample: Point) -> None:
        self.samples = (*self.samples, sample)[-POINTS_MAX:]
        self._fit = None

    def at(self, x: float) -> float:
        if self._fit is None:
            self._fit = fit_line(self.samples, guess=self._guess)
        slope, offset = self._fit
        return slope * x + offset

    def restore(self, sample: object) -> None:
        match sample:  # a list if it came from JSON
            case [int(x), int() | float() as y] if is_sound(x) and is_sound(y):
                self.note((x, y))


Entry = TypeVar("Entry", Track, FittedLine)


class Table(Generic[Entry]):
    """What was learned about one term, by key, least recently used first."""

    def __init__(self, make: Callable[[], Entry], keys_max: int) -> None:
        self._make: Callable[[], Entry] = make
        self._keys_max = keys_max
        self._entries: OrderedDict[Key, Entry] = OrderedDict()

    def find(self, *keys: Key) -> Entry | None:
        """Return the entry of the first of these keys that has one; None if none has."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return entry
        return None

    def entry(self, key: Key) -> Entry:
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = self._make()
            if len(self._entries) > self._keys_max:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return entry

    def to_rows(self) -> list[list[object]]:
        newest = islice(reversed(self._entries.items()), RECORD_KEYS_MAX)
        rows: list[list[object]] = [[model, node, list(entry.samples)] for (model, node), entry in newest]
        return rows[::-1]

    def restore(self, rows: object) -> None:
        for row in rows if isinstance(rows, list) else []:
            match row:
                case [str() | None as model, str() | None as node, list() as samples]:
                    entry = self._make()
                    for sample in samples:
                        entry.restore(sample)
                    if entry.samples:
                        self._entries[model, node] = entry
        while len(self._entries) > self._keys_max:
            self._entries.popitem(last=False)


def note(table: Table[Track], keys: tuple[Key, ...], value: float) -> None:
    if is_sound(value):
        for key in keys:
            table.entry(key).note(value)


def note_point(table: Table[FittedLine], keys: tuple[Key, ...], point: Point) -> None:
    if all(is_sound(value) for value in point):
        for key in keys:
            table.entry(key).note(point)


STEADY_SAMPLES = 2
"""The value over all nodes weighs as much as this many samples on one node."""

KEYS_MAX = 32_768
"""Keys per table, some 0.5 KiB each; the least recently used are dropped."""

RECORD_VERSION = 1

Z_99 = 2.326
"""The normal distribution's 99th percentile, in standard deviations."""
SIGMA_MIN = 0.5
SIGMA_UNSEEN = 1.0
"""Standard deviation of the logarithm of a start's time, for a model with fewer than two starts: twice the expected
time is common, ten times it is the 99th percentile."""


@dataclass(frozen=True, slots=True)
class StartDefaults:
    """What is assumed until there are samples."""

    process_warm_s: float = 2.0
    process_cold_s: float = 12.0
    init_s: float = 10.0
    weights_fixed_s: float = 0.3
    """Fixed part of every load, whatever its size."""
    tier_bps: Mapping[Tier, float] = field(
        default_factory=lambda: {Tier.HOST: 10e9, Tier.DISK: 2e9, Tier.REMOTE: 0.2e9}
    )
    nbytes: int = 16_000_000_000
    """Assumed for a model of unknown size."""
    prefill_fixed_s: float = 0.05
    prefill_token_s: float = 0.0002
    stop_s: float = 3.0


DEFAULTS = StartDefaults()

_FARTHER = (Tier.DISK, Tier.REMOTE)
"""The next slower tier, indexed by tier."""

QUEUE, PROCESS, INIT, WEIGHTS, PREFILL = Term  # reading an attribute of an Enum takes three times as long


def _keys(model: str, node: str) -> tuple[Key, ...]:
    """Return the keys to look up, the best first."""
    return (model, node), (model, None), (None, node), (None, None)


def _steadied(table: Table[Track], model: str, node: str) -> float | None:
    """Return what a term takes for a model on a node, shrunk towards its value over all nodes.

    With few samples the value over all nodes dominates, so that nodes are distinguished by real differences and not by
    the noise of one start. None if there are no samples at all.
    """
    here, anywhere = table.find((model, node)), table.find((model, None), (None, node), (None, None))
    if here is None or anywhere is None:
        return None if anywhere is None else anywhere.value
    num = len(here.samples)
    return (num * here.value + STEADY_SAMPLES * anywhere.value) / (num + STEADY_SAMPLES)


class Estimator:
    """What is known about starts, stops and prefills. Samples that are negative or not numbers are ignored."""

    def __init__(self, defaults: StartDefaults = DEFAULTS, *, keys_max: int = KEYS_MAX) -> None:
        self.defaults = defaults
        self._keys_max = keys_max
        self._process = {is_warm: self._tracks() for is_warm in (False, True)}
        self._init = self._tracks()
        self._stop = self._tracks()
        self._startup = self._tracks()
        self._nbytes = self._tracks()
        self._hops = tuple(self._tracks() for _ in Tier)  # by tier; faster than a dict: hashing an Enum is slow
        self._weights = tuple(self._tracks() for _ in Tier)
        fixed_s = defaults.weights_fixed_s
        self._weights_lines = tuple(self._lines((1 / defaults.tier_bps[tier], fixed_s)) for tier in Tier)
        self._prefill = self._lines((defaults.prefill_token_s, defaults.prefill_fixed_s))
        self._resume = self._lines((defaults.prefill_token_s, defaults.prefill_fixed_s))

    def observe_start(self, sample: StartSample) -> None:
        """Learn from a start that succeeded."""
        model, node, tier = sample.model, sample.node, sample.tier
        note(self._process[sample.is_warm], _keys(model, node), sample.process_s)
        note(self._init, _keys(model, node), sample.init_s)
        note(self._weights[tier], ((model, node), (model, None)), sample.weights_s)
        note(self._startup, ((model, None),), sample.process_s + sample.init_s + sample.weights_s)
        if sample.nbytes > 0:
            note(self._nbytes, ((model, None),), sample.nbytes)
            note_point(self._weights_lines[tier], ((None, node), (None, None)), (sample.nbytes, sample.weights_s))

    def observe_prefill(self, sample: PrefillSample) -> None:
        """Learn from a first token that waited for nothing but its prefill."""
        note_point(self._prefill, _keys(sample.model, sample.node), (sample.prompt_tokens, sample.seconds))

    def observe_resume(self, sample: ResumeSample) -> None:
        """Learn from one round of a migration: tokens computed at its target, and the seconds that took."""
        note_point(self._resume, _keys(sample.model, sample.node), (sample.num_tokens, sample.seconds))

    def observe_stop(self, model: str, node: str, seconds: float) -> None:
        """Learn from a stop: ``seconds`` from its order until the slots were free."""
        note(self._stop, _keys(model, node), seconds)

    def observe_hops(self, node: str, bps: Mapping[Tier, float]) -> None:
        """Learn a node's measured bandwidths, in bytes per second from each tier to its devices."""
        for tier, value in bps.items():
            if value > 0:
                note(self._hops[tier], ((None, node),), value)

    def estimate_start(
        self, spec: ModelSpec, node: str, tier: Tier, *, is_warm: bool, prompt_tokens: int = 0, queue_s: float = 0.0
    ) -> Estimate:
        """Estimate a start up to its first token, with ``queue_s`` of waiting before it."""
        defaults = self.defaults
        process_s = _steadied(self._process[is_warm], spec.name, node)
        if process_s is None:
            process_s = defaults.process_warm_s if is_warm else defaults.process_cold_s
        init_s = _steadied(self._init, spec.name, node)
        terms = {
            QUEUE: queue_s,
            PROCESS: process_s,
            INIT: defaults.init_s if init_s is None else init_s,
            WEIGHTS: self.weights_s(spec, node, tier),
            PREFILL: self.prefill_s(spec.name, node, prompt_tokens),
        }
        return Estimate(terms)

    def weights_s(self, spec: ModelSpec, node: str, tier: Tier) -> float:
        """Return how long loading the weights occupies the node's load queue.

        An estimate without samples is capped by the one for the next slower tier.
        """
        seen = self._weights[tier].find((spec.name, node))
        if seen is not None:
            return seen.value
        guess_s = self._guess_weights_s(spec, node, tier)
        return guess_s if tier is Tier.REMOTE else min(guess_s, self.weights_s(spec, node, _FARTHER[tier]))

    def _guess_weights_s(self, spec: ModelSpec, node: str, tier: Tier) -> float:
        nbytes = self._nbytes_of(spec)
        if nbytes is not None:
            # 1. Other models were loaded on this node, or 2. the node measured its bandwidth.
            line = self._weights_lines[tier].find((None, node))
            if line is not None:
                return line.at(nbytes)
            hop = self._hops[tier].find((None, node))
            if hop is not None:
                return self.defaults.weights_fixed_s + nbytes / max(1.0, hop.value)
        # 3. The model was loaded on other nodes, or 4. other models were, or 5. nothing was.
        seen = self._weights[tier].find((spec.name, None))
        if seen is not None:
            return seen.value
        nbytes = self.defaults.nbytes if nbytes is None else nbytes
        line = self._weights_lines[tier].find((None, None))
        return self._default_weights_s(nbytes, tier) if line is None else line.at(nbytes)

    def prefill_s(self, model: str, node: str, prompt_tokens: int) -> float:
        """Return what a first token takes on an engine that is ready and has room; never less for more tokens."""
        line = self._prefill.find(*_keys(model, node))
        if line is not None:
            return line.at(prompt_tokens)
        return self.defaults.prefill_fixed_s + self.defaults.prefill_token_s * prompt_tokens

    def resume_s(self, model: str, node: str, num_tokens: int) -> float:
        """Return how long until a migrated request with ``num_tokens``, prompt and output, resumes on the node.

        The model is a (t_in + t_out) + b, as in ServerlessLLM (section 6). Before the first migration it is the time of
        a prefill.
        """
        line = self._resume.find(*_keys(model, node))
        return self.prefill_s(model, node, num_tokens) if line is None else line.at(num_tokens)

    def stop_s(self, model: str, node: str) -> float:
        """Return the seconds from the order to stop until the slots are free."""
        stop = self._stop.find(*_keys(model, node))
        return self.defaults.stop_s if stop is None else stop.value

    def startup_s(self, spec: ModelSpec) -> float:
        """Return the model's typical startup time over all nodes; before its first start, a warm start from disk."""
        startup = self._startup.find((spec.name, None))
        if startup is not None:
            return startup.value
        nbytes = spec.nbytes or self.defaults.nbytes
        weights_s = self._default_weights_s(nbytes, Tier.DISK)
        return self.defaults.process_warm_s + self.defaults.init_s + weights_s

    def startup_p99_s(self, model: str, expected_s: float) -> float:
        """Return the 99th percentile of a start expected to take ``expected_s``, assuming a log-normal distribution.

        Sigma is taken from the model's last starts, between ``SIGMA_MIN`` and ``SIGMA_UNSEEN``; before the second start
        it is ``SIGMA_UNSEEN``. Infinite before the first start, when ``expected_s`` is from other models or defaults.
        """
        startup = self._startup.find((model, None))
        logs = [log(max(seconds, 0.01)) for seconds in startup.samples] if startup is not None else []
        if not logs:
            return inf
        sigma = max(SIGMA_MIN, stdev(logs)) if len(logs) > 1 else SIGMA_UNSEEN
        return expected_s * exp(Z_99 * min(sigma, SIGMA_UNSEEN))

    def to_record(self) -> dict[str, object]:
        """Return what was learned, most recently used keys only, for storing as JSON."""
        tables = {name: table.to_rows() for name, table in self._tables().items()}
        return {"version": RECORD_VERSION, "tables": tables}

    @classmethod
    def from_record(cls, record: object, defaults: StartDefaults = DEFAULTS, *, keys_max: int = KEYS_MAX) -> Estimator:
        """Restore an estimator from the sound parts of a record; never raises."""
        estimator = cls(defaults, keys_max=keys_max)
        match record:
            case {"version": int(version), "tables": dict(rows)} if version == RECORD_VERSION:
                for name, table in estimator._tables().items():
                    table.restore(rows.get(name))
        return estimator

    def _tables(self) -> dict[str, Table[Track] | Table[FittedLine]]:
        named: dict[str, Table[Track] | Table[FittedLine]] = {
            "process_cold": self._process[False],
            "process_warm": self._process[True],
            "init": self._init,
            "stop": self._stop,
            "startup": self._startup,
            "nbytes": self._nbytes,
            "prefill": self._prefill,
            "resume": self._resume,
        }
        for tier in Tier:
            word = tier.name.lower()
            named |= {
                f"hop_{word}": self._hops[tier],
                f"weights_{word}": self._weights[tier],
                f"weights_line_{word}": self._weights_lines[tier],
            }
        return named

    def _tracks(self) -> Table[Track]:
        return Table(Track, self._keys_max)

    def _lines(self, guess: Line) -> Table[FittedLine]:
        return Table(lambda: FittedLine(guess), self._keys_max)

    def _nbytes_of(self, spec: ModelSpec) -> float | None:
        """Return the size from the deployment, else from the model's starts; None if unknown."""
        if spec.nbytes > 0:
            return spec.nbytes
        told = self._nbytes.find((spec.name, None))
        return None if told is None else told.value

    def _default_weights_s(self, nbytes: float, tier: Tier) -> float:
        return self.defaults.weights_fixed_s + nbytes / self.defaults.tier_bps[tier]
