"""Clients' API keys: only their digests are known, and they are compared in constant time. Pure."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence


def digest_of(key: str) -> str:
    """SHA-256 of a key in hexadecimal; settings hold this instead of the key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys that the ingress accepts. Without any, it is open to everyone."""

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = tuple(bytes.fromhex(digest) for digest in digests)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._digests

    def allow(self, key: bytes) -> bool:
        """Whether a key is one of them. Takes equally long for any answer."""
        digest = hashlib.sha256(key).digest()
        is_known = False
        for known in self._digests:
            is_known |= hmac.compare_digest(known, digest)
        return is_known


def bearer_key(values: Sequence[bytes]) -> bytes | None:
    """The bearer key of a request; None unless it has exactly one Authorization header, with the Bearer scheme."""
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(b" ")
    key = key.strip()
    return key if scheme.lower() == b"bearer" and key else None
