"""Files of the router's configuration: read as YAML or JSON, refused in one line, compared with the one before.

YAML here is what a configuration needs: no anchors, aliases or tags, no key twice; a plain scalar is a number only if
it is written as one is printed, so that no digit of a version or a digest is lost.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError

from sllm_vllm.config import read_variable
from sllm_vllm.errors import ConfigError
from sllm_vllm.router.config import (
    KeySource,
    KeysSection,
    ModelConfig,
    ModelDefaults,
    NodeSection,
    RouterConfig,
    ServerSection,
    StoreSection,
)
from sllm_vllm.router.config_migration import MigrationSection
from sllm_vllm.router.config_poison import PoisonSection
from sllm_vllm.router.config_ray import RaySection
from sllm_vllm.router.keys import digest_of
from sllm_vllm.units import KIB, MIB

FILE_NBYTES_MAX = MIB
KEY_FILE_NBYTES_MAX = 64 * KIB
DEPTH_MAX = 32
"""Of values in values; no section needs a third of it."""
_SHOWN_CHARS_MAX = 80
"""Of a key that somebody wrote, in a message."""

_SECTIONS: dict[str | int, type[BaseModel]] = {
    "keys": KeysSection,
    "server": ServerSection,
    "node": NodeSection,
    "store": StoreSection,
    "migration": MigrationSection,
    "poison": PoisonSection,
    "ray": RaySection,
    "defaults": ModelDefaults,
    "models": ModelConfig,
}
_PROBLEMS = {
    "model_type": "it has to be a mapping",
    "dict_type": "it has to be a mapping",
    "tuple_type": "it has to be a list",
    "string_type": "it has to be text; put it in quotes",
    "missing": "it is missing",
}
"""What pydantic says in Python's words."""
_FIXED_SECTIONS = ("node", "store", "poison")
_FIXED_KEYS = (
    "server.host",
    "server.port",
    "migration.enabled",
    "migration.moves_max",
    "ray.resource",
    "ray.state",
)
_LIVE_SECTIONS = ("keys", "server", "migration", "ray")

_TRUE, _FALSE, _NULL = ("true", "yes", "on"), ("false", "no", "off"), ("null", "~", "")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_DECIMAL = re.compile(r"-?[0-9]{1,12}\.[0-9]{1,12}")
_JSON_PARTS = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")(\s*:)?|[{}\[\]]')
_KEY = re.compile(r"[!-~]{1,1024}")


# ------------------------------------------------------------------------------------------------------------- reading


def read_router_config(path: Path) -> RouterConfig:
    """A file of it: JSON if its name ends so, else YAML. Paths in it are relative to its directory.

    Raises:
        ConfigError: it can't be read, or something in it is wrong: one line with the file, the key and the problem.
    """
    try:
        text = _read_text(path, FILE_NBYTES_MAX)
        values = (read_json if path.suffix == ".json" else read_yaml)(text)
        return parse_router_config(values, directory=path.absolute().parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_router_config(values: object, *, directory: Path | None = None) -> RouterConfig:
    """What a file holds. Paths in it are relative to ``directory``; without one they stay as they are.

    Raises:
        ConfigError: names the first wrong key, and how many more there are.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"it has to be a mapping of sections: {', '.join(RouterConfig.model_fields)}")
    try:
        return RouterConfig.model_validate(values, context={"directory": directory or ""})
    except ValidationError as error:
        raise ConfigError(_described(error)) from None


def router_config_schema() -> dict[str, Any]:
    """Every key of it, as a JSON schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RouterConfig.model_json_schema()}


