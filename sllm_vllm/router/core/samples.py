"""Samples of what was measured, and the number or line that is believed of them. Pure; for the estimator.

A number is the weighted median of its last samples, so that one strange sample changes nothing and a lasting change is
followed after three.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate, islice
from typing import Generic, TypeVar

SAMPLE_WEIGHTS = (1, 1, 2, 2, 3, 3, 4, 4)
"""The newest last. No one sample outweighs the others, however few there are; of eight, the newest three do."""

POINTS_MAX = 16
"""Of a line. Its fit is sound while at most four of them lie."""

SPREAD_MIN = 0.1
"""Two points tell a slope if they are this part of the largest x apart; nearer ones tell the noise."""

SLOPES_MIN = 3

RECORD_KEYS_MAX = 4_096
"""Of each table that a record holds, the most recently used."""

SOUND_MAX = 1e18
"""Of a sample. More is rubbish, and sums and rates of less stay finite."""

Key = tuple[str | None, str | None]
"""Model and node; None: any."""

Point = tuple[int, float]
"""Tokens or bytes, and the seconds they took."""

Line = tuple[float, float]
"""Slope, in seconds a token or byte, and offset, in seconds."""


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


def is_sound(value: float) -> bool:
    return not isinstance(value, bool) and 0 <= value < SOUND_MAX


class Track:
    """The last samples of one number, and their median."""

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
            case [int(x), int() | float() as y] if is_sound(x) and is_sound(y):
                self.note((x, y))


Entry = TypeVar("Entry", Track, FittedLine)


class Table(Generic[Entry]):
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


def note(table: Table[Track], keys: tuple[Key, ...], value: float) -> None:
    if is_sound(value):
        for key in keys:
            table.entry(key).note(value)


def note_point(table: Table[FittedLine], keys: tuple[Key, ...], point: Point) -> None:
    if all(is_sound(value) for value in point):
        for key in keys:
            table.entry(key).note(point)
