"""Requests that the router itself makes of an engine: our own routes there, and prefills. Data path.

Each answer is bounded in bytes and in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from sllm_vllm.router.engine_client.connection import EngineConnection, EngineFailed, Upstream
from sllm_vllm.router.engine_client.headers import Headers
from sllm_vllm.router.gate import Ticket
from sllm_vllm.units import MIB

ANSWER_NBYTES_MAX = 64 * MIB
"""The largest answer holds prompt and output of one request with all its logprobs."""
ANSWER_S_MAX = 10.0
_OURS = "/sllm/"


@dataclass(frozen=True, slots=True)
class EngineReply:
    """A whole answer. ``nbytes``: size of its body."""

    status: int
    body: dict[str, Any]
    nbytes: int

    @property
    def problem(self) -> str:
        """The error message in it, in the form of vLLM or of our routes."""
        error = self.body.get("error", self.body.get("message", ""))
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


class EngineApi:
    """Sends these requests over the connections of one data path."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def state(self, ticket: Ticket) -> EngineReply:
        """Ask whether an engine can move requests, and for its block size and context length.

        Raises:
            EngineFailed: it does not answer. All other methods raise it, too.
        """
        return await self._get(ticket, "state")

    async def tokens(self, ticket: Ticket, shown: str) -> EngineReply:
        """Ask for the tokens that a request has so far, by its X-Request-Id; status 404 if it is not in flight."""
        return await self._get(ticket, f"requests/{quote(shown, safe='')}/tokens")

    async def num_output_tokens(self, ticket: Ticket, shown: str) -> int | None:
        """Output tokens of all choices of a request; None if it is not in flight."""
        reply = await self._get(ticket, "requests")
        names = (shown, f"chatcmpl-{shown}", f"cmpl-{shown}-0")
        found = [one for one in reply.body.get("requests", ()) if one.get("id") in names]
        return sum(found[0]["num_output_tokens"]) if len(found) == 1 else None

    async def max_model_len(self, ticket: Ticket) -> int | None:
        """The engine's context length in tokens, from vLLM's list of models; None if the list does not say."""
        async with _limited(ANSWER_S_MAX):
            connection = await self._upstream.get(ticket.url, target="/v1/models", headers=_authorization(ticket))
            reply = await read_reply(connection)
        models = reply.body.get("data")
        first = models[0] if isinstance(models, list) and models else None
        length = first.get("max_model_len") if isinstance(first, dict) else None
        return length if isinstance(length, int) else None

    async def prefill(self, ticket: Ticket, body: bytes, *, name: str, seconds_max: float) -> EngineReply:
        """Have the engine compute a prompt into its prefix cache, by asking for one token after it."""
        headers: Headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", name.encode()),
            *_authorization(ticket),
        ]
        async with _limited(seconds_max):
            connection = await self._upstream.post(ticket.url, target="/v1/completions", headers=headers, body=body)
            return await read_reply(connection)

    async def _get(self, ticket: Ticket, path: str) -> EngineReply:
        async with _limited(ANSWER_S_MAX):
            connection = await self._upstream.get(ticket.url, target=_OURS + path, headers=_authorization(ticket))
            return await read_reply(connection)


async def read_reply(connection: EngineConnection) -> EngineReply:
    """Read an answer to its end. A body that is not a JSON object is returned as an empty one.

    Raises:
        EngineFailed: the answer breaks off, or is too large.
    """
    pieces: list[bytes] = []
    nbytes = 0
    try:
        while piece := await connection.read():
            pieces.append(piece)
            nbytes += len(piece)
            if nbytes > ANSWER_NBYTES_MAX:
                raise EngineFailed("its answer is too large")
    finally:
        connection.close()
    try:
        found = json.loads(b"".join(pieces) or b"{}")
    except ValueError:
        found = {}
    return EngineReply(connection.status, found if isinstance(found, dict) else {}, nbytes)


def _authorization(ticket: Ticket) -> Headers:
    return [(b"authorization", f"Bearer {ticket.api_key}".encode())] if ticket.api_key else []


@contextlib.asynccontextmanager
async def _limited(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EngineFailed(f"it did not answer within {seconds:g} s") from None
