"""The words between the store's daemon and its clients. Pure: messages to bytes and back.

A frame is a length (4 bytes, big-endian) and so many bytes of a JSON object in UTF-8 with a key ``kind``. The client
speaks first (``Hello``); the daemon answers ``Welcome``, with a read-only descriptor of the pool attached to its first
byte. Then one request at a time is answered by ``Leased``, ``Reply`` or ``Refused``. A connection holds one lease at
most, which ends with it; ``Given`` and ``Failed`` come unasked while it lasts. Both sides check the other's user.

Anything that breaks this, or a bound below, ends the connection; nothing is ever unpickled or evaluated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

T = TypeVar("T")
SPANS_MAX = 1 << 16
"""Spans in one message."""

_LENGTH = struct.Struct(">I")

Name = Annotated[str, Field(min_length=1, max_length=4096)]
Token = Annotated[int, Field(ge=1, lt=1 << 63)]
Index = Annotated[int, Field(ge=0, lt=1 << 31)]
Spans = Annotated[tuple[Index, ...], Field(max_length=SPANS_MAX)]


class ProtocolError(Exception):
    """The other side does not keep to the protocol. The connection must end."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hello(_Message):
    """First word of a client."""

    kind: Literal["hello"] = "hello"
    version: int


class Find(_Message):
    """Where is the checkpoint of this name (in the store's directory or at a remote), or path? → ``Reply`` with
    ``manifest``: path of a readable manifest.json, and ``tier``."""

    kind: Literal["find"] = "find"
    checkpoint: Name


class Lease(_Message):
    """I want a rank's partition whose ``content_digest`` is this. → ``Leased``, then ``Given``.

    With ``hold`` the client can map slots for as long as it lives; else it copies every span and releases it.
    """

    kind: Literal["lease"] = "lease"
    checkpoint: Name
    rank: Index
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    hold: bool


class Release(_Message):
    """I no longer look at these spans. Not answered."""

    kind: Literal["release"] = "release"
    token: Token
    spans: Spans


class Ping(_Message):
    """Are you there? → ``Reply``. For a client that has heard nothing for a while: a download may take long."""

    kind: Literal["ping"] = "ping"


class Hint(_Message):
    """A vLLM process has just started and will want this model. Not answered, never refused."""

    kind: Literal["hint"] = "hint"
    model: Name
    tensor_parallel_size: Annotated[int, Field(ge=1, le=4096)] | None = None


class Order(_Message):
    """An operator's order. → ``Reply`` or ``Refused``. ``wait``: answer a prefetch when it ended, not when it began."""

    kind: Literal["order"] = "order"
    order: Literal["status", "prefetch", "evict", "pin", "unpin", "stop"]
    checkpoint: Name | None = None
    wait: bool = False


class Welcome(_Message):
    """The daemon's first word; the pool's descriptor comes with it."""

    kind: Literal["welcome"] = "welcome"
    version: int
    slot_nbytes: int
    num_slots: int
    page_nbytes: int


class Leased(_Message):
    """The lease is granted. Span i holds the chunks from ``i * chunks_per_span`` on, of the partition's data."""

    kind: Literal["leased"] = "leased"
    token: Token
    chunks_per_span: Annotated[int, Field(ge=1)]
    num_spans: Index


class Given(_Message):
    """These spans are in memory, verified: (span, slot, keep). Without ``keep``: copy it and release it at once."""

    kind: Literal["given"] = "given"
    token: Token
    spans: tuple[tuple[int, int, bool], ...]


class Failed(_Message):
    """A span can't be had; nothing more comes. ``error`` names a class of ``errors.py``."""

    kind: Literal["failed"] = "failed"
    token: Token
    error: str
    path: str
    problem: str
    mend: str


class Reply(_Message):
    """What was asked for."""

    kind: Literal["reply"] = "reply"
    data: dict[str, Any] = {}


class Refused(_Message):
    """The request is not granted; the connection goes on (but after ``Hello``)."""

    kind: Literal["refused"] = "refused"
    error: str
    path: str
    problem: str
    mend: str


Request = Hello | Find | Lease | Release | Ping | Hint | Order
Answer = Welcome | Leased | Given | Failed | Reply | Refused

_requests: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
_answers: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="kind")])


def encode(message: Request | Answer) -> bytes:
    """A message as a frame."""
    body = message.model_dump_json().encode()
    return _LENGTH.pack(len(body)) + body


def decode_request(body: bytes) -> Request:
    """A client's message.

    Raises:
        ProtocolError: it is none.
    """
    return _decode(_requests, body)


def decode_answer(body: bytes) -> Answer:
    """A daemon's message.

    Raises:
        ProtocolError: it is none.
    """
    return _decode(_answers, body)


def _decode(adapter: TypeAdapter[T], body: bytes) -> T:
    try:
        return adapter.validate_json(body)
    except (ValidationError, RecursionError) as error:
        raise ProtocolError(f"a message of {len(body)} bytes can't be understood ({type(error).__name__})") from None


class FrameReader:
    """Cuts a stream of bytes into frames' bodies. Holds one unfinished frame at most.

    Args:
        nbytes_max: largest body.
    """

    def __init__(self, nbytes_max: int) -> None:
        self._nbytes_max = nbytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add bytes; gives every body that is complete.

        Raises:
            ProtocolError: a frame is announced that is larger than allowed.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (nbytes,) = _LENGTH.unpack_from(self._buffer)
            if nbytes > self._nbytes_max:
                raise ProtocolError(f"a message of {nbytes} bytes is announced, at most {self._nbytes_max} are allowed")
            end = _LENGTH.size + nbytes
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield body
