"""Parses a configuration's YAML or JSON into values, with the line of every key and all problems. Pure.

YAML is restricted to what a configuration needs: no anchors, aliases, tags or duplicate keys. A plain scalar is a
number only if printing the number gives the same text, so that no digit of a version or a digest is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]

from sllm_vllm.router.config.problems import PROBLEMS_MAX, InvalidConfig, Place, Problem, shortened, with_lines

DEPTH_MAX = 32
"""Deepest nesting of values; no section needs a third of it."""
_TRUE, _FALSE, _NULL = ("true", "yes", "on"), ("false", "no", "off"), ("null", "~", "")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_DECIMAL = re.compile(r"-?[0-9]{1,12}\.[0-9]{1,12}")
_JSON_PART = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")(\s*:)?|[{}\[\],]|[^\s{}\[\],:"]+')
_TOO_DEEP = "it is nested too deeply"
_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LONG_CHARS = 65_536
"""Longer files are read with libyaml, if PyYAML has it: forty times as fast, with shorter messages."""


@dataclass(slots=True)
class Document:
    """A parsed text. ``problems``: those of the text itself; values at their places are meaningless."""

    values: object = None
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def note(self, place: Place, line: int) -> None:
        """Record that the value at ``place`` begins on ``line``."""
        self.lines.setdefault(place, line)

    def add(self, place: Place, problem: str, line: int) -> None:
        """Record a problem.

        Raises:
            InvalidConfig: there are too many problems to continue.
        """
        self.problems.append(Problem(place, problem, line))
        if len(self.problems) > PROBLEMS_MAX:
            raise InvalidConfig(self.problems)

    def fail(self, problem: str, line: int | None = None) -> NoReturn:
        """Raise InvalidConfig with all problems so far and this one, after which the text can't be parsed further."""
        raise InvalidConfig(with_lines([*self.problems, Problem((), problem, line)], {})) from None

    def within(self, place: Place, values: object) -> Document:
        """Return a document of ``values``, with this one's lines and problems moved to ``place``."""
        lines = {(*place, *at): line for at, line in self.lines.items()}
        return Document(values, lines, [replace(one, at=(*place, *one.at)) for one in self.problems])

    def require_valid(self) -> object:
        """Return the values.

        Raises:
            InvalidConfig: the text has problems; has all of them.
        """
        if self.problems:
            raise InvalidConfig(with_lines(self.problems, self.lines))
        return self.values


def read_json(text: str) -> object:
    """Read a JSON document.

    Raises:
        InvalidConfig: it is not valid JSON, is nested too deeply, or has a duplicate key.
    """
    return parse_json(text).require_valid()


# ---------------------------------------------------------------------------------------------------------------- JSON


def parse_json(text: str) -> Document:
    """Parse a JSON document with its lines; duplicate keys are among its problems.

    Raises:
        InvalidConfig: it is not valid JSON, or is nested too deeply.
    """
    document = Document()
    try:
        document.values = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        document.fail(f"not valid JSON ({error.msg})", error.lineno)
    except (ValueError, RecursionError) as error:
        document.fail(f"not valid JSON ({error})")
    _scan_json(text, document)
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


@dataclass(slots=True)
class _Frame:
    """A mapping or list that is still open. ``part``: the key or index of its next value."""

    part: str | int | None
    keys: set[str] = field(default_factory=set)


def _scan_json(text: str, document: Document) -> None:
    """Record the line of every key and item of text that is known to be valid."""
    frames: list[_Frame] = []
    line, position = 1, 0
    for part in _JSON_PART.finditer(text):
        line, position = line + text.count("\n", position, part.start()), part.start()
        if part[0] in {"}", "]"}:
            frames.pop()
        elif part[0] == ",":
            if isinstance(index := frames[-1].part, int):
                frames[-1].part = index + 1
        elif part[2]:
            _open_key(document, frames[-1], (*_place(frames[:-1]), json.loads(part[1])), line=line)
        else:
            document.note(_place(frames), line)
            if part[0] in {"{", "["}:
                frames.append(_Frame(None if part[0] == "{" else 0))
                if len(frames) > DEPTH_MAX:
                    document.fail(_TOO_DEEP, line)


