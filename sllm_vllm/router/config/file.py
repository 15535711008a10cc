"""Reads and checks files of the router's configuration, and compares two configurations.

``text.py`` parses YAML and JSON, ``problems.py`` finds what is wrong with values, and ``places.py`` what is wrong with
them on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sllm_vllm.config import read_variable
from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.errors import ConfigError
from sllm_vllm.router.config.keys import digest_of
from sllm_vllm.router.config.problems import Diagnosis, InvalidConfig, Lines, Problem, diagnose, with_lines
from sllm_vllm.router.config.sections import KeySource, ModelConfig, RouterConfig
from sllm_vllm.router.config.text import Document, parse_json, parse_yaml
from sllm_vllm.units import KIB, MIB

FILE_NBYTES_MAX = 8 * MIB
"""Largest configuration file; ten thousand models with a few settings each fit."""
KEY_FILE_NBYTES_MAX = 64 * KIB

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

_KEY = re.compile(r"[!-~]{1,1024}")


# ------------------------------------------------------------------------------------------------------------- reading


def read_router_config(path: Path) -> RouterConfig:
    """Read a configuration file: JSON if its name ends in ``.json``, else YAML. Paths are relative to its directory.

    Raises:
        InvalidConfig: it can't be read, or something in it is wrong; has every problem with its key and line.
    """
    found = check_router_config(path)
    if found.config is None:
        raise InvalidConfig(found.problems, str(path))
    return found.config


@dataclass(slots=True)
class Checked:
    """A checked file. ``config`` is None if anything is wrong; ``diagnosis`` holds the valid parts."""

    config: RouterConfig | None
    problems: list[Problem]
    diagnosis: Diagnosis
    lines: Lines


def check_router_config(path: Path) -> Checked:
    """Read a configuration file and find all its problems. Does not check it against this machine."""
    try:
        document = parse_document(read_text(path, FILE_NBYTES_MAX), is_json=path.suffix == ".json")
    except InvalidConfig as error:
        return Checked(None, list(error.problems), Diagnosis(), {})
    return check_document(document, directory=path.absolute().parent)


def parse_document(text: str, *, is_json: bool) -> Document:
    """Parse a configuration's text, with the lines of its keys.

    Raises:
        InvalidConfig: it can't be parsed to its end.
    """
    return (parse_json if is_json else parse_yaml)(text)


def check_document(document: Document, *, directory: Path) -> Checked:
    """Validate a parsed document. Paths in it are relative to ``directory``."""
    context = {"directory": directory}
    config, diagnosis = _validated(document.values, context)
    wrong = document.problems
    if wrong:
        config = None
    found = [*wrong, *(one for one in diagnosis.problems if not any(text.concerns(one.at) for text in wrong))]
    return Checked(config, with_lines(found, document.lines), diagnosis, document.lines)


def parse_router_config(values: object, *, directory: Path | None = None, is_merged: bool = False) -> RouterConfig:
    """Validate a configuration's values. Paths are relative to ``directory``; without one they stay as they are.

    Args:
        is_merged: the values were dumped from a configuration, so its models have the defaults already.

    Raises:
        InvalidConfig: names every wrong key.
    """
    config, diagnosis = _validated(values, {"directory": directory or "", "is_merged": is_merged})
    if config is None:
        raise InvalidConfig(diagnosis.problems)
    return config


def _validated(values: object, context: Mapping[str, object]) -> tuple[RouterConfig | None, Diagnosis]:
    try:
        config = RouterConfig.model_validate(values, context=context)
    except ValidationError as error:
        found = diagnose(values, context)
        if not found.problems:  # each section is valid, but not all together
            found.problems.append(Problem((), error.errors(include_url=False, include_input=False)[0]["msg"]))
        return None, found
    sections = {name: getattr(config, name) for name in (*_LIVE_SECTIONS, *_FIXED_SECTIONS, "defaults")}
    return config, Diagnosis(sections=sections, models=dict(enumerate(config.models)))


def router_config_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RouterConfig.model_json_schema()}


def read_text(path: Path, nbytes_max: int) -> str:
    """Read a regular text file. A pipe or a device is refused, because it could block a reload forever.

    Raises:
        InvalidConfig: it can't be read, is too large, or is not UTF-8.
    """
    try:
        return decode_text(read_plain(path, nbytes_max), nbytes_max)
    except OSError as error:
        raise _unreadable(f"it can't be read: {error.strerror}") from None


def decode_text(data: bytes, nbytes_max: int) -> str:
    """Decode a file's bytes.

    Raises:
        InvalidConfig: there are more than ``nbytes_max``, or they are not UTF-8.
    """
    if len(data) > nbytes_max:
        raise _unreadable(f"it is larger than {nbytes_max} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(f"it is not UTF-8: byte {error.start} is invalid") from None


def _unreadable(problem: str) -> InvalidConfig:
    return InvalidConfig([Problem((), problem)])


# ---------------------------------------------------------------------------------------------------------------- keys


def read_key_digests(sources: Sequence[KeySource], section: str) -> tuple[str, ...]:
    """Return the SHA-256 of every key, without duplicates. ``section``: its name in messages, like ``keys.clients``.

    Raises:
        ConfigError: a key is missing or not valid. The message does not show it.
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
        raise ConfigError(f"{place} is empty or not set; it must hold a key")
    if not all(map(_KEY.fullmatch, keys)):
        raise ConfigError(f"{place}: a key must be 1 to 1024 printable ASCII characters without spaces")
    return [digest_of(key) for key in keys]


def _key_file(path: Path) -> str:
    try:
        return read_text(path, KEY_FILE_NBYTES_MAX)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------------------- changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a new configuration changes.

    ``restarted``: changed models that need new engines; ``adjusted``: those that keep their engines. ``live``: keys
    that take effect at once; ``fixed``: keys that need a restart of the router.
    """

    added: tuple[ModelConfig, ...] = ()
    removed: tuple[str, ...] = ()
    restarted: tuple[ModelConfig, ...] = ()
    adjusted: tuple[ModelConfig, ...] = ()
    live: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def require_live(self) -> None:
        """Check that nothing changes that can't change while the router runs.

        Raises:
            ConfigError: names every such key.
        """
        if self.fixed:
            raise ConfigError(
                f"{', '.join(self.fixed)}: can't be changed while the router runs; restart it, or undo the change"
            )


def compare(old: RouterConfig, new: RouterConfig) -> Changes:
    """Return what ``new`` changes. The keys that files and variables hold are not compared, only their sources."""
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


def with_known_models(new: RouterConfig, old: RouterConfig) -> RouterConfig:
    """Return ``new`` with the old objects of unchanged models, to save memory."""
    before = {model.name: model for model in old.models}
    kept = (before[model.name] if model == before.get(model.name) else model for model in new.models)
    return new.model_copy(update={"models": tuple(kept)})


def _changed_keys(old: RouterConfig, new: RouterConfig) -> Iterator[str]:
    for section in (*_LIVE_SECTIONS, *_FIXED_SECTIONS):
        before, after = getattr(old, section), getattr(new, section)
        for field in type(before).model_fields:
            if getattr(before, field) != getattr(after, field):
                yield f"{section}.{field}"
