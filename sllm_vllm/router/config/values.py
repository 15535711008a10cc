"""Value types of the router's configuration: durations, sizes, arguments, variables, paths. Pure.

The types at the end are for the fields of ``sections.py`` and ``settings.py``; their JSON schemas describe the accepted
forms.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict, ValidationInfo
from pydantic_core import PydanticCustomError

from sllm_vllm.node.core.launch import CONFIG_OPTION, option_value
from sllm_vllm.units import parse_nbytes

TEXT_CHARS_MAX = 4096
WORD_CHARS_MAX = 65_536
"""Longest argument or environment variable; Linux takes twice as much."""
DURATION_S_MAX = 30 * 86400.0
OWNED_OPTIONS = (
    ("--model", "write `source`"),
    ("--served-model-name", "write `name`"),
    ("--revision", "write `revision`"),
    ("--host", "leave it out: engines listen on loopback"),
    ("--port", "leave it out: the node picks one"),
    ("--uds", "leave it out: the node picks an address"),
    ("--api-key", "leave it out: the node makes one"),
)
"""Arguments that may not be configured, because engines get them from elsewhere, and what to write instead."""
OWNED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "VLLM_API_KEY")
_NEVER_ENDS = frozenset({"-1", "-1s", "-1m", "forever", "always", "inf", "infinite", "infinity", "never"})
"""Values that other servers accept for keeping a model loaded forever."""
_UNIT_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,12})?) *(ms|s|m|h|d|)", re.ASCII)
_OPTION = re.compile(r"-{0,2}([A-Za-z][\w-]*)((?:\.[\w.-]*)?)", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_]\w{0,254}", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")


def wrong_key(problem: str, *at: str | int) -> PydanticCustomError:
    """Return a validation error about a key inside the validated value. ``at``: the key's path from there."""
    return PydanticCustomError("wrong_key", "{problem}", {"problem": problem, "at": at})


def wrong_keys(parts: Sequence[tuple[str | int, str]]) -> PydanticCustomError:
    """Return one validation error about several keys or items of the validated value, each with its problem."""
    problem = "; ".join(problem for _, problem in parts)
    return PydanticCustomError("wrong_keys", "{problem}", {"problem": problem, "parts": tuple(parts)})


def parse_duration(value: object) -> float:
    """Return seconds from a number or from text like ``90``, ``30s``, ``10m``, ``1.5h``.

    Raises:
        ValueError: it is not a duration.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= DURATION_S_MAX:
        return float(value)
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or (seconds := float(match[1]) * _UNIT_S[match[2]]) > DURATION_S_MAX:
        raise ValueError("must be seconds, or text like 30s, 10m or 2h, at most 30 days")
    return seconds


def _keep_alive(value: object) -> float | None:
    if value is None or value == "auto":
        return None
    if value == -1 or (isinstance(value, str) and value.strip().lower() in _NEVER_ENDS):
        raise ValueError("must not be unlimited; write `min_replicas: 1` to keep a replica running")
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(f"{error}; or `auto`") from None


def _nbytes(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    try:
        return parse_nbytes(value if isinstance(value, str) else "")
    except (ValueError, OverflowError):
        raise ValueError("must be bytes, or text like 8GiB or 500MB") from None


def _plain(text: str) -> str:
    if len(text) > WORD_CHARS_MAX:
        raise ValueError(f"must have at most {WORD_CHARS_MAX} characters")
    if "\0" in text or _SURROGATE.search(text):
        raise ValueError("must not contain a character that arguments and paths can't have")
    return text


def _word(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("must be text or a number; put it in quotes")
    return _plain(str(value))


def _words(value: object) -> object:
    return [_word(part) for part in value] if isinstance(value, list | tuple) else value


def _environment(value: object) -> object:
    if not isinstance(value, dict):
        return value
    words: dict[str, str] = {}
    wrong: list[tuple[str | int, str]] = []
    for name, part in value.items():
        try:
            words[_variable(name)] = _word(part)
        except ValueError as error:
            wrong.append((str(name), str(error)))
    if wrong:
        raise wrong_keys(wrong)
    return words


def _variable(name: object) -> str:
    if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
        raise ValueError("a variable's name must consist of letters, digits and underscores")
    if name in OWNED_VARIABLES:
        raise ValueError(f"{name} is set by the node for each engine; leave it out")
    return name


def _option(key: object) -> str:
    """Return an option in vLLM's spelling: ``max_model_len`` is ``--max-model-len``; the part after a dot is kept."""
    match = _OPTION.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise ValueError("a key must be the name of an option of `vllm serve`, such as max-model-len")
    return f"--{match[1].replace('_', '-')}{match[2]}"


