"""Byte units: constants, formatting and parsing. Pure."""

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def format_nbytes(nbytes: float) -> str:
    """Format a number of bytes for people, in binary units: ``1.13 GiB``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def format_bps(bps: float | None) -> str:
    """Format bytes per second for people, in decimal units, as disks and networks are sold: ``1.20 GB/s``."""
    return "-" if bps is None else f"{bps / 1e9:.2f} GB/s"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": GIB << 10}


def parse_nbytes(text: str) -> int:
    """Parse a number of bytes as people write it: ``16GiB``, ``500 MB``, ``4096``.

    Raises:
        ValueError: the text is not a number of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a number of bytes; write it like 16GiB, 500MB or 4096")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
