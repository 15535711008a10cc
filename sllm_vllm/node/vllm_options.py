"""Tells options that the installed vLLM does not know, without importing vLLM: read from its source code."""

from __future__ import annotations

import ast
import difflib
import functools
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

_SOURCES = (
    "config/**/*.py",
    "engine/arg_utils.py",
    "entrypoints/**/cli_args.py",
    "utils/argparse_utils.py",
)
"""Files of vLLM that define options: as fields of dataclasses, or as calls of ``add_argument``."""
_OPTION_CHARS_MAX = 64


def unknown_options(arguments: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each long option that vLLM does not know, and the most similar one that it knows.

    Yields nothing if vLLM is not installed or its source can't be parsed. More names count as known than are options,
    so an option may be wrong and not be found; options that a plugin of vLLM adds are found although they are right.
    """
    written = [word.partition("=")[0] for word in arguments if word.startswith("--") and word != "--"]
    known = _known_names() if written else frozenset()
    for option in written if known else ():
        name = option.removeprefix("--").partition(".")[0].replace("-", "_")
        if not any(one in known for one in (name, name.removeprefix("no_"))) and not _abbreviates(name, known):
            near = difflib.get_close_matches(name, known, 1)
            yield option[:_OPTION_CHARS_MAX], f"--{near[0].replace('_', '-')}" if near else None


def _abbreviates(name: str, known: frozenset[str]) -> bool:
    return len(name) > 1 and any(one.startswith(name) for one in known)


@functools.cache
def _known_names() -> frozenset[str]:
    """Return all names that may be options, with underscores. Takes half a second."""
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    root = Path(next(iter(found.submodule_search_locations)))
    paths = {path for pattern in _SOURCES for path in root.glob(pattern)}
    try:
        return frozenset(name for path in paths for name in _names_in(path))
    except (OSError, SyntaxError):  # with one file missing, its options would be reported as unknown
        return frozenset()


def _names_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
            yield node.value.removeprefix("--").replace("-", "_")
