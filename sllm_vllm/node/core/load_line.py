"""Parses the load report in an engine's log line. Pure."""

from __future__ import annotations

import re

_LINE = re.compile(r"event=load_model (.*)")
_FIELD = re.compile(r"(\w+)=(\S+)")
_KEPT = ("outcome", "source", "bytes", "total_s", "construct_s", "weights_s", "process_s", "wait_s", "checkpoint")
LINE_MAX = 4096
"""Characters of a line that are examined."""


def read_load_line(line: str) -> dict[str, str]:
    """The fields of a ``LoadReport``'s line that the start report includes; empty for any other line."""
    found = _LINE.search(line[:LINE_MAX])
    if found is None:
        return {}
    fields = dict(_FIELD.findall(found[1]))
    return {name: fields[name] for name in _KEPT if name in fields}
