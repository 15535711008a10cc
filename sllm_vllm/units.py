"""Byte units and how they are printed. Pure."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def format_nbytes(nbytes: float) -> str:
    """Bytes for a person, in binary units: ``1.13 GiB``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def format_bps(bps: float | None) -> str:
    """Bytes a second for a person, in decimal units as disks and networks are sold: ``1.20 GB/s``."""
    return "-" if bps is None else f"{bps / 1e9:.2f} GB/s"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
