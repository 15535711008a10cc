"""Carries out one live migration: asks the source, has the target catch up, switches. Decides nothing; data path.

``core/migration.py`` decides each step. The source's stream flows to the client throughout, except during the switch:
then it is held, but not closed, until the target is seen to continue; if that fails, the client gets what was held.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from typing import Any

from sllm_vllm.router.config.settings import MigrationSection
from sllm_vllm.router.core.migration import (
    AskSource,
    Fill,
    Filled,
    GiveUp,
    Migration,
    MigrationAction,
    MigrationEvent,
    SideFailed,
    SourceEnded,
    SourceTold,
    Switch,
    TakeOver,
    WentOn,
)
from sllm_vllm.router.engine_client.api import EngineApi, EngineReply, read_reply
from sllm_vllm.router.engine_client.connection import EngineConnection, EngineFailed, Upstream
from sllm_vllm.router.engine_client.headers import Headers
from sllm_vllm.router.gate import Gate, MoveOrder, MoveReport
from sllm_vllm.router.migration.leg import Leg, drop_answer, is_event_stream
from sllm_vllm.router.migration.moved_body import MovedBody, NotMovable, resumed_body
from sllm_vllm.router.migration.transcript import NotAligned

logger = logging.getLogger(__name__)

MOVE_S_MAX = 600.0
FILL_S_MAX = 120.0
"""Longest that one prefill of a round may take."""
GIVEN_S_MAX = 0.25
"""Longest wait for the source's next event, right after which its stream is held."""
PROOF_PAUSE_S = 0.01
PROOF_PAUSE_S_MAX = 0.05
_RESUME = "resume"


