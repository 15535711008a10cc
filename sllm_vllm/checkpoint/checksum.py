"""Checksums of chunks and digests of keys: xxh3, which a core computes faster than memory delivers."""

from __future__ import annotations

from typing import Any

import xxhash


def checksum(data: bytes | bytearray | memoryview) -> str:
    """xxh3-64 as 16 hexadecimal digits. Releases the GIL."""
    return str(xxhash.xxh3_64_hexdigest(data))


def digest(data: bytes) -> str:
    """xxh3-128 as 32 hexadecimal digits, for names that must not collide by accident. Not a defence against intent."""
    return str(xxhash.xxh3_128_hexdigest(data))


class RunningChecksum:
    """The checksum of bytes that come in pieces."""

    def __init__(self) -> None:
        self._state: Any = xxhash.xxh3_64()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next piece."""
        self._state.update(data)

    def finish(self) -> str:
        """The checksum so far; starts anew."""
        text = str(self._state.hexdigest())
        self._state.reset()
        return text


class RunningDigest:
    """The digest of bytes that come in pieces."""

    def __init__(self) -> None:
        self._state: Any = xxhash.xxh3_128()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next piece. Releases the GIL."""
        self._state.update(data)

    def hexdigest(self) -> str:
        """The digest so far, as 32 hexadecimal digits."""
        return str(self._state.hexdigest())
