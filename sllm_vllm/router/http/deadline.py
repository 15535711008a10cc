"""Ends a request's work when its client leaves or a timeout expires. Owned by the task of one request.

Used like ``asyncio.timeout``, with ``async with watch:`` around the work. The work is cancelled, and the block raises
``Ended``, which says why. While a piece of an answer is being sent to a slow client, only the total timeout counts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any, Literal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
LAST_S = 60.0
"""How long a client has to take the last piece of an answer."""

Reason = Literal["client_left", "client_slow", "timeout"]
SLOW = "sllm.client_slow"
"""The server sets this in a request's scope when it has ended the connection because the client took nothing;
``telling_slow`` then sets it in the message ``http.disconnect``, too.
"""


class Ended(Exception):
    """The work was ended. ``problem``: which timeout expired, or that the client left."""

    def __init__(self, reason: Reason, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason
        self.problem = problem


def telling_slow(scope: Message, receive: Receive) -> Receive:
    """Wrap ``receive``: its last message says whether the connection was ended because the client took nothing."""

    async def told() -> Message:
        message = await receive()
        return {**message, SLOW: True} if SLOW in scope and message["type"] == "http.disconnect" else message

    return told


async def send_last(send: Send, *messages: Message) -> None:
    """Send messages outside of a watch. What the client does not take in ``LAST_S`` is dropped with the connection."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_S):
            for message in messages:
                await send(message)


class Watch:
    """Watches one request's client and timeouts. ``reason`` is None until one of them has ended the work."""

    def __init__(self, receive: Receive, total_s: float) -> None:
        self.reason: Reason | None = None
        self._problem = ""
        self._receive = receive
        self._total_s = total_s
        self._loop = asyncio.get_running_loop()
        self._step: asyncio.TimerHandle | None = None
        self._step_s: float | None = None
        self._step_problem = ""
        self._since_s: float | None = None

    async def __aenter__(self) -> Watch:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._listener = self._loop.create_task(self._listen())
        self._total = self._loop.call_later(
            self._total_s, self._end, "timeout", f"more than {self._total_s:g} s for the whole request"
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # No await in this method: without one, ``_end`` can't run and cancel this task between these lines.
        self._listener.cancel()
        self._total.cancel()
        if self._step is not None:
            self._step.cancel()
        if self.reason is None or kind is None:
            return
        if self._task.uncancel() == 0 and issubclass(kind, asyncio.CancelledError):
            raise Ended(self.reason, self._problem) from error

    def begin_step(self, step_s: float | None, problem: str) -> None:
        """Begin a step that may take ``step_s``; None: only the total timeout counts."""
        if self._step is not None:
            self._step.cancel()
            self._step = None
        self._step_s = step_s
        self._step_problem = problem
        self.resume()
        if step_s is not None:
            self._step = self._loop.call_later(step_s, self._check)

    def resume(self) -> None:
        """Begin another step of the same kind."""
        self._since_s = self._loop.time()

    def pause(self) -> None:
        """End the step; the time until ``resume`` does not count."""
        self._since_s = None

    def _check(self) -> None:
        # One timer that checks again later is cheaper than a new timer for each piece of an answer.
        assert self._step_s is not None
        now_s = self._loop.time()
        end_s = (now_s if self._since_s is None else self._since_s) + self._step_s
        if end_s <= now_s:
            self._end("timeout", self._step_problem)
        else:
            self._step = self._loop.call_at(end_s, self._check)

    async def _listen(self) -> None:
        while (message := await self._receive())["type"] != "http.disconnect":
            pass
        if message.get(SLOW):
            self._end("client_slow", "the client took nothing of what it was sent")
        else:
            self._end("client_left", "the client left")

    def _end(self, reason: Reason, problem: str) -> None:
        if self.reason is None:
            self.reason = reason
            self._problem = problem
            self._task.cancel()
