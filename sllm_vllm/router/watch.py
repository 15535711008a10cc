"""Ends a request's work when its client leaves or a time is over. Owned by the task of one request.

Used like ``asyncio.timeout``: ``async with watch:`` around the work; what is inside is cancelled, and outside stands an
``Ended`` that says why. While a piece of an answer is on its way to a slow client, only the total time counts.
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
"""What a client gets to take the last piece of an answer."""

Reason = Literal["client_left", "client_slow", "timeout"]
SLOW = "sllm.client_slow"
"""Set in a request's scope, by the server, once it has ended the connection of a client that took nothing; then also in
the message ``http.disconnect``."""


class Ended(Exception):
    """The work was ended. ``problem``: which time was over, or that the client left."""

    def __init__(self, reason: Reason, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason
        self.problem = problem


def telling_slow(scope: Message, receive: Receive) -> Receive:
    """The same, whose last message says whether the connection was ended because its client took nothing."""

    async def told() -> Message:
        message = await receive()
        return {**message, SLOW: True} if SLOW in scope and message["type"] == "http.disconnect" else message

    return told


async def send_last(send: Send, *messages: Message) -> None:
    """Send what no watch is kept over. What the client does not take stays unsent, and the connection is closed."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_S):
            for message in messages:
                await send(message)


class Watch:
    """The client's connection and the clock of one request. ``reason`` is None as long as nothing ended it."""

    def __init__(self, receive: Receive, total_s: float) -> None:
        self.reason: Reason | None = None
        self._problem = ""
        self._receive = receive
        self._total_s = total_s
        self._loop = asyncio.get_running_loop()
        self._timers: list[asyncio.TimerHandle] = []
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
        # Nothing here may wait: from the first line on, nobody else can cancel this task on the watch's behalf.
        self._listener.cancel()
        self._total.cancel()
        if self._step is not None:
            self._step.cancel()
        if self.reason is None or kind is None:
            return
        if self._task.uncancel() == 0 and issubclass(kind, asyncio.CancelledError):
            raise Ended(self.reason, self._problem) from error

    def begin_step(self, step_s: float | None, problem: str) -> None:
        """From now on a step may take so long; None: as long as the whole may."""
        if self._step is not None:
            self._step.cancel()
            self._step = None
        self._step_s = step_s
        self._step_problem = problem
        self.resume()
        if step_s is not None:
            self._step = self._loop.call_later(step_s, self._check)

    def resume(self) -> None:
        """A step begins, of the same kind as the last."""
        self._since_s = self._loop.time()

    def pause(self) -> None:
        """The step is over; the time until ``resume`` is nobody's."""
        self._since_s = None

    def _check(self) -> None:
        # One timer that looks again later is cheaper than a new one for each piece of an answer.
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
