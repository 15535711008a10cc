"""Finds the members of a JSON object without building its values, within bounds of depth and number. Pure.

Works slice by slice with numpy, which lets other threads run: 32 MiB take about 0.3 s in total, and no step more than
a few milliseconds. Only strings and brackets are checked; the rest of each value is left to the engine.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SLICE_NBYTES = 1 << 18
_QUOTE, _COMMA, _COLON, _BACKSLASH = b'",:\\'
_SPACE = b" \t\n\r"
_DELTA = np.zeros(256, np.int8)
_DELTA[list(b"[{")] = 1
_DELTA[list(b"]}")] = -1


class NotJson(ValueError):
    """The text is not a JSON object; the message says where it is wrong, for the client."""


class TooMuch(ValueError):
    """A bound is exceeded; the message says which, for the client."""


class NotUtf8(ValueError):
    """The text is not UTF-8. ``at``: approximate position of the first wrong byte."""

    def __init__(self, at: int) -> None:
        super().__init__(f"byte {at} is wrong")
        self.at = at


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """Limits of an object: nesting ``depth``, number of ``containers`` (arrays and objects), ``members`` at its top."""

    depth: int
    containers: int
    members: int


@dataclass(frozen=True, slots=True)
class JsonMember:
    """A member of the top-level object: its name as written, with quotes, and the position of its value."""

    name: bytes
    start: int
    end: int


def scan_members(body: bytes | memoryview, bounds: JsonLimits) -> Iterator[JsonMember]:
    """The members of the JSON object in a body.

    Raises:
        NotJson, TooMuch, NotUtf8: see there. ``NotJson`` may come after some members were returned.
    """
    marks = _Marks(bounds)
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(body), SLICE_NBYTES):
        piece = bytes(body[at : at + SLICE_NBYTES])
        try:
            decoder.decode(piece, at + SLICE_NBYTES >= len(body))
        except UnicodeDecodeError as error:
            raise NotUtf8(at + error.start) from None
        marks.feed(piece)
    return _members(body, marks)


@dataclass(slots=True)
class _Marks:
    """Positions of the commas and colons at the top level; ``feed`` it slice by slice."""

    bounds: JsonLimits
    begin: int | None = None
    """Position of the first bracket."""
    end: int | None = None
    """Position of the bracket that closes it."""
    marks: list[int] = field(default_factory=list)
    _at: int = 0
    _depth: int = 0
    _num_containers: int = 0
    _is_in_string: bool = False
    _is_escaped: bool = False
    """The last slice ended with an odd number of backslashes, which escape the next byte."""

    def feed(self, piece: bytes) -> None:
        if self._is_in_string and _QUOTE not in piece:  # a shortcut, mostly for base64
            self._is_escaped = _is_odd(piece, self._is_escaped)
        else:
            self._mark(np.frombuffer(piece, np.uint8), piece)
        self._at += len(piece)

    def _mark(self, data: NDArray[np.uint8], piece: bytes) -> None:
        quotes = data == _QUOTE
        if self._is_escaped or _BACKSLASH in piece:
            _drop_escaped(quotes, data, self._is_escaped)
            self._is_escaped = _is_odd(piece, self._is_escaped)
        inside = np.cumsum(quotes, dtype=np.uint8) & 1 != self._is_in_string
        delta = _DELTA[data]
        delta[inside] = 0
        depth = np.cumsum(delta, dtype=np.int32) + self._depth
        self._check(delta, depth)
        if self._depth <= 1 or depth.min() <= 1:
            self._note(data, delta, depth=depth, inside=inside)
        self._is_in_string = bool(inside[-1])
        self._depth = int(depth[-1])

    def _check(self, delta: NDArray[np.int8], depth: NDArray[np.int32]) -> None:
        if depth.max() > self.bounds.depth:
            raise TooMuch(f"is nested too deeply, more than {self.bounds.depth} times")
        self._num_containers += int(np.count_nonzero(delta == 1))
        if self._num_containers > self.bounds.containers:
            raise TooMuch(f"has more than {self.bounds.containers} arrays and objects")

    def _note(
        self,
        data: NDArray[np.uint8],
        delta: NDArray[np.int8],
        *,
        depth: NDArray[np.int32],
        inside: NDArray[np.bool_],
    ) -> None:
        if self.begin is None and delta.any():
            self.begin = self._at + int(np.argmax(delta != 0))
        ends = np.flatnonzero((depth <= 0) & (delta == -1))
        if len(ends):
            if self.end is not None or len(ends) > 1:
                raise NotJson("a bracket closes what is not open")
            self.end = self._at + int(ends[0])
        is_mark = ((data == _COMMA) | (data == _COLON)) & (depth == 1) & ~inside
        self.marks += (np.flatnonzero(is_mark) + self._at).tolist()
        if len(self.marks) > 2 * self.bounds.members:
            raise TooMuch(f"has more than {self.bounds.members} members")


def _is_odd(piece: bytes, was_odd: bool) -> bool:
    """Whether a text ends with an odd number of backslashes; if it has nothing else, those before it count, too."""
    num = len(piece) - len(piece.rstrip(b"\\"))
    return bool(num % 2) != (was_odd and num == len(piece))


def _drop_escaped(quotes: NDArray[np.bool_], data: NDArray[np.uint8], was_odd: bool) -> None:
    """Unmark escaped quotes: those after an odd number of backslashes."""
    positions = np.arange(len(data), dtype=np.int32)
    others = np.maximum.accumulate(np.where(data != _BACKSLASH, positions, -1 - was_odd))
    at = np.flatnonzero(quotes)
    last_other = np.where(at > 0, others[at - 1], -1 - was_odd)
    quotes[at[(at - 1 - last_other) % 2 == 1]] = False


def _members(body: bytes | memoryview, marks: _Marks) -> Iterator[JsonMember]:
    begin, end = marks.begin, marks.end
    if begin is None or _trimmed(body, 0, begin) != (begin, begin) or body[begin : begin + 1] != b"{":
        raise NotJson("it must be an object")
    if end is None or body[end : end + 1] != b"}":
        raise NotJson("its end is missing")
    if _trimmed(body, end + 1, len(body)) != (len(body), len(body)):
        raise NotJson("something follows its end")
    edges = [begin, *marks.marks, end]
    if len(edges) == 2 and _trimmed(body, begin + 1, end) == (end, end):
        return
    if len(edges) % 2 == 0:
        raise NotJson("a member lacks its value")
    for before, colon, after in zip(edges[:-1:2], edges[1::2], edges[2::2], strict=True):
        if body[colon : colon + 1] != b":" or (after != end and body[after : after + 1] != b","):
            raise NotJson(f"a member is wrong at byte {before + 1}")
        name_at, name_end = _trimmed(body, before + 1, colon)
        start, stop = _trimmed(body, colon + 1, after)
        name = bytes(body[name_at:name_end])
        if len(name) < 2 or name[:1] != b'"' or name[-1:] != b'"' or start == stop:
            raise NotJson(f"a member is wrong at byte {before + 1}")
        yield JsonMember(name, start, stop)


def _trimmed(body: bytes | memoryview, start: int, end: int) -> tuple[int, int]:
    """A range without the white space at its ends; ``(end, end)`` if there is nothing else."""
    while start < end and body[start] in _SPACE:
        piece = bytes(body[start : min(end, start + SLICE_NBYTES)])
        start += len(piece) - len(piece.lstrip(_SPACE))
    while start < end and body[end - 1] in _SPACE:
        piece = bytes(body[max(start, end - SLICE_NBYTES) : end])
        end -= len(piece) - len(piece.rstrip(_SPACE))
    return start, end
