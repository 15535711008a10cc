"""Reads requests' bodies, whole, within limits of size, of time, and of all together. Lives on the ingress's loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from sllm_vllm.router.headers import Headers, value_of
from sllm_vllm.router.openai_errors import ApiError, overloaded
from sllm_vllm.router.settings import IngressSettings
from sllm_vllm.router.watch import Ended, Receive

_DISCARDED_BODIES_MAX = 4
"""How much more than is allowed is read and dropped, so that the client reads the refusal instead of a reset."""


class BodyReader:
    """Knows what all bodies together hold: ``nbytes``."""

    def __init__(self, settings: IngressSettings) -> None:
        self._settings = settings
        self.nbytes = 0

    @contextlib.asynccontextmanager
    async def read(self, headers: Headers, receive: Receive) -> AsyncIterator[bytes]:
        """A body, counted as held until the block ends.

        Raises:
            ApiError: 413, 408 or 503: it is too large, too slow, or too much with all others.
            Ended: the client left before its end.
        """
        pieces: list[bytes] = []
        limit_s = self._settings.body_s_max
        try:
            try:
                async with asyncio.timeout(limit_s):
                    await self._fill(pieces, _declared(headers), receive=receive)
            except TimeoutError:
                message = f"The body took longer than {limit_s:g} s."
                raise ApiError(408, message, kind="timeout_error").closing() from None
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            self.nbytes -= sum(map(len, pieces))

    async def _fill(self, pieces: list[bytes], declared: int, *, receive: Receive) -> None:
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
                self._hold(piece, pieces)
        if nbytes > nbytes_max:
            raise self._too_large()

    def _hold(self, piece: bytes, pieces: list[bytes]) -> None:
        if self.nbytes + len(piece) > self._settings.bodies_nbytes_max:
            raise overloaded("it holds as many bytes of requests as it may").closing()
        self.nbytes += len(piece)
        pieces.append(piece)

    def _too_large(self) -> ApiError:
        nbytes_max = self._settings.body_nbytes_max
        return ApiError(413, f"The body is larger than {nbytes_max} bytes.", code="body_too_large").closing()


async def _next_piece(receive: Receive) -> tuple[bytes, bool]:
    """What came, maybe nothing, and whether there is more to come."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Ended("client_left", "the client left")
    return message.get("body", b""), message.get("more_body", False)


def _declared(headers: Headers) -> int:
    """Content-Length, 0 if there is none. The HTTP parser let in digits alone."""
    value = value_of(headers, b"content-length")
    return int(value) if value.isdigit() and len(value) < 20 else 0
