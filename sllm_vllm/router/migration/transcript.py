"""What a client was sent of a stream, and the rest of that stream, cut from a target's that starts over. Pure.

A target's answer repeats everything, split into other pieces than the source's. Every text and every list of a choice
only grows. So from each of the target's the beginning is dropped, up to the length that the client has; what remains
of an event is passed on. Events on both sides are those of OpenAI's completions and chats, as vLLM writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

FOLD_NBYTES = 1 << 14
"""Up to this size, events are kept as sent; then they are measured and dropped. Short answers are parsed only if they
continue at another engine.
"""
EVENT_END = b"\n\n"
_SHAPES_MAX = 4
"""Shapes tried per part of a stream. If events differ in more than a text, the search costs more than it saves."""
_DATA = b"data: "
_DONE = b"data: [DONE]"
_CREATED = re.compile(rb'"created":\s*(\d{1,12})')  # quotes inside texts are escaped, so no text can match
_GROWING = frozenset({"text", "content", "reasoning", "reasoning_content", "refusal", "arguments"})
_NAMING = frozenset({"index"})
"""Members that identify a choice or a call in each event."""

Path = tuple[str | int, ...]
"""Path of a value within a choice; a tool call is identified by its index."""


class NotAligned(Exception):
    """The target's stream does not continue the client's; the message says what it does instead."""


def split_events(data: bytes) -> tuple[bytes, bytes]:
    """Split data into whole events and the beginning of the next one."""
    end = data.rfind(EVENT_END)
    return (b"", data) if end < 0 else (data[: end + len(EVENT_END)], data[end + len(EVENT_END) :])


class Transcript:
    """What one client was sent. Takes only whole events."""

    def __init__(self) -> None:
        self.created: bytes | None = None
        """The time of creation that the first engine sent; None until it was sent."""
        self._pieces: list[bytes] = []
        self._nbytes = 0
        self._lengths: dict[int, dict[Path, int]] = {}
        """By choice: the length of each text and list, and how often any other value was sent."""
        self._shape: _Shape | None = None
        """The shape of the latest events that were alike."""

    def note(self, events: bytes) -> None:
        """Record events that are being sent to the client."""
        if self.created is None and (found := _CREATED.search(events)):
            self.created = found[1]
        self._pieces.append(events)
        self._nbytes += len(events)
        if self._nbytes > FOLD_NBYTES:
            self._fold()

    def told(self) -> dict[int, dict[Path, int]]:
        """Lengths of what the client was sent, by choice and path."""
        self._fold()
        return {index: dict(lengths) for index, lengths in self._lengths.items()}

    def _fold(self) -> None:
        events = b"".join(self._pieces)
        self._pieces.clear()
        self._nbytes = 0
        shapes = [self._shape] if self._shape is not None else []
        for event in events.split(EVENT_END):
            if shapes and shapes[-1].take(event):
                continue
            parsed = _parsed(event)
            for index, choice in _choices(parsed):
                self._add(index, choice)
            if len(shapes) < _SHAPES_MAX and (shape := _Shape.of(event, parsed)) is not None:
                shapes.append(shape)
        for shape in shapes:
            shape.tell(self._lengths)
        self._shape = shapes[-1] if shapes else None

    def _add(self, index: int, choice: dict[str, Any]) -> None:
        lengths = self._lengths.setdefault(index, {})
        for path, value in _leaves(choice):
            lengths[path] = lengths.get(path, 0) + (len(value) if _grows(path, value) else 1)


class _Shape:
    """What many events in a row have in common: everything but one text of one choice. Such events are counted without
    parsing them, in a third of the time.

    Args:
        head, tail: what precedes and follows the text, quotes included.
        path: of the text.
        steps: by path, what each such event adds besides the text.
    """

    def __init__(self, head: bytes, tail: bytes, *, index: int, path: Path, steps: dict[Path, int]) -> None:
        self._head = head
        self._tail = tail
        self._index = index
        self._path = path
        self._steps = steps
        self._texts: list[bytes] = []
        self._num_chars = 0
        self._num = 0

    @classmethod
    def of(cls, event: bytes, parsed: dict[str, Any]) -> _Shape | None:
        """The shape of an event with one choice and one text; None for any other event."""
        choices = list(_choices(parsed))
        if len(choices) != 1:
            return None
        index, choice = choices[0]
        leaves = list(_leaves(choice))
        texts = [path for path, value in leaves if isinstance(value, str) and path[-1] in _GROWING]
        if len(texts) != 1:
            return None
        found = list(re.finditer(rb'"%b":\s*"((?:[^"\\]|\\.)*+)"' % str(texts[0][-1]).encode(), event))
        if len(found) != 1:
            return None
        steps = {path: len(value) if _grows(path, value) else 1 for path, value in leaves if path != texts[0]}
        start, end = found[0].span(1)
        return cls(event[:start], event[end:], index=index, path=texts[0], steps=steps)

    def take(self, event: bytes) -> bool:
        """Count an event if it has this shape; returns whether it has."""
        if len(event) < len(self._head) + len(self._tail) or not event.startswith(self._head):
            return False
        if not event.endswith(self._tail):
            return False
        text = event[len(self._head) : len(event) - len(self._tail)]
        if b"\\" not in text and b'"' not in text:
            self._texts.append(text)
        else:
            try:
                self._num_chars += len(json.loads(f'"{text.decode()}"'))
            except ValueError:  # the text ends earlier, so the event has another shape
                return False
        self._num += 1
        return True

    def tell(self, lengths: dict[int, dict[Path, int]]) -> None:
        """Add what was counted since the last call to ``lengths``."""
        if not self._num:
            return
        ours = lengths.setdefault(self._index, {})
        for path, step in self._steps.items():
            ours[path] = ours.get(path, 0) + self._num * step
        num_chars = self._num_chars + len(b"".join(self._texts).decode("utf-8", "replace"))
        ours[self._path] = ours.get(self._path, 0) + num_chars
        self._num = self._num_chars = 0
        self._texts.clear()


class Continuation:
    """The rest of a stream: takes what a target sends, and returns what the client lacks.

    Args:
        transcript: what the client has; nothing else may be sent to the client meanwhile.
    """

    def __init__(self, transcript: Transcript) -> None:
        self._told = transcript.told()
        self._seen: dict[int, dict[Path, int]] = {}
        self._is_even = not self._told
        """The target has sent all that the client has: further events pass unchanged."""
        self._has_begun = False
        """Something was passed to the client. From then on an error passes, too, as in any answer."""
        self._rest = b""
        self._created = transcript.created
        self._own_created: bytes | None = None
        self._shown_created = b""

    @property
    def is_even(self) -> bool:
        """Whether the target has sent all that the client has."""
        return self._is_even

    def feed(self, data: bytes) -> bytes:
        """Take a piece of the target's stream; returns whole events for the client, possibly none.

        Raises:
            NotAligned: the stream has an error, or ends before it has reached what the client has.
        """
        events, self._rest = split_events(self._rest + data)
        if not events:
            return b""
        if not self._has_begun:
            events = b"".join(self._cut_all(events))
        return self._dated(events)

    def _cut_all(self, events: bytes) -> Iterator[bytes]:
        *whole, _ = events.split(EVENT_END)
        for event in whole:
            cut = event if self._has_begun else self._cut(event)
            if cut is not None:
                self._has_begun = self._has_begun or self._is_even
                yield cut + EVENT_END

    def _cut(self, event: bytes) -> bytes | None:
        """The part of an event that the client lacks; None if it lacks nothing."""
        parsed = _parsed(event)
        if "error" in parsed:
            raise NotAligned(f"it answers with an error: {_message_of(parsed)}")
        if self._is_even:
            return event
        if event.startswith(_DONE):
            raise NotAligned("its stream ended before it was where the client is")
        is_new = False
        for index, choice in _choices(parsed):
            told, seen = self._told.get(index, {}), self._seen.setdefault(index, {})
            is_new |= _cut_value(choice, (), told=told, seen=seen)
        self._is_even = all(
            self._seen.get(index, {}).get(path, 0) >= length
            for index, lengths in self._told.items()
            for path, length in lengths.items()
        )
        return _DATA + json.dumps(parsed, ensure_ascii=False, separators=(",", ":")).encode() if is_new else None

    def _dated(self, events: bytes) -> bytes:
        """The events with the time of creation that the client was sent first."""
        if self._created is None or not events:
            return events
        if self._own_created is None:
            found = _CREATED.search(events)
            if found is None:
                return events
            self._own_created = found[0]
            self._shown_created = found[0].removesuffix(found[1]) + self._created
        return events.replace(self._own_created, self._shown_created)


def _parsed(event: bytes) -> dict[str, Any]:
    """The JSON object of an event; empty if it has none."""
    data = event.lstrip(b"\r\n")
    if not data.startswith(_DATA) or data.startswith(_DONE):
        return {}
    try:
        found = json.loads(data[len(_DATA) :])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _choices(parsed: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for choice in parsed.get("choices") or ():
        yield int(choice.get("index", 0)), choice


def _message_of(parsed: dict[str, Any]) -> str:
    error = parsed["error"]
    return str(error.get("message", "")) if isinstance(error, dict) else str(error)


def _grows(path: Path, value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and path[-1] in _GROWING)


def _is_call_list(path: Path, value: object) -> bool:
    return isinstance(value, list) and path[-1:] == ("tool_calls",)


def _leaves(value: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All values of a choice with their paths, except nulls and members that only identify."""
    for key, one in value.items():
        here = (*path, key)
        if one is None or key in _NAMING:
            continue
        if isinstance(one, dict):
            yield from _leaves(one, here)
        elif _is_call_list(here, one):
            for call in one:
                yield from _leaves(call, (*here, int(call.get("index", 0))))
        else:
            yield here, one


def _cut_value(value: dict[str, Any], path: Path, *, told: dict[Path, int], seen: dict[Path, int]) -> bool:
    """Remove what the client has, in place; returns whether anything is left that it lacks."""
    is_new = False
    for key, one in list(value.items()):
        here = (*path, key)
        if one is None or key in _NAMING:
            continue
        if isinstance(one, dict):
            is_new |= _cut_value(one, here, told=told, seen=seen)
        elif _is_call_list(here, one):
            kept = [call for call in one if _cut_value(call, (*here, int(call.get("index", 0))), told=told, seen=seen)]
            value[key] = kept
            is_new |= bool(kept)
            if not kept:
                del value[key]
        else:
            is_new |= _cut_leaf(value, key, here, told=told, seen=seen)
    return is_new


def _cut_leaf(value: dict[str, Any], key: str, path: Path, *, told: dict[Path, int], seen: dict[Path, int]) -> bool:
    one, num_seen, num_told = value[key], seen.get(path, 0), told.get(path, 0)
    if _grows(path, one):
        seen[path] = num_seen + len(one)
        value[key] = one[max(0, num_told - num_seen) :]
        return bool(value[key])
    seen[path] = num_seen + 1
    if num_seen < num_told:
        del value[key]
        return False
    return True
