"""Samples of measurements, and the number or line estimated from them. Pure; used by the estimator.

A number is the weighted median of its last samples, so that a single outlier changes nothing and a lasting change is
followed after three samples.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate, islice
from typing import Generic, TypeVar

SAMPLE_WEIGHTS = (1, 1, 2, 2, 3, 3, 4, 4)
"""Weights, newest last. No single sample outweighs the others, however few there are; of eight, the newest three do."""

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
