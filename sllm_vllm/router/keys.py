"""Clients' keys: known by their digests alone, compared in constant time. Pure."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence


def digest_of(key: str) -> str:
    """SHA-256 of a key, in hexadecimal: what settings hold instead of the key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys that open the ingress. None at all: it is open to everybody."""

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = tuple(bytes.fromhex(digest) for digest in digests)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._digests

    def allow(self, key: bytes) -> bool:
        """Whether it is one of them. Takes as long for any answer."""
        digest = hashlib.sha256(key).digest()
        is_known = False
        for known in self._digests:
            is_known |= hmac.compare_digest(known, digest)
        return is_known


def bearer_key(values: Sequence[bytes]) -> bytes | None:
    """The key of a request's Authorization headers; None unless there is exactly one, and of this scheme."""
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(b" ")
    key = key.strip()
    return key if scheme.lower() == b"bearer" and key else None