def _read_text(path: Path, nbytes_max: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(nbytes_max + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"it can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"it is not UTF-8: byte {error.start} is wrong") from None
    if len(data) > nbytes_max:
        raise ConfigError(f"it is larger than {nbytes_max} bytes")
    return text


# ---------------------------------------------------------------------------------------------------------------- JSON


def read_json(text: str) -> object:
    """A JSON document.

    Raises:
        ConfigError: it is none, is nested too deeply, or has a key twice.
    """
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {error.lineno}: no valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"no valid JSON ({error})") from None
    _check_json_keys(text)
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _check_json_keys(text: str) -> None:
    """Look for keys that stand twice, and for what is nested too deeply, in text that is known to be valid."""
    open_keys: list[set[str]] = []
    for part in _JSON_PARTS.finditer(text):
        if part[0] in {"{", "["}:
            open_keys.append(set())
            if len(open_keys) > DEPTH_MAX:
                raise ConfigError(f"{_json_line(text, part.start())}: it is nested too deeply")
        elif part[0] in {"}", "]"}:
            open_keys.pop()
        elif part[2]:
            if (key := json.loads(part[1])) in open_keys[-1]:
                raise ConfigError(_twice(_json_line(text, part.start()), key))
            open_keys[-1].add(key)


def _json_line(text: str, position: int) -> str:
    return f"line {text.count(chr(10), 0, position) + 1}"


# ---------------------------------------------------------------------------------------------------------------- YAML


def read_yaml(text: str) -> object:
    """A YAML document; none at all is null.

    Raises:
        ConfigError: it is none, or holds what is not taken here: see the module.
    """
    try:
        return _read_document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{_line(error.problem_mark)}: no valid YAML ({error.problem})") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"no valid YAML ({error.reason})") from None
    except (ValueError, OverflowError) as error:  # a number in an escape or a directive is out of range
        raise ConfigError(f"no valid YAML ({error})") from None


def _read_document(events: Iterator[Any]) -> object:
    next(events)
    if isinstance(next(events), yaml.StreamEndEvent):
        return None
    value = _read_value(events, next(events), DEPTH_MAX)
    next(events)
    last = next(events)
    if not isinstance(last, yaml.StreamEndEvent):
        raise ConfigError(f"{_line(last.start_mark)}: a second document begins here; there can be one")
    return value


def _read_value(events: Iterator[Any], event: Any, depth: int) -> object:  # noqa: ANN401 - PyYAML has no types
    line = _line(event.start_mark)
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise ConfigError(f"{line}: anchors and aliases (& and *) are not taken; write it out, or use `defaults`")
    if event.tag is not None:
        raise ConfigError(f"{line}: tags (!) are not taken; put it in quotes if it is text")
    if isinstance(event, yaml.ScalarEvent):
        return _plain_value(event.value) if event.style is None else event.value
    if depth == 0:
        raise ConfigError(f"{line}: it is nested too deeply")
    if isinstance(event, yaml.SequenceStartEvent):
        values = []
        while not isinstance(following := next(events), yaml.SequenceEndEvent):
            values.append(_read_value(events, following, depth - 1))
        return values
    return _read_mapping(events, depth)


def _read_mapping(events: Iterator[Any], depth: int) -> dict[str, object]:
    found: dict[str, object] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        line = _line(event.start_mark)
        key = _read_value(events, event, depth - 1)
        if not isinstance(key, str):
            raise ConfigError(f"{line}: a key has to be text; put it in quotes if it is")
        if key in found:
            raise ConfigError(_twice(line, key))
        found[key] = _read_value(events, next(events), depth - 1)
    return found


def _plain_value(text: str) -> object:
    """A scalar without quotes, as PyYAML has it, but for numbers that would be printed otherwise: those stay text."""
    if text.lower() in _NULL:
        return None
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    for pattern, kind in ((_INTEGER, int), (_DECIMAL, float)):
        if pattern.fullmatch(text) and str(number := kind(text)) == text:
            return number
    return text


def _line(mark: Any) -> str:  # noqa: ANN401 - PyYAML has no types
    return f"line {mark.line + 1}"


# -------------------------------------------------------------------------------------------------------------- errors


def _described(error: ValidationError) -> str:
    """The first problem, and how many more there are. What was written is not repeated: it may be a key."""
    first, *others = error.errors(include_url=False, include_input=False)
    at = (*first["loc"], *first.get("ctx", {}).get("at", ()))
    problem = _PROBLEMS.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] == "extra_forbidden":
        problem = _unknown_key(at)
    more = f" (and {len(others)} more)" if others else ""
    return _one_line(f"{_key_path(at)}: {problem}{more}")