class Mover:
    """Carries out one order for one request. ``run`` is a task; cancelling it leaves nothing at the target."""

    def __init__(
        self, leg: Leg, order: MoveOrder, gate: Gate, *, upstream: Upstream, settings: MigrationSection
    ) -> None:
        self._leg = leg
        self._order = order
        self._gate = gate
        self._source = leg.ticket
        self._target = order.target
        self._upstream = upstream
        self._api = EngineApi(upstream)
        self._settings = settings
        self._body: MovedBody | None = None
        self._told: dict[str, Any] = {}
        self._answer: asyncio.Task[EngineConnection] | None = None
        self._samples: list[tuple[int, float]] = []
        self._nbytes = 0
        self._num_moved = 0
        self._migration: Migration | None = None

    async def run(self) -> None:
        """Carry out the order and report the result to the gate."""
        try:
            async with asyncio.timeout(MOVE_S_MAX):
                await self._drive()
        except TimeoutError:
            self._fail(f"it took more than {MOVE_S_MAX:g} s", is_lasting=False)
        except EngineFailed as problem:
            self._fail(str(problem), is_lasting=False)
        except NotMovable as problem:
            self._fail(str(problem), is_lasting=True)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # an engine of another version may differ
            self._fail(f"an engine's answer is not understood: {error!r}", is_lasting=True)
        finally:
            if self._answer is not None:
                drop_answer(self._answer)

    async def _drive(self) -> None:
        self._body = await self._leg.moved_body()
        state = await self._api.state(self._target)
        if not state.body.get("resume"):
            reason = state.body.get("reason") or f"it answers {state.status}"
            self._fail(f"{self._target.replica} takes over no requests: {reason}", is_lasting=False)
            return
        self._migration = migration = Migration(
            self._settings.limits(), block_tokens=state.body["block_size"], model_tokens_max=state.body["max_model_len"]
        )
        actions = deque(migration.begin())
        while actions:
            event = await self._do(actions.popleft())
            if event is not None:
                actions.extend(migration.handle(event))

    async def _do(self, action: MigrationAction) -> MigrationEvent | None:
        logger.debug("event=move_step request=%s action=%r", self._source.request, action)
        match action:
            case AskSource():
                await asyncio.sleep(action.after_s)
                return await self._ask_source()
            case Fill():
                await asyncio.sleep(action.after_s)
                return await self._fill(action)
            case Switch():
                return await self._switch()
            case TakeOver():
                self._take_over()
            case GiveUp():
                self._fail(action.reason, is_lasting=action.is_lasting)
        return None

    # --------------------------------------------------------------------------------------------------------- rounds

    async def _ask_source(self) -> MigrationEvent:
        reply = await self._api.tokens(self._source, self._leg.asked.shown)
        self._nbytes += reply.nbytes
        if reply.status != 200:
            return SideFailed(f"the source answers {reply.status}: {reply.problem}")
        if _RESUME not in reply.body:
            return SideFailed(str(reply.body.get("immovable", "it can't be moved")), is_lasting=True)
        self._told = reply.body
        num_outputs = tuple(len(tokens) for tokens in self._open_choices())
        return SourceTold(len(reply.body["prompt_token_ids"]), num_outputs, at_s=time.monotonic())

    def _open_choices(self) -> list[list[int]]:
        return [one["token_ids"] for one in self._told[_RESUME]["choices"] if one["finish_reason"] is None]

    async def _fill(self, fill: Fill) -> MigrationEvent:
        begun_s = time.monotonic()
        prompt: list[int] = self._told["prompt_token_ids"]
        for number, (tokens, num) in enumerate(zip(self._open_choices(), fill.num_tokens, strict=True)):
            body = self._fill_body([*prompt, *tokens][:num])
            self._nbytes += len(body)
            name = f"fill-{number}-{num}-{self._leg.asked.shown}"
            reply = await self._api.prefill(self._target, body, name=name, seconds_max=FILL_S_MAX)
            if reply.status != 200:
                return SideFailed(f"the target answers {reply.status}: {reply.problem}")
        seconds = time.monotonic() - begun_s
        self._samples.append((fill.num_new, seconds))
        return Filled(seconds)

    def _fill_body(self, tokens: list[int]) -> bytes:
        """A request for one token after these, with the same adapter and the same part of the prefix cache."""
        assert self._body is not None
        body = {"model": self._source.model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0}
        if "cache_salt" in self._body:
            body["cache_salt"] = self._body.get("cache_salt")
        return json.dumps(body, separators=(",", ":")).encode()

    # --------------------------------------------------------------------------------------------------------- switch

    async def _switch(self) -> MigrationEvent:
        await self._leg.wait_given(GIVEN_S_MAX)
        if not self._leg.hold():
            return SourceEnded()
        told = await self._ask_source()
        if isinstance(told, SideFailed):
            return told
        body = self._resumed_body()
        self._nbytes += len(body)
        headers = self._leg.headers_for(self._target)
        self._answer = asyncio.get_running_loop().create_task(self._post(headers, body))
        self._num_moved = sum(len(choice["token_ids"]) for choice in self._told[_RESUME]["choices"])
        try:
            async with asyncio.timeout(self._settings.switch_timeout):
                return await self._wait_went_on(self._num_moved)
        except TimeoutError:
            return SideFailed(f"the target did not go on within {self._settings.switch_timeout:g} s")

    async def _post(self, headers: Headers, body: bytes) -> EngineConnection:
        return await self._upstream.post(self._target.url, target=self._leg.asked.target, headers=headers, body=body)

    def _resumed_body(self) -> bytes:
        assert self._body is not None
        return resumed_body(
            self._body,
            self._told[_RESUME],
            prompt=self._told["prompt_token_ids"],
            key=self._target.api_key,
            request=self._leg.asked.shown,
        )

    async def _wait_went_on(self, owned: int) -> MigrationEvent:
        """Wait until the target has generated a token, ended, or refused. It may be queued there until then."""
        assert self._answer is not None
        pause_s = PROOF_PAUSE_S
        while True:
            if not self._answer.done():
                await asyncio.wait([self._answer], timeout=pause_s)
            else:
                await asyncio.sleep(pause_s)
            if self._answer.done() and (event := await self._judged(self._answer.result())) is not None:
                return event
            num = await self._api.num_output_tokens(self._target, self._leg.asked.shown)
            if num is not None and num > owned:
                return WentOn()
            pause_s = min(1.5 * pause_s, PROOF_PAUSE_S_MAX)

    async def _judged(self, answer: EngineConnection) -> MigrationEvent | None:
        """The event that the head of the target's answer, or the whole answer, amounts to; None if it just began."""
        if answer.status != 200:
            self._answer = None  # ``read_reply`` gives its connection back
            reply: EngineReply = await read_reply(answer)
            return SideFailed(f"the target answers {reply.status}: {reply.problem}")
        if not answer.is_whole:
            return None
        if is_event_stream(answer.headers):
            try:
                self._leg.check_aligned(answer.peek())
            except NotAligned as problem:
                return SideFailed(f"the target does not go on: {problem}")
        return WentOn()

    def _take_over(self) -> None:
        assert self._answer is not None
        report = self._report(self._leg.held_s)
        source = self._leg.ticket
        if not self._leg.divert(self._order, self._answer):
            self._fail("its source was done first", is_lasting=False)
            return
        self._answer = None
        logger.info(
            "event=moved request=%s source=%s target=%s tokens=%d rounds=%d computed=%d bytes=%d held_ms=%.1f",
            *(source.request, self._order.source, self._target.replica, report.num_moved, report.num_rounds),
            *(report.num_filled, report.nbytes, report.held_s * 1000),
        )
        self._gate.moved(source, self._order, report)

    # ------------------------------------------------------------------------------------------------------ the end

    def _fail(self, reason: str, *, is_lasting: bool) -> None:
        self._leg.release()
        source = self._leg.ticket
        logger.warning(
            "event=not_moved request=%s source=%s target=%s is_lasting=%s reason=%r",
            *(source.request, self._order.source, self._target.replica, is_lasting, reason),
        )
        self._gate.not_moved(source, self._order, self._report(0.0), reason=reason, is_lasting=is_lasting)

    def _report(self, held_s: float) -> MoveReport:
        migration = self._migration
        num_rounds, num_filled = (migration.num_rounds, migration.num_filled) if migration is not None else (0, 0)
        return MoveReport(
            num_rounds, num_filled, self._num_moved, nbytes=self._nbytes, held_s=held_s, samples=tuple(self._samples)
        )
