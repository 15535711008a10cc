"""Our HTTP routes on the engine's own API server (``vllm.endpoint_plugins``), guarded by the engine's own key.

vLLM loads them only if ``VLLM_PLUGINS`` names ``sllm``. It requires its key only for the routes of OpenAI's API, so
this module checks the key itself.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from typing import Any

from prometheus_client import Gauge

from sllm_vllm.engine.answer_notes import AnswerNotes
from sllm_vllm.engine.in_flight import IdAmbiguous, find_in_flight, list_in_flight
from sllm_vllm.engine.resume import RESUME_KEY
from sllm_vllm.engine.self_test import why_unable
from sllm_vllm.metrics import EngineMetric

QUIET_S = 1.0
"""How long no request must be in flight before the self-test begins, so as not to delay the first requests."""
QUIET_S_MAX = 30.0
"""After this time the self-test begins even if requests are in flight."""
_LOOK_S = 0.1

logger = logging.getLogger("vllm.sllm.engine")  # a child of vLLM's logger, or nothing would be printed


class SllmEndpoints:
    """The routes. vLLM makes one object in each API server; it lives on the server's event loop."""

    name = "sllm"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._keys: tuple[str, ...] = ()
        self._reason: str | None = None
        self._trial: asyncio.Task[None] | None = None
        metric = EngineMetric.RESUME_SUPPORTED.value
        self._supported = Gauge(metric.name, metric.help)

    def attach_router(self, app: Any) -> None:
        """Add the routes to vLLM's FastAPI app."""
        for path, answer in (
            ("/sllm/state", self._state),
            ("/sllm/requests", self._requests),
            ("/sllm/requests/{id}/tokens", self._tokens),
        ):
            app.add_route(path, self._guarded(answer), methods=["GET"])
        app.add_middleware(AnswerNotes, engine=lambda: self._engine)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Store the engine and its keys, and start a task that runs the self-test once the engine is idle."""
        import vllm.envs as envs

        del state
        self._engine = engine_client
        self._keys = tuple(key for key in (args.api_key or [envs.VLLM_API_KEY]) if key)
        engine_client.sllm_resume_keys = self._keys or ("",)  # without a key, any client may sign
        self._trial = asyncio.get_running_loop().create_task(self._try())

    async def _try(self) -> None:
        await self._wait_quiet()
        start = time.monotonic()
        reason = await why_unable(self._engine)
        self._reason = reason
        self._supported.set(not reason)
        told = f"event=resume supported={str(not reason).lower()} seconds={time.monotonic() - start:.3f}"
        if reason:
            points = getattr(self._engine, "sllm_points", None)
            if points is not None:
                points.problems.append(reason)  # later requests to resume are refused with this reason
            logger.warning("%s reason=%s", told, json.dumps(reason))
        else:
            logger.info("%s", told)

    async def _wait_quiet(self) -> None:
        begun_s = quiet_since_s = time.monotonic()
        while (now_s := time.monotonic()) < begun_s + QUIET_S_MAX and now_s < quiet_since_s + QUIET_S:
            if self._engine.output_processor.request_states:
                quiet_since_s = now_s
            await asyncio.sleep(_LOOK_S)

    def _guarded(self, answer: Any) -> Any:
        from starlette.requests import Request
        from starlette.responses import Response

        async def guarded(request: Request) -> Response:
            if not self._is_known(request.headers.get("authorization", "")):
                return _respond({"error": "Unauthorized"}, 401)
            return _respond(*await answer(request))

        return guarded

    def _is_known(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        known = [hmac.compare_digest(key.encode(), one.encode()) for one in self._keys]
        return not known or (scheme.lower() == "bearer" and any(known))

    async def _state(self, request: Any) -> tuple[dict[str, Any], int]:
        del request
        config = self._engine.vllm_config
        return {
            "resume": None if self._reason is None else not self._reason,
            "reason": self._reason if self._reason is not None else "the trial has not ended",
            "resume_key": RESUME_KEY,
            "block_size": config.cache_config.block_size,
            "max_model_len": config.model_config.max_model_len,
            "model": config.model_config.model,
            "num_requests": len(self._engine.output_processor.request_states),
        }, 200

    async def _requests(self, request: Any) -> tuple[dict[str, Any], int]:
        del request
        return {"requests": list_in_flight(self._engine)}, 200

    async def _tokens(self, request: Any) -> tuple[dict[str, Any], int]:
        id_ = request.path_params["id"]
        try:
            found = find_in_flight(self._engine, id_)
        except IdAmbiguous as problem:
            return {"error": str(problem)}, 409
        if found is None:
            return {"error": f"there is no request {id_} in flight"}, 404
        return found, 200


def _respond(content: dict[str, Any], status: int) -> Any:
    from starlette.responses import Response

    # Starlette's own JSON response refuses infinities, which logprobs may be.
    return Response(json.dumps(content), status, media_type="application/json")