def _unknown_key(at: tuple[str | int, ...]) -> str:
    kind: type[BaseModel] = RouterConfig
    if len(at) > 1:
        kind = KeySource if at[0] == "keys" and len(at) > 2 else _SECTIONS[at[0]]
    near = difflib.get_close_matches(_shown(str(at[-1])), kind.model_fields, 1)
    return f"unknown key; did you mean `{near[0]}`?" if near else f"unknown key; known: {', '.join(kind.model_fields)}"


def _key_path(at: Sequence[str | int]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in at)
    return "".join(parts).removeprefix(".")


def _twice(line: str, key: str) -> str:
    return _one_line(f"{line}: {_shown(key)!r} stands here twice")


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS_MAX else f"{text[:_SHOWN_CHARS_MAX]}…"


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


# ---------------------------------------------------------------------------------------------------------------- keys


def read_key_digests(sources: Sequence[KeySource], section: str) -> tuple[str, ...]:
    """SHA-256 of every key, each once. ``section``: how messages name them, as ``keys.clients``.

    Raises:
        ConfigError: a key is not where it should be, or is none. The message does not show it.
    """
    found: dict[str, None] = {}
    for index, source in enumerate(sources):
        try:
            found |= dict.fromkeys(_digests(source))
        except ConfigError as error:
            raise ConfigError(f"{section}[{index}]: {error}") from None
    return tuple(found)


def _digests(source: KeySource) -> list[str]:
    if source.sha256 is not None:
        return [source.sha256]
    if source.file is not None:
        place, text = str(source.file), _key_file(source.file)
    else:
        assert source.env is not None, "one of the three is there"
        place, text = source.env, read_variable(source.env) or ""
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise ConfigError(f"{place} is empty or not set; it has to hold a key")
    if not all(map(_KEY.fullmatch, keys)):
        raise ConfigError(f"{place}: a key has to be 1 to 1024 ASCII characters, no space among them")
    return [digest_of(key) for key in keys]


def _key_file(path: Path) -> str:
    try:
        return _read_text(path, KEY_FILE_NBYTES_MAX)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------------------- changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a new configuration changes.

    ``restarted``: models whose engines must be started anew; ``adjusted``: those whose engines stay. ``live``: keys
    that count from now on; ``fixed``: keys that need a restart of the router.
    """

    added: tuple[ModelConfig, ...] = ()
    removed: tuple[str, ...] = ()
    restarted: tuple[ModelConfig, ...] = ()
    adjusted: tuple[ModelConfig, ...] = ()
    live: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def require_live(self) -> None:
        """Refuse what can't change while the router runs.

        Raises:
            ConfigError: names every such key.
        """
        if self.fixed:
            raise ConfigError(f"{', '.join(self.fixed)}: can't change while the router runs; restart it, or undo that")


def compare(old: RouterConfig, new: RouterConfig) -> Changes:
    """What ``new`` changes. Keys in files and variables may have changed though their sources have not."""
    before = {model.name: model for model in old.models}
    known = [model for model in new.models if model.name in before]
    changed = [model for model in known if model != before[model.name]]
    keys = [*_changed_keys(old, new)]
    fixed = [key for key in keys if key in _FIXED_KEYS or key.startswith(tuple(f"{s}." for s in _FIXED_SECTIONS))]
    return Changes(
        added=tuple(model for model in new.models if model.name not in before),
        removed=tuple(sorted(before.keys() - {model.name for model in known})),
        restarted=tuple(model for model in changed if model.generation != before[model.name].generation),
        adjusted=tuple(model for model in changed if model.generation == before[model.name].generation),
        live=tuple(key for key in keys if key not in fixed),
        fixed=tuple(fixed),
    )


def _changed_keys(old: RouterConfig, new: RouterConfig) -> Iterator[str]:
    for section in (*_LIVE_SECTIONS, *_FIXED_SECTIONS):
        before, after = getattr(old, section), getattr(new, section)
        for field in type(before).model_fields:
            if getattr(before, field) != getattr(after, field):
                yield f"{section}.{field}"