def _place(frames: Iterable[_Frame]) -> Place:
    return tuple(frame.part for frame in frames if frame.part is not None)


def _open_key(document: Document, frame: _Frame, place: Place, *, line: int) -> None:
    key = str(place[-1])
    if key in frame.keys:
        document.add(place, _twice(key), line)
    frame.part = key
    frame.keys.add(key)
    document.note(place, line)


def _twice(key: str) -> str:
    return f"duplicate key {shortened(key)!r}"


# ---------------------------------------------------------------------------------------------------------------- YAML


def parse_yaml(text: str) -> Document:
    """Parse a YAML document with its lines; duplicate keys, anchors, aliases and tags are among its problems.

    Raises:
        InvalidConfig: it is not valid YAML, or is nested too deeply.
    """
    reader = _YamlReader(yaml.parse(text, Loader=_FAST if len(text) > LONG_CHARS else yaml.SafeLoader))
    try:
        reader.read_document()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else None
        reader.document.fail(f"not valid YAML ({error.problem})", line)
    except yaml.reader.ReaderError as error:
        reader.document.fail(f"not valid YAML ({error.reason})")
    except (ValueError, OverflowError) as error:  # e.g. a number in an escape or directive is out of range
        reader.document.fail(f"not valid YAML ({error})")
    return reader.document


class _YamlReader:
    """Builds values from PyYAML's events. ``Any``: PyYAML has no type annotations."""

    def __init__(self, events: Iterator[Any]) -> None:
        self._events = events
        self.document = Document()

    def read_document(self) -> None:
        """Read the only document; a second one is an error, and none leaves the values None."""
        next(self._events)
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return
        self.document.values = self._value(next(self._events), ())
        next(self._events)
        last = next(self._events)
        if not isinstance(last, yaml.StreamEndEvent):
            self.document.fail("a second document begins here; only one is allowed", _line(last))

    def _value(self, event: Any, place: Place) -> object:  # noqa: ANN401
        line = _line(event)
        self.document.note(place, line)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            problem = "anchors and aliases (& and *) are not supported; write the value out, or use `defaults`"
            self.document.add(place, problem, line)
            if isinstance(event, yaml.AliasEvent):
                return None
        if event.tag is not None:
            self.document.add(place, "tags (!) are not supported; put the value in quotes if it is text", line)
        if isinstance(event, yaml.ScalarEvent):
            return _plain_value(event.value) if event.style in {None, ""} else event.value
        if len(place) >= DEPTH_MAX:
            self.document.fail(_TOO_DEEP, line)
        return self._list(place) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(place)

    def _list(self, place: Place) -> list[object]:
        values: list[object] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event, (*place, len(values))))
        return values

    def _mapping(self, place: Place) -> dict[str, object]:
        found: dict[str, object] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            line = _line(event)
            key = self._key(event, place)
            inner = (*place, key)
            if key in found:
                self.document.add(inner, _twice(key), line)
            self.document.note(inner, line)
            value = self._value(next(self._events), inner)
            found.setdefault(key, value)
        return found

    def _key(self, event: Any, place: Place) -> str:  # noqa: ANN401
        inner = (*place, event.value) if isinstance(event, yaml.ScalarEvent) else place
        key = self._value(event, inner)
        if isinstance(key, str):
            return key
        self.document.add(inner, "a key must be text; put it in quotes", _line(event))
        return str(key) if isinstance(event, yaml.ScalarEvent) else "?"


def _plain_value(text: str) -> object:
    """Convert an unquoted scalar. A number that would be printed differently stays text."""
    if text.lower() in _NULL:
        return None
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    for pattern, kind in ((_INTEGER, int), (_DECIMAL, float)):
        if pattern.fullmatch(text) and str(number := kind(text)) == text:
            return number
    return text


def _line(event: Any) -> int:  # noqa: ANN401 - PyYAML has no types
    return int(event.start_mark.line) + 1
