"""Notes in a streamed answer: the tokens that its text was made from, and whether the engine core has died.

A client that sends ``x-sllm-notes: 1`` gets notes before the events of a stream. A note is a comment of server-sent
events, which other readers of such streams ignore: ``: sllm [...]``, with a JSON list. A router that reads the notes
can resume the answer on another engine after this process has died. Entries of the list:

``{"d": prompt digest, "c": cached tokens, "n": choices}``, only in the first note
``{"i": choice, "t": its new tokens, "l": their logprobs, "f": how it ended}``, the last two only if there are any
``{"end": true}``: all choices have ended; the rest of the answer can't be resumed on another engine
``{"died": true}``: the engine core has died, and the connection ends

If the core dies before an answer has begun, the answer is a 500 with ``x-sllm-core: died``.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sllm_vllm.engine.in_flight import find_states, note_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

NOTES_HEADER = b"x-sllm-notes"
CORE_HEADER = b"x-sllm-core"
DIED = b"died"
NOTE = b": sllm "


class AnswerNotes:
    """ASGI middleware of one API server. ``engine`` returns its ``AsyncLLM``, or None while it is not known yet."""

    def __init__(self, app: App, engine: Callable[[], Any]) -> None:
        self._app = app
        self._engine = engine

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle an HTTP request; pass anything else on."""
        engine = self._engine() if scope["type"] == "http" else None
        if engine is None:
            await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, _NotedAnswer(engine, scope, send).send)


class _NotedAnswer:
    """Rewrites the messages of one answer."""

    def __init__(self, engine: Any, scope: Message, send: Send) -> None:
        headers = dict(scope["headers"])
        self._engine = engine
        self._server = getattr(getattr(scope.get("app"), "state", None), "server", None)
        self._send = send
        self._is_wanted = headers.get(NOTES_HEADER) == b"1"
        self._name = headers.get(b"x-request-id", b"").decode("latin-1")
        self._has_begun = self._is_stream = self._is_over = False
        self._notes: _Notes | None = None

    async def send(self, message: Message) -> None:
        if self._is_over:
            return  # the answer is left incomplete, so that the server closes the connection
        if message["type"] == "http.response.start":
            message = self._begin(message)
        elif self._is_stream and message.get("body"):
            if self._engine.errored:
                self._is_over = True
                self._end_server()
                message = {"type": "http.response.body", "body": _line([{"died": True}]) + b"\n", "more_body": True}
            else:
                message = {**message, "body": self._note() + message["body"]}
        await self._send(message)

    def _begin(self, message: Message) -> Message:
        headers = list(message.get("headers", ()))
        kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
        self._is_stream = self._is_wanted and kind.startswith(b"text/event-stream")
        if message["status"] >= 500 and self._engine.errored:
            self._end_server()
            return {**message, "headers": [*headers, (CORE_HEADER, DIED)]}
        return message

    def _note(self) -> bytes:
        if self._notes is None:
            self._notes = _Notes(self._engine, find_states(self._engine, self._name) or [])
        return self._notes.next()

    def _end_server(self) -> None:
        """End the API server. vLLM does so, too, but up to five seconds later if only streams are open."""
        if self._server is not None:
            self._server.should_exit = True


class _Notes:
    """Makes a request's notes, each with what is new since the last one.

    Args:
        states: vLLM's states of the request's choices; if empty, there are no notes.
    """

    def __init__(self, engine: Any, states: list[Any]) -> None:
        self._engine = engine
        self._states = states
        self._told: dict[int, int] = {}
        """By choice, the number of tokens sent so far; -1 once its end was sent."""
        self._is_over = not states

    def next(self) -> bytes:
        """The next note as a line; empty if there is nothing new."""
        if self._is_over:
            return b""
        entries = note_of(self._engine, self._states, self._told)
        self._is_over = entries is None or any("end" in entry for entry in entries)
        return _line(entries) if entries else b""


def _line(entries: list[dict[str, Any]]) -> bytes:
    return NOTE + json.dumps(entries, separators=(",", ":")).encode() + b"\n"
