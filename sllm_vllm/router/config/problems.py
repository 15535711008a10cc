"""Finds what is wrong with a configuration: all problems at once, each with its key and line. Pure."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from sllm_vllm.errors import ConfigError
from sllm_vllm.router.config.sections import (
    KeySource,
    KeysSection,
    ModelConfig,
    ModelDefaults,
    NodeSection,
    RouterConfig,
    StoreSection,
    merged_models,
)
from sllm_vllm.router.config.settings import MigrationSection, PoisonSection, RaySection, ServerSection

Place = tuple[str | int, ...]
"""The path of a value in a document: the keys and indices that lead to it."""
Lines = Mapping[Place, int]

PROBLEMS_MAX = 100
"""Most problems shown at once."""
_ROUNDS_MAX = 4
"""Validations of one section, each without the keys that failed in the previous one."""
_SHOWN_CHARS_MAX = 80
"""Longest part of a user's key that is shown in a message."""
_SECTIONS: dict[str, type[BaseModel]] = {
    "keys": KeysSection,
    "server": ServerSection,
    "node": NodeSection,
    "store": StoreSection,
    "migration": MigrationSection,
    "poison": PoisonSection,
    "ray": RaySection,
    "defaults": ModelDefaults,
}
_WORDS = {
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "tuple_type": "must be a list",
    "string_type": "must be text; put it in quotes",
    "path_type": "must be a path",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "missing": "it is missing",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "too_long": "must have at most {max_length} entries",
}
"""Messages for pydantic's error types."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, or one warning, at one place of a configuration."""

    at: Place
    problem: str
    line: int | None = None
    is_warning: bool = False

    @property
    def key(self) -> str:
        """The place in the form ``models[0].keep_alive``; empty for the whole document."""
        parts = (f"[{part}]" if isinstance(part, int) else f".{shortened(part)}" for part in self.at)
        return _one_line("".join(parts).removeprefix("."))

    def __str__(self) -> str:
        parts = (f"line {self.line}" if self.line else "", self.key, _one_line(self.problem))
        return ": ".join(part for part in parts if part)

    def concerns(self, place: Place) -> bool:
        """Whether this problem's place contains ``place``, or the reverse."""
        depth = min(len(self.at), len(place))
        return self.at[:depth] == place[:depth]


class InvalidConfig(ConfigError):
    """A configuration has problems. ``str()`` is one line with all of them; ``lines`` has one line for each."""

    def __init__(self, problems: Iterable[Problem], file: str = "") -> None:
        self.problems = tuple(problems)
        self.file = file
        told = "; ".join(self._texts())
        super().__init__(f"{file}: {told}" if file else told)

    @property
    def lines(self) -> list[str]:
        """One line for each problem, with the file's name."""
        return [f"{self.file}: {text}" if self.file else text for text in self._texts()]

    def _texts(self) -> list[str]:
        found = [str(problem) for problem in self.problems[:PROBLEMS_MAX]]
        num_more = len(self.problems) - len(found)
        return found + ([f"and {num_more} more"] if num_more else [])

    def of_file(self, file: str) -> InvalidConfig:
        """Return the same error with the file's name."""
        return InvalidConfig(self.problems, file)


@dataclass(slots=True)
class Diagnosis:
    """The problems, and the valid rest: sections and models without their wrong keys."""

    problems: list[Problem] = field(default_factory=list)
    sections: dict[str, BaseModel] = field(default_factory=dict)
    models: dict[int, ModelConfig] = field(default_factory=dict)


def diagnose(values: object, context: Mapping[str, object]) -> Diagnosis:
    """Find every problem of a file's values. Takes several validations, so call it only if the values are wrong."""
    found = Diagnosis()
    if not isinstance(values, dict):
        found.problems.append(Problem((), f"must be a mapping of sections: {', '.join(RouterConfig.model_fields)}"))
        return found
    for key in values:
        if key not in RouterConfig.model_fields:
            found.problems.append(Problem((key,), _unknown_key(key, RouterConfig)))
    for name, kind in _SECTIONS.items():
        problems, section = _validated(kind, values.get(name, {}), (name,), context=context)
        found.problems += problems
        if section is not None:
            found.sections[name] = section
    _diagnose_models(values, found, context)
    if not any(problem.at[:1] in {("keys",), ("server",)} for problem in found.problems):
        both = {name: values[name] for name in ("keys", "server") if name in values}
        found.problems += _validated(RouterConfig, both, (), context=context)[0]
    return found


