"""Which headers are passed on in each direction, and the id of a request. Pure."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable

Headers = list[tuple[bytes, bytes]]

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_KEPT_FROM_ENGINES = _HOP_BY_HOP | {
    b"authorization",
    b"content-length",  # set from the body that was read instead
    b"cookie",
    b"expect",
    b"host",
    b"x-api-key",
    b"x-request-id",
}
_KEPT_FROM_CLIENTS = _HOP_BY_HOP | {b"date", b"location", b"server", b"set-cookie", b"x-request-id"}
_CORS = b"access-control-"  # engines allow every origin; the router's settings decide instead
_OWN = b"x-sllm-"


def values_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """All values of a header. All names are in lower case."""
    return [value for key, value in headers if key == name]


def value_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """The first value of a header; empty if there is none."""
    for key, value in headers:
        if key == name:
            return value
    return b""


def shown_id(headers: Headers) -> str:
    """The client's X-Request-Id, if it is printable and not too long; else a new id."""
    given = value_of(headers, b"x-request-id")
    return given.decode("ascii") if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def for_engine(headers: Headers, *, shown: str, api_key: str) -> Headers:
    """A client's headers without its key and the hop-by-hop headers, and with the engine's key."""
    named = _named_in_connection(headers)
    passed = [
        (name, value)
        for name, value in headers
        if name not in _KEPT_FROM_ENGINES and name not in named and not name.startswith(_OWN)
    ]
    passed.append((b"x-request-id", shown.encode()))
    if api_key:
        passed.append((b"authorization", f"Bearer {api_key}".encode()))
    return passed


def for_client(headers: Headers) -> Headers:
    """An engine's headers without hop-by-hop headers and those that the router sets or withholds itself."""
    named = _named_in_connection(headers)
    return [
        (name, value)
        for name, value in headers
        if name not in _KEPT_FROM_CLIENTS and name not in named and not name.startswith(_CORS)
    ]


def _named_in_connection(headers: Headers) -> frozenset[bytes]:
    """Headers that the Connection header declares hop-by-hop. It can't remove those for framing and content type."""
    named = {token.strip().lower() for value in values_of(headers, b"connection") for token in value.split(b",")}
    return frozenset(named - {b"content-length", b"content-type", b"content-encoding"})
