"""The protocol between the store's daemon and its clients. Pure: encodes and decodes messages.

A frame is a length (4 bytes, big-endian) followed by that many bytes of JSON in UTF-8: an object with a key ``kind``.
The client sends ``Hello`` first; the daemon answers ``StoreWelcome``, with a read-only descriptor of the pool attached
to its first byte. After that, requests are answered one at a time with ``Leased``, ``StoreReply`` or ``RefusedReply``.
A connection holds at most one lease, which ends with the connection; while it is open, the daemon sends ``Given`` and
``Failed`` unasked. Both sides check the other's user id.

Any violation of this, or of a limit below, ends the connection. Nothing is ever unpickled or evaluated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

T = TypeVar("T")
SPANS_MAX = 1 << 16
"""Most spans in one message."""

_LENGTH = struct.Struct(">I")

Name = Annotated[str, Field(min_length=1, max_length=4096)]
Token = Annotated[int, Field(ge=1, lt=1 << 63)]
Index = Annotated[int, Field(ge=0, lt=1 << 31)]
Spans = Annotated[tuple[Index, ...], Field(max_length=SPANS_MAX)]


class ProtocolError(Exception):
    """The other side violated the protocol. The connection must end."""


class _StoreMessage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hello(_StoreMessage):
    """The first message from a client."""

    kind: Literal["hello"] = "hello"
    version: int


class Find(_StoreMessage):
    """Find a checkpoint by its path, or by its name in the store's directory or at a remote.

    Answered with a ``StoreReply`` that holds ``manifest``, the path of a readable manifest.json, and ``tier``.
    """

    kind: Literal["find"] = "find"
    checkpoint: Name


class LeaseOrder(_StoreMessage):
    """Request a rank's partition with the ``content_digest`` given by ``digest``.

    Answered with ``Leased``, then ``Given`` messages. With ``hold`` the client can keep slots mapped as long as it
    lives; otherwise it copies every span and releases it.
    """

    kind: Literal["lease"] = "lease"
    checkpoint: Name
    rank: Index
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    hold: bool


class Release(_StoreMessage):
    """Release spans that the client no longer uses. Not answered."""

    kind: Literal["release"] = "release"
    token: Token
    spans: Spans


class Ping(_StoreMessage):
    """Check that the daemon is alive; answered with ``StoreReply``. Sent after a silence, as a download may take
    long."""

    kind: Literal["ping"] = "ping"


class Hint(_StoreMessage):
    """Announce that a vLLM process has started and will load this model. Not answered, never refused."""

    kind: Literal["hint"] = "hint"
    model: Name
    tensor_parallel_size: Annotated[int, Field(ge=1, le=4096)] | None = None


class Order(_StoreMessage):
    """An operator's order, answered with ``StoreReply`` or ``RefusedReply``.

    ``wait``: answer a prefetch when it has ended, not when it begins.
    """

    kind: Literal["order"] = "order"
    order: Literal["status", "prefetch", "evict", "pin", "unpin", "stop"]
    checkpoint: Name | None = None
    wait: bool = False


class StoreWelcome(_StoreMessage):
    """The daemon's first message. The pool's descriptor is attached to it."""

    kind: Literal["welcome"] = "welcome"
    version: int
    slot_nbytes: int
    num_slots: int
    page_nbytes: int


class Leased(_StoreMessage):
    """The lease is granted. Span i of the partition's data starts with chunk ``i * chunks_per_span``."""

    kind: Literal["leased"] = "leased"
    token: Token
    chunks_per_span: Annotated[int, Field(ge=1)]
    num_spans: Index


class Given(_StoreMessage):
    """Spans that are in memory and verified: (span, slot, keep). If ``keep`` is false, copy and release it at once."""

    kind: Literal["given"] = "given"
    token: Token
    spans: tuple[tuple[int, int, bool], ...]


class Failed(_StoreMessage):
    """A span can't be read; the lease gets no more spans. ``error`` names a class of ``errors.py``."""

    kind: Literal["failed"] = "failed"
    token: Token
    error: str
    path: str
    problem: str
    mend: str


class StoreReply(_StoreMessage):
    """The result of a request."""

    kind: Literal["reply"] = "reply"
    data: dict[str, Any] = {}


class RefusedReply(_StoreMessage):
    """The request is refused. The connection stays open, unless the request was ``Hello``."""

    kind: Literal["refused"] = "refused"
    error: str
    path: str
    problem: str
    mend: str


Request = Hello | Find | LeaseOrder | Release | Ping | Hint | Order
Answer = StoreWelcome | Leased | Given | Failed | StoreReply | RefusedReply

_requests: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
_answers: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="kind")])


def encode(message: Request | Answer) -> bytes:
    """Encode a message as a frame."""
    body = message.model_dump_json().encode()
    return _LENGTH.pack(len(body)) + body


def decode_request(body: bytes) -> Request:
    """Decode a client's message.

    Raises:
        ProtocolError: ``body`` is not a valid message.
    """
    return _decode(_requests, body)


def decode_answer(body: bytes) -> Answer:
    """Decode a daemon's message.

    Raises:
        ProtocolError: ``body`` is not a valid message.
    """
    return _decode(_answers, body)


def _decode(adapter: TypeAdapter[T], body: bytes) -> T:
    try:
        return adapter.validate_json(body)
    except (ValidationError, RecursionError) as error:
        raise ProtocolError(f"a message of {len(body)} bytes can't be understood ({type(error).__name__})") from None


class FrameReader:
    """Splits a stream of bytes into the bodies of frames. Buffers at most one unfinished frame.

    Args:
        nbytes_max: size of the largest body that is accepted.
    """

    def __init__(self, nbytes_max: int) -> None:
        self._nbytes_max = nbytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add bytes, and yield every body that is complete.

        Raises:
            ProtocolError: a frame's length exceeds ``nbytes_max``.
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
