"""Which prompt prefixes a replica has seen recently; the oldest are forgotten, as in its prefix cache. Pure."""

from __future__ import annotations

PREFIXES_MAX = 32
"""Prefixes remembered per replica."""


def note_prefix(prefixes: dict[str, float], prefix: str, now_s: float) -> None:
    """Record a request's prefix as the most recent one, dropping the least recent if there are too many."""
    prefixes.pop(prefix, None)
    prefixes[prefix] = now_s
    if len(prefixes) > PREFIXES_MAX:
        del prefixes[next(iter(prefixes))]
