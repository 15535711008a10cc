"""How long starts, stops and first tokens take, learned from those that were. Pure; owned by the router's core.

Every term is the weighted median of its last samples, so that one strange start changes nothing and a lasting change is
followed after three. What was never seen is taken from the nearest thing that was: the same model on other nodes,
other models on the same node, other models on other nodes, at last the defaults.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Generic, TypeVar

from sllm_vllm.router.core.facts import Estimate, ModelSpec, PrefillSample, ResumeSample, StartSample, Term, Tier

SAMPLE_WEIGHTS = (1, 1, 2, 2, 3, 3, 4, 4)
"""The newest last. No one sample outweighs the others, however few there are; of eight, the newest three do."""

POINTS_MAX = 16
"""Of a line. Its fit is sound while at most four of them lie."""

SPREAD_MIN = 0.1
"""Two points tell a slope if they are this part of the largest x apart; nearer ones tell the noise."""

SLOPES_MIN = 3

KEYS_MAX = 32_768
"""Of each table, some 0.5 KiB each; the least recently used are dropped."""

RECORD_KEYS_MAX = 4_096
"""Of each table that a record holds, the most recently used."""

SOUND_MAX = 1e18
"""Of a sample. More is rubbish, and sums and rates of less stay finite."""

RECORD_VERSION = 1

Key = tuple[str | None, str | None]
"""Model and node; None: any."""

Point = tuple[int, float]
"""Tokens or bytes, and the seconds they took."""

Line = tuple[float, float]
"""Slope, in seconds a token or byte, and offset, in seconds."""


@dataclass(frozen=True, slots=True)
class StartDefaults:
    """What is assumed until the first start tells better."""

    process_warm_s: float = 2.0
    process_cold_s: float = 12.0
    init_s: float = 10.0
    weights_fixed_s: float = 0.3
    """Of every load, however small."""
    tier_bps: Mapping[Tier, float] = field(
        default_factory=lambda: {Tier.HOST: 10e9, Tier.DISK: 2e9, Tier.REMOTE: 0.2e9}
    )
    nbytes: int = 16_000_000_000
    """Of a model whose size nobody knows."""
    prefill_fixed_s: float = 0.05
    prefill_token_s: float = 0.0002
    stop_s: float = 3.0


DEFAULTS = StartDefaults()

QUEUE, PROCESS, INIT, WEIGHTS, PREFILL = Term  # an attribute of an Enum takes thrice as long to read


def weighted_median(samples: Sequence[float]) -> float:
    """The lower weighted median of the newest eight or fewer samples, the newest last."""
    newest = samples[-len(SAMPLE_WEIGHTS) :]
    ranked = sorted(zip(newest, SAMPLE_WEIGHTS[-len(newest) :], strict=True))
    passed = list(accumulate(weight for _, weight in ranked))
    return ranked[bisect_left(passed, passed[-1] / 2)][0]


def _median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def fit_line(points: Sequence[Point], *, guess: Line) -> Line:
    """Slope and offset of y over x, neither negative, after Theil and Sen: the median of the slopes of all pairs.

    If the points are too near to each other for a slope, the offset guessed is taken for theirs; and where that
    explains all they took, they say nothing of a slope: then the one guessed is taken.
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
    if offset < 0:  # then it goes through the origin
        return _median([y / x for x, y in points if x > 0]), 0.0
    return slope, offset


def _is_sound(value: float) -> bool:
    return not isinstance(value, bool) and 0 <= value < SOUND_MAX


class _Track:
    """The last samples of one number, and their median."""

    __slots__ = ("samples", "value")

    def __init__(self) -> None:
        self.samples: tuple[float, ...] = ()
        self.value = 0.0

    def note(self, sample: float) -> None:
        self.samples = (*self.samples, sample)[-len(SAMPLE_WEIGHTS) :]
        self.value = weighted_median(self.samples)

    def restore(self, sample: object) -> None:
        if isinstance(sample, int | float) and _is_sound(sample):
            self.note(sample)


class _Line:
    """The last points of one line. It is fitted when it is asked for, as prefills are told more often than asked."""

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
        match sample:  # a list if it was JSON meanwhile
            case [int(x), int() | float() as y] if _is_sound(x) and _is_sound(y):
                self.note((x, y))