def _option_words(option: str, value: object) -> list[str]:
    """Return an option and its value as words; none if the value is null.

    vLLM reads the value of an option with a dot as JSON.
    """
    if value is None:
        return []
    if isinstance(value, dict) or ("." in option and not isinstance(value, str)):
        return [f"{option}={_json(option, value)}"]
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(value, list | tuple):
        return [option, *map(_word, value)]
    if option == CONFIG_OPTION:  # vLLM ignores --config=FILE
        return [option, _word(value)]
    return [f"{option}={_word(value)}"]


def _json(option: str, value: object) -> str:
    try:
        return _plain(json.dumps(value, allow_nan=False))
    except (TypeError, RecursionError):
        raise ValueError(f"{option}: its value can't be written as JSON") from None


def engine_words(value: object) -> object:
    """Return engine arguments, a list or a mapping, as words; anything else is returned unchanged.

    Raises:
        ValueError: a key is not an option, or a value can't be an option's value.
    """
    if isinstance(value, Mapping):
        return [word for key, part in value.items() for word in _option_words(_option(key), part)]
    return _words(value)


def _engine_arguments(value: object) -> object:
    if isinstance(value, Mapping):
        return _options_of(value)
    words = engine_words(value)
    if isinstance(words, list) and (wrong := list(_owned(words))):
        raise wrong_keys(wrong)
    return words


def _options_of(value: Mapping[object, object]) -> list[str]:
    words: list[str] = []
    wrong: list[tuple[str | int, str]] = []
    for key, part in value.items():
        try:
            option = _option_words(_option(key), part)
        except ValueError as error:
            wrong.append((str(key), str(error)))
        else:
            wrong += [(str(key), problem) for _, problem in _owned(option)]
            words += option
    if wrong:
        raise wrong_keys(wrong)
    return words


def _owned(words: Sequence[str]) -> Iterator[tuple[str | int, str]]:
    """Yield the index of each option that may not be configured, and a message that says what to write instead."""
    for index, word in enumerate(words):
        name = word.partition("=")[0]
        for option, instead in OWNED_OPTIONS:
            if option_value([name], option) is not None:
                yield index, f"{option} is not allowed here; {instead}"


def located(path: Path, info: ValidationInfo) -> Path:
    """Resolve a path: expand ``~``, and make it relative to the directory of the validation's context."""
    directory = (info.context or {}).get("directory", "")
    return Path(directory, os.path.expanduser(_plain(str(path))))


def merge_arguments(defaults: object, own: object) -> object:
    """Merge a model's engine arguments with the defaults.

    A mapping replaces the options that it has, so that null removes a default. A list of words follows the defaults.
    """
    try:
        if isinstance(defaults, dict) and isinstance(own, dict):
            return {_option(key): value for key, value in (*defaults.items(), *own.items())}
        first, last = engine_words(defaults), engine_words(own)
        if isinstance(first, list) and isinstance(own, dict):
            first = _without(first, {_option(key) for key in own})
    except ValueError:  # the validation of the model reports it
        return own
    return [*first, *last] if isinstance(first, list) and isinstance(last, list) else own


def _without(words: Iterable[str], options: Set[str]) -> list[str]:
    """Return words without some options, their opposites, and their values."""
    dropped = {*options, *(f"--no-{option[2:]}" for option in options)}
    left: list[str] = []
    is_left = True
    for word in words:
        if word.startswith("--"):
            name, dot, part = word.partition("=")[0].partition(".")
            is_left = f"{name.replace('_', '-')}{dot}{part}" not in dropped
        if is_left:
            left.append(word)
    return left


def is_loopback(host: str) -> bool:
    """Whether an address is reachable only from this machine. Of names, only ``localhost`` counts."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def needs_keys(host: str | None, *, has_keys: bool, is_insecure: bool) -> bool:
    """Whether keys are missing: only loopback is served without any, unless the user allows more. None: any host."""
    return not (has_keys or is_insecure or (host is not None and is_loopback(host)))


Count = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Field(max_length=TEXT_CHARS_MAX), AfterValidator(_plain)]
Located = Annotated[Path, AfterValidator(located)]
Duration = Annotated[float, BeforeValidator(parse_duration, json_schema_input_type=float | str)]
MaybeDuration = Annotated[
    float | None,
    BeforeValidator(
        lambda value: None if value is None else parse_duration(value), json_schema_input_type=float | str | None
    ),
]
KeepAlive = Annotated[float | None, BeforeValidator(_keep_alive, json_schema_input_type=float | str | None)]
NumBytes = Annotated[int, BeforeValidator(_nbytes, json_schema_input_type=int | str)]
MaybeBytes = Annotated[int | None, BeforeValidator(_nbytes, json_schema_input_type=int | str | None)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words, json_schema_input_type=list[str | int])]
EngineArguments = Annotated[
    tuple[str, ...],
    BeforeValidator(_engine_arguments, json_schema_input_type=list[str | int | float] | dict[str, Any]),
]
Environment = Annotated[
    dict[str, str], BeforeValidator(_environment, json_schema_input_type=dict[str, str | int | float])
]
