"""Which beginnings of prompts a replica has seen, the most recent last; as its prefix cache, it forgets. Pure."""

from __future__ import annotations

PREFIXES_MAX = 32
"""Prefixes remembered about one replica."""


def note_prefix(prefixes: dict[str, float], prefix: str, now_s: float) -> None:
    """It came again, or for the first time; the one that came longest ago may have to go."""
    prefixes.pop(prefix, None)
    prefixes[prefix] = now_s
    if len(prefixes) > PREFIXES_MAX:
        del prefixes[next(iter(prefixes))]
