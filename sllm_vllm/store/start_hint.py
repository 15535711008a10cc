"""Guesses from a vLLM command line which model it will load, so that the store's daemon can prefetch it. Pure.

Called by the plugin, before vLLM's own parser runs. It must neither delay nor fail a start. A command line that it
does not understand (``--config file.yaml``, abbreviated options) gives no hint; the load then begins without one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WORD_NBYTES_MAX = 4096
"""Longest model name and directory in a hint: the protocol's limit on a name."""
TENSOR_PARALLEL_SIZE_MAX = 4096

_EXTRA = "--model-loader-extra-config"
_OPTIONS = frozenset({"--model", "--load-format", "--tensor-parallel-size", "-tp", _EXTRA})


@dataclass(frozen=True, slots=True)
class StartHint:
    """What a starting process will ask the store for.

    Attributes:
        tensor_parallel_size: None if the command line's value can't be understood.
        store_dir: None for the default directory.
    """

    model: str
    tensor_parallel_size: int | None = None
    store_dir: str | None = None


def plan_hint(argv: Sequence[str]) -> StartHint | None:
    """The hint for a process with this ``sys.argv``, or None if it gives none. Never raises."""
    options = _options_of(argv[1:])
    if options.get("--load-format") != "sllm":
        return None
    extra = _extra_config(options)
    if extra is None or extra.get("store") in (False, "false", "False"):  # not a set: the value may be unhashable
        return None
    model, store_dir = options.get("--model") or _positional_model(argv), extra.get("store_dir")
    if not _is_tellable(model):
        return None
    if store_dir is None:
        return StartHint(model, _parallel_size(options))
    if not isinstance(store_dir, str) or not _is_tellable(store_dir):
        return None
    return StartHint(model, _parallel_size(options), store_dir)


def _positional_model(argv: Sequence[str]) -> str:
    """The word after ``serve``, the only place where vLLM's argument parser accepts a positional model."""
    is_named = len(argv) > 2 and argv[1] == "serve" and not argv[2].startswith("-")
    return argv[2] if is_named else ""


def _options_of(words: Sequence[str]) -> dict[str, str]:
    """The relevant options in any of vLLM's spellings: ``--a-b c``, ``--a_b=c``, ``--a.key c``. The last one wins."""
    found: dict[str, str] = {}
    taken = -1
    for index, word in enumerate(words):
        if index == taken or not word.startswith("-"):
            continue
        name, is_joined, value = word.partition("=")
        option, dot, key = name.partition(".")
        option = option.replace("_", "-")
        if option not in _OPTIONS:
            continue
        if not is_joined:
            taken = index + 1
            value = words[taken] if taken < len(words) else ""
        found[option + dot + key] = value
    return found


def _extra_config(options: Mapping[str, str]) -> dict[str, object] | None:
    """The loader's settings, from JSON and from dotted options; None if they can't be parsed."""
    try:
        extra = json.loads(options.get(_EXTRA, "{}"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(extra, dict):
        return None
    dotted = {key: options[f"{_EXTRA}.{key}"] for key in ("store", "store_dir") if f"{_EXTRA}.{key}" in options}
    return extra | dotted


def _parallel_size(options: Mapping[str, str]) -> int | None:
    text = options.get("--tensor-parallel-size", options.get("-tp", "1"))
    try:
        size = int(text)
    except ValueError:
        return None
    return size if 1 <= size <= TENSOR_PARALLEL_SIZE_MAX else None


def _is_tellable(word: str) -> bool:
    """Whether ``word`` can be a path and a field of the protocol."""
    try:
        return 1 <= len(word.encode()) <= WORD_NBYTES_MAX and "\0" not in word
    except UnicodeEncodeError:  # the command line was not UTF-8
        return False