def _diagnose_models(values: dict[str, Any], found: Diagnosis, context: Mapping[str, object]) -> None:
    models = merged_models(values).get("models", [])
    if not isinstance(models, list):
        found.problems.append(Problem(("models",), _WORDS["tuple_type"]))
        return
    first: dict[str, int] = {}
    for index, values_of_one in enumerate(models):
        problems, model = _validated(ModelConfig, values_of_one, ("models", index), context=context)
        found.problems += problems
        if isinstance(model, ModelConfig):
            found.models[index] = model
        name = values_of_one.get("name") if isinstance(values_of_one, dict) else None
        if isinstance(name, str) and first.setdefault(name, index) != index:
            problem = f"models[{first[name]}] has the same name, {shortened(name)!r}"
            found.problems.append(Problem(("models", index, "name"), problem))


def _validated(
    kind: type[BaseModel], values: object, at: Place, *, context: Mapping[str, object]
) -> tuple[list[Problem], BaseModel | None]:
    """Return a section's problems, and the section without its wrong keys.

    Pydantic checks several keys together only once each is valid, so wrong keys are removed and the rest is validated
    again.
    """
    found: list[Problem] = []
    values = dict(values) if isinstance(values, dict) else values
    for _ in range(_ROUNDS_MAX):
        try:
            return found, kind.model_validate(values, context=context)
        except ValidationError as error:
            new = list(_problems_of(error, kind, at))
        found += [problem for problem in new if not any(known.concerns(problem.at) for known in found)]
        if not isinstance(values, dict) or any(problem.at == at for problem in new):
            return found, None
        for problem in new:
            _replace_wrong(kind, values, problem.at[len(at) :])
    return found, _without_one_key(kind, values, context) if isinstance(values, dict) else None


def _replace_wrong(kind: type[BaseModel], values: dict[str, Any], place: Place) -> None:
    """Remove a wrong key, or replace its value by a valid placeholder."""
    key, index = str(place[0]), place[1] if len(place) > 1 else None
    if key in kind.model_fields and kind.model_fields[key].is_required():
        values[key] = "stand-in"
    elif kind is KeysSection and isinstance(index, int):  # so that the other keys keep their indices
        values[key] = [*values[key][:index], {"sha256": "0" * 64}, *values[key][index + 1 :]]
    else:
        values.pop(key, None)


def _without_one_key(kind: type[BaseModel], values: dict[str, Any], context: Mapping[str, object]) -> BaseModel | None:
    """Return a section without one key, if its keys are valid one by one but not together; None if that fails, too."""
    for key in values:
        with contextlib.suppress(ValidationError):
            return kind.model_validate({name: values[name] for name in values if name != key}, context=context)
    return None


def _problems_of(error: ValidationError, kind: type[BaseModel], at: Place) -> Iterator[Problem]:
    """Yield the problems of a validation error. Values are not shown, because one may be a secret key."""
    for one in error.errors(include_url=False, include_input=False):
        context = one.get("ctx", {})
        place = (*at, *one["loc"], *context.get("at", ()))
        if one["type"] == "extra_forbidden":
            inner = KeySource if at == ("keys",) and len(one["loc"]) > 1 else kind
            yield Problem(place, _unknown_key(str(place[-1]), inner))
        elif one["type"] == "wrong_keys":
            yield from (Problem((*place, key), problem) for key, problem in context["parts"])
        else:
            yield Problem(place, in_words(one["type"], one["msg"], context))


def in_words(kind: str, message: str, context: Mapping[str, Any]) -> str:
    """Return this package's message for a pydantic error."""
    return _WORDS[kind].format(**context) if kind in _WORDS else message.removeprefix("Value error, ")


def _unknown_key(key: str, kind: type[BaseModel]) -> str:
    near = difflib.get_close_matches(shortened(key), kind.model_fields, 1)
    return f"unknown key; did you mean `{near[0]}`?" if near else f"unknown key; known: {', '.join(kind.model_fields)}"


def with_lines(problems: Iterable[Problem], lines: Lines) -> list[Problem]:
    """Add to each problem the line of its key, or of the nearest enclosing one, and sort by line."""
    found = [problem if problem.line else replace(problem, line=_line_of(problem.at, lines)) for problem in problems]
    return sorted(found, key=lambda problem: (problem.line is None, problem.line or 0))


def _line_of(place: Place, lines: Lines) -> int | None:
    for depth in range(len(place), 0, -1):
        if place[:depth] in lines:
            return lines[place[:depth]]
    return None


def shortened(text: str) -> str:
    """Shorten a key for a message."""
    return text if len(text) <= _SHOWN_CHARS_MAX else f"{text[:_SHOWN_CHARS_MAX]}…"


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def below(problems: Sequence[Problem], place: Place) -> list[Problem]:
    """Return the problems below ``place``, with their places relative to it."""
    return [replace(problem, at=problem.at[len(place) :]) for problem in problems if problem.at[: len(place)] == place]
