"""Checksums of chunks and digests of keys, both xxh3, which one core computes faster than memory delivers the data."""

from __future__ import annotations

from typing import Any

import xxhash


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Return the xxh3-64 hash as 16 hexadecimal digits. Releases the GIL."""
    return str(xxhash.xxh3_64_hexdigest(data))


def digest(data: bytes) -> str:
    """Return the xxh3-128 hash as 32 hexadecimal digits, for names. Not safe against deliberate collisions."""
    return str(xxhash.xxh3_128_hexdigest(data))


class RunningChecksum:
    """Computes the checksum of bytes that arrive in pieces."""

    def __init__(self) -> None:
        self._state: Any = xxhash.xxh3_64()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next piece to the checksum."""
        self._state.update(data)

    def finish(self) -> str:
        """Return the checksum of all pieces, and reset."""
        text = str(self._state.hexdigest())
        self._state.reset()
        return text


class RunningDigest:
    """Computes the digest of bytes that arrive in pieces."""

    def __init__(self) -> None:
        self._state: Any = xxhash.xxh3_128()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next piece to the digest. Releases the GIL."""
        self._state.update(data)

    def hexdigest(self) -> str:
        """Return the digest of all pieces so far as 32 hexadecimal digits."""
        return str(self._state.hexdigest())
