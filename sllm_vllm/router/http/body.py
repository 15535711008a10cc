"""Reads whole request bodies, within limits on size, time, and the total of all bodies. Runs on the ingress's loop.

A large body is held once, in its own memory mapping, which returns to the system when it is released; pieces on the
heap would leave it fragmented.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import AsyncIterator

from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.engine_client.headers import Headers, value_of
from sllm_vllm.router.http.deadline import Ended, Receive
from sllm_vllm.router.http.errors import ApiError, overloaded

_DISCARDED_BODIES_MAX = 4
"""Up to this many times the allowed size is read and dropped, so that the client gets the refusal, not a reset."""


_MAPPED_NBYTES = 1 << 16
"""Bodies larger than this get their own memory mapping."""

Body = bytes | memoryview


class BodyReader:
    """Reads bodies and counts the bytes that all of them hold together: ``nbytes``."""

    def __init__(self, settings: IngressSettings) -> None:
        self._settings = settings
        self.nbytes = 0

    @contextlib.asynccontextmanager
    async def read(self, headers: Headers, receive: Receive) -> AsyncIterator[Body]:
        """Read a body, which counts as held until the block ends.

        Raises:
            ApiError: 413, it is too large; 408, it took too long; 503, all bodies together are too large.
            Ended: the client left before the body was complete.
        """
        declared = _declared(headers)
        held = _Held(declared or self._settings.body_nbytes_max)
        limit_s = self._settings.body_s_max
        try:
            try:
                async with asyncio.timeout(limit_s):
                    await self._fill(held, declared, receive=receive)
            except TimeoutError:
                message = f"The body took longer than {limit_s:g} s."
                raise ApiError(408, message, kind="timeout_error").closing() from None
            yield held.body()
        finally:
            self.nbytes -= held.nbytes
            held.release()

    async def _fill(self, held: _Held, declared: int, *, receive: Receive) -> None:
        nbytes_max = self._settings.body_nbytes_max
        nbytes = 0
        if declared > nbytes_max * _DISCARDED_BODIES_MAX:
            raise self._too_large()
        has_more = True
        while has_more:
            piece, has_more = await _next_piece(receive)
            nbytes += len(piece)
            if nbytes > nbytes_max * _DISCARDED_BODIES_MAX:
                raise self._too_large()
            if piece and max(declared, nbytes) <= nbytes_max:
                self._hold(piece, held)
        if nbytes > nbytes_max:
            raise self._too_large()

    def _hold(self, piece: bytes, held: _Held) -> None:
        if self.nbytes + len(piece) > self._settings.bodies_nbytes_max:
            raise overloaded("the bodies of all requests have reached their limit").closing()
        self.nbytes += len(piece)
        held.add(piece)

    def _too_large(self) -> ApiError:
        nbytes_max = self._settings.body_nbytes_max
        return ApiError(413, f"The body is larger than {nbytes_max} bytes.", code="body_too_large").closing()


class _Held:
    """What was read of one body: on the heap while small, then in a mapping of ``nbytes_max`` that fills as needed."""

    def __init__(self, nbytes_max: int) -> None:
        self.nbytes = 0
        self._nbytes_max = nbytes_max
        self._small: bytes = b""
        self._mapped: mmap.mmap | None = None
        self._view: memoryview | None = None

    def add(self, piece: bytes) -> None:
        """Append the next piece."""
        self.nbytes += len(piece)
        if self._mapped is None and self.nbytes <= _MAPPED_NBYTES:
            self._small = self._small + piece if self._small else piece
            return
        if self._mapped is None:
            self._mapped = mmap.mmap(-1, self._nbytes_max, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._mapped.madvise(mmap.MADV_NOHUGEPAGE)  # else a few bytes could hold a whole huge page
            self._mapped.write(self._small)
            self._small = b""
        self._mapped.write(piece)

    def body(self) -> Body:
        """Return the whole body."""
        if self._mapped is None:
            return self._small
        self._view = memoryview(self._mapped)[: self.nbytes]
        return self._view

    def release(self) -> None:
        """Return the memory to the system at once, or, if the body is still being sent or read, after that."""
        self._small = b""
        if self._mapped is None:
            return
        with contextlib.suppress(BufferError):
            if self._view is not None:
                self._view.release()
            self._mapped.close()
        self._mapped = self._view = None


async def _next_piece(receive: Receive) -> tuple[bytes, bool]:
    """Return the next piece, which may be empty, and whether more follows."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Ended("client_left", "the client left")
    return message.get("body", b""), message.get("more_body", False)


def _declared(headers: Headers) -> int:
    """Return Content-Length, or 0 if there is none. The HTTP parser has admitted digits only."""
    value = value_of(headers, b"content-length")
    return int(value) if value.isdigit() and len(value) < 20 else 0