Entry = TypeVar("Entry", _Track, _Line)


class _Table(Generic[Entry]):
    """What was learned of one term, by key, the least recently used first."""

    def __init__(self, make: Callable[[], Entry], keys_max: int) -> None:
        self._make: Callable[[], Entry] = make
        self._keys_max = keys_max
        self._entries: OrderedDict[Key, Entry] = OrderedDict()

    def find(self, *keys: Key) -> Entry | None:
        """What is known for the first of these keys that has anything."""
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


def _keys(model: str, node: str) -> tuple[Key, ...]:
    """Where to look, the best first."""
    return (model, node), (model, None), (None, node), (None, None)


class Estimator:
    """What is known about starts, stops and prefills. Samples that are negative or no numbers are passed over."""

    def __init__(self, defaults: StartDefaults = DEFAULTS, *, keys_max: int = KEYS_MAX) -> None:
        self.defaults = defaults
        self._keys_max = keys_max
        self._process = {is_warm: self._tracks() for is_warm in (False, True)}
        self._init = self._tracks()
        self._stop = self._tracks()
        self._startup = self._tracks()
        self._nbytes = self._tracks()
        self._hops = tuple(self._tracks() for _ in Tier)  # by tier: quicker than a dict, as an Enum's hash is slow
        self._weights = tuple(self._tracks() for _ in Tier)
        fixed_s = defaults.weights_fixed_s
        self._weights_lines = tuple(self._lines((1 / defaults.tier_bps[tier], fixed_s)) for tier in Tier)
        self._prefill = self._lines((defaults.prefill_token_s, defaults.prefill_fixed_s))
        self._resume = self._lines((defaults.prefill_token_s, defaults.prefill_fixed_s))

    def observe_start(self, sample: StartSample) -> None:
        """Learn from a start that came to its end."""
        model, node, tier = sample.model, sample.node, sample.tier
        _note(self._process[sample.is_warm], _keys(model, node), sample.process_s)
        _note(self._init, _keys(model, node), sample.init_s)
        _note(self._weights[tier], ((model, node), (model, None)), sample.weights_s)
        _note(self._startup, ((model, None),), sample.process_s + sample.init_s + sample.weights_s)
        if sample.nbytes > 0:
            _note(self._nbytes, ((model, None),), sample.nbytes)
            _note_point(self._weights_lines[tier], ((None, node), (None, None)), (sample.nbytes, sample.weights_s))

    def observe_prefill(self, sample: PrefillSample) -> None:
        """Learn from a first token that waited for nothing but its prefill."""
        _note_point(self._prefill, _keys(sample.model, sample.node), (sample.prompt_tokens, sample.seconds))

    def observe_resume(self, sample: ResumeSample) -> None:
        """Learn from a round of a move: so many tokens were computed at its target."""
        _note_point(self._resume, _keys(sample.model, sample.node), (sample.num_tokens, sample.seconds))

    def observe_stop(self, model: str, node: str, seconds: float) -> None:
        """Learn from a stop: the seconds from its order until the slots were free."""
        _note(self._stop, _keys(model, node), seconds)

    def observe_hops(self, node: str, bps: Mapping[Tier, float]) -> None:
        """Learn what a node measured: from each tier to its devices."""
        for tier, value in bps.items():
            if value > 0:
                _note(self._hops[tier], ((None, node),), value)

    def estimate_start(
        self, spec: ModelSpec, node: str, tier: Tier, *, is_warm: bool, prompt_tokens: int = 0, queue_s: float = 0.0
    ) -> Estimate:
        """What a start would take up to its first token, with ``queue_s`` of waiting before it."""
        keys = _keys(spec.name, node)
        defaults = self.defaults
        process = self._process[is_warm].find(*keys)
        process_s = defaults.process_warm_s if is_warm else defaults.process_cold_s
        init = self._init.find(*keys)
        terms = {
            QUEUE: queue_s,
            PROCESS: process_s if process is None else process.value,
            INIT: defaults.init_s if init is None else init.value,
            WEIGHTS: self.weights_s(spec, node, tier),
            PREFILL: self.prefill_s(spec.name, node, prompt_tokens),
        }
        return Estimate(terms)

    def weights_s(self, spec: ModelSpec, node: str, tier: Tier) -> float:
        """What a load occupies the node's load queue with."""
        # 1. This load was seen here.
        seen = self._weights[tier].find((spec.name, node))
        if seen is not None:
            return seen.value
        nbytes = self._nbytes_of(spec)
        if nbytes is not None:
            # 2. Others were, or 3. the node measured how fast it is.
            line = self._weights_lines[tier].find((None, node))
            if line is not None:
                return line.at(nbytes)
            hop = self._hops[tier].find((None, node))
            if hop is not None:
                return self.defaults.weights_fixed_s + nbytes / max(1.0, hop.value)
        # 4. It was seen elsewhere, or 5. others were, or 6. nothing was.
        seen = self._weights[tier].find((spec.name, None))
        if seen is not None:
            return seen.value
        nbytes = self.defaults.nbytes if nbytes is None else nbytes
        line = self._weights_lines[tier].find((None, None))
        return self._default_weights_s(nbytes, tier) if line is None else line.at(nbytes)

    def prefill_s(self, model: str, node: str, prompt_tokens: int) -> float:
        """What a first token takes on an engine that is ready and has room; never less for more tokens."""
        line = self._prefill.find(*_keys(model, node))
        if line is not None:
            return line.at(prompt_tokens)
        return self.defaults.prefill_fixed_s + self.defaults.prefill_token_s * prompt_tokens

    def resume_s(self, model: str, node: str, num_tokens: int) -> float:
        """Until a request with so many tokens, prompt and output, goes on at a replica there: a (t_in + t_out) + b, as
        ServerlessLLM has it (section 6). Before the first move it is what a prefill takes."""
        line = self._resume.find(*_keys(model, node))
        return self.prefill_s(model, node, num_tokens) if line is None else line.at(num_tokens)

    def stop_s(self, model: str, node: str) -> float:
        """From the order to stop until the slots are free."""
        stop = self._stop.find(*_keys(model, node))
        return self.defaults.stop_s if stop is None else stop.value

    def startup_s(self, spec: ModelSpec) -> float:
        """What its starts take as a rule, wherever they are; before the first one, a warm one from disk."""
        startup = self._startup.find((spec.name, None))
        if startup is not None:
            return startup.value
        nbytes = spec.nbytes or self.defaults.nbytes
        weights_s = self._default_weights_s(nbytes, Tier.DISK)
        return self.defaults.process_warm_s + self.defaults.init_s + weights_s

    def to_record(self) -> dict[str, object]:
        """What was learned, for JSON: the most recently used of it."""
        tables = {name: table.to_rows() for name, table in self._tables().items()}
        return {"version": RECORD_VERSION, "tables": tables}

    @classmethod
    def from_record(cls, record: object, defaults: StartDefaults = DEFAULTS, *, keys_max: int = KEYS_MAX) -> Estimator:
        """One that knows what is sound in a record, and nothing more; never raises."""
        estimator = cls(defaults, keys_max=keys_max)
        match record:
            case {"version": int(version), "tables": dict(rows)} if version == RECORD_VERSION:
                for name, table in estimator._tables().items():
                    table.restore(rows.get(name))
        return estimator

    def _tables(self) -> dict[str, _Table[_Track] | _Table[_Line]]:
        named: dict[str, _Table[_Track] | _Table[_Line]] = {
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

    def _tracks(self) -> _Table[_Track]:
        return _Table(_Track, self._keys_max)

    def _lines(self, guess: Line) -> _Table[_Line]:
        return _Table(lambda: _Line(guess), self._keys_max)

    def _nbytes_of(self, spec: ModelSpec) -> float | None:
        """As it was deployed, or as its starts said."""
        if spec.nbytes > 0:
            return spec.nbytes
        told = self._nbytes.find((spec.name, None))
        return None if told is None else told.value

    def _default_weights_s(self, nbytes: float, tier: Tier) -> float:
        return self.defaults.weights_fixed_s + nbytes / self.defaults.tier_bps[tier]


def _note(table: _Table[_Track], keys: tuple[Key, ...], value: float) -> None:
    if _is_sound(value):
        for key in keys:
            table.entry(key).note(value)


def _note_point(table: _Table[_Line], keys: tuple[Key, ...], point: Point) -> None:
    if all(_is_sound(value) for value in point):
        for key in keys:
            table.entry(key).note(point)
