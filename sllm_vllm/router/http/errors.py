"""Errors in the form that clients expect: status, body, and the event that ends a stream. Pure.

Paths below /v1/messages get Anthropic's form, all others OpenAI's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from sllm_vllm.router.core.events import Refusal, RejectRequest
from sllm_vllm.router.gate import Rejected

INVALID = "invalid_request_error"
SERVER = "server_error"
_STATUS = {
    Refusal.UNKNOWN_MODEL: (404, "invalid_request_error", "model_not_found"),
    Refusal.DELETED: (404, "invalid_request_error", "model_not_found"),
    Refusal.QUEUE_FULL: (429, "rate_limit_error", "queue_full"),
    Refusal.TOO_LATE: (503, "server_error", "no_capacity"),
    Refusal.NO_START: (503, "server_error", "engine_start_failed"),
    Refusal.ENGINE_FAILED: (502, "server_error", "engine_failed"),
    Refusal.KILLED_ENGINE: (502, "server_error", "request_killed_engine"),
}


def rejected(action: RejectRequest) -> Rejected:
    """The error for a request that the core refuses."""
    status, kind, code = _STATUS[action.why]
    message = f"{action.why.value[0].upper()}{action.why.value[1:]}: {action.reason}"
    return Rejected(status, kind, message, retry_after_s=action.retry_after_s, code=code)


def stopping() -> Rejected:
    """The error for a request while the router stops."""
    return Rejected(503, SERVER, "The router is stopping.", retry_after_s=5.0, code="stopping")


NAMES_SHOWN_MAX = 20
NAME_CHARS_MAX = 200
_NAMED_EVENTS = ("/v1/messages", "/v1/responses")
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""By status; all others are ``invalid_request_error``, which has the same name in both APIs."""


class ApiError(Exception):
    """An error to answer with. ``headers``: sent with it; ``closes``: the connection closes after it."""

    def __init__(
        self, status: int, message: str, *, kind: str = INVALID, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers: list[tuple[bytes, bytes]] = []
        self.closes = False

    @property
    def body(self) -> bytes:
        """The body of the answer, in OpenAI's form."""
        return json.dumps({"error": self.record}).encode()

    @property
    def record(self) -> dict[str, object]:
        """The value of ``error`` in OpenAI's form."""
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}

    def body_for(self, path: str) -> bytes:
        """The body of the answer, in the form that clients of a path expect."""
        return self._anthropic_body if is_anthropic(path) else self.body

    @property
    def _anthropic_body(self) -> bytes:
        error = {"type": _ANTHROPIC_KINDS.get(self.status, INVALID), "message": self.message}
        return json.dumps({"type": "error", "error": error}).encode()

    def event(self, path: str) -> bytes:
        """The last event of a stream that fails, in the form that clients of a path expect."""
        if is_anthropic(path):
            return b"event: error\ndata: " + self._anthropic_body + b"\n\n"
        if path.startswith(_NAMED_EVENTS):
            return b"event: error\ndata: " + json.dumps({"type": "error", "error": self.record}).encode() + b"\n\n"
        return b"data: " + self.body + b"\n\n"

    def closing(self) -> ApiError:
        """Close the client's connection after the error, because the body was not read to the end. Returns itself."""
        self.closes = True
        return self


def is_anthropic(path: str) -> bool:
    """Whether a path, with or without a query, belongs to Anthropic's API."""
    path = path.partition("?")[0]
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def not_served(model: str, path: str) -> ApiError:
    """404 for a route that the model's engines lack because they serve another task."""
    message = f"The model `{model[:NAME_CHARS_MAX]}` does not serve {path[:NAME_CHARS_MAX]}: it has another task."
    return ApiError(404, message, code="route_not_served")


def rejection(rejected: Rejected) -> ApiError:
    """The error for a refusal of the gate. 429 and 503 always say when to retry."""
    error = ApiError(rejected.status, rejected.message, kind=rejected.kind, code=rejected.code)
    if rejected.status in {429, 503} or rejected.retry_after_s is not None:
        seconds = max(1, math.ceil(rejected.retry_after_s or 1))
        error.headers.append((b"retry-after", str(seconds).encode()))
    return error


def unknown_model(model: str, known: Sequence[str]) -> ApiError:
    """404 that lists the served models."""
    names = ", ".join(known[:NAMES_SHOWN_MAX]) or "none"
    more = f" and {len(known) - NAMES_SHOWN_MAX} more" if len(known) > NAMES_SHOWN_MAX else ""
    message = f"The model `{model[:NAME_CHARS_MAX]}` does not exist. Served models: {names}{more}."
    return ApiError(404, message, param="model", code="model_not_found")


def unauthorized() -> ApiError:
    """401, the same for a missing key and a wrong one."""
    error = ApiError(401, "The API key is missing or wrong.", kind="authentication_error", code="invalid_api_key")
    error.headers.append((b"www-authenticate", b"Bearer"))
    return error


def no_such_path(path: str) -> ApiError:
    """404 for a path that is not served."""
    return ApiError(404, f"Unknown path: {path[:NAME_CHARS_MAX]}.", code="not_found")


def wrong_method(method: str, allowed: Sequence[str]) -> ApiError:
    """405 that names the allowed methods."""
    error = ApiError(405, f"{method[:NAME_CHARS_MAX]} is not allowed here; use {', '.join(allowed)}.")
    error.headers.append((b"allow", ", ".join(allowed).encode()))
    return error


def engine_failed(problem: str) -> ApiError:
    """502: the engine's answer broke off or it could not be reached, after a retry if one was possible."""
    return ApiError(502, f"The engine failed: {problem}.", kind=SERVER, code="engine_failed")


def timed_out(problem: str) -> ApiError:
    """504 for any timeout."""
    return ApiError(504, f"The request timed out: {problem}.", kind="timeout_error", code="timeout")


def overloaded(problem: str) -> ApiError:
    """503 for a request that is refused before the gate is asked."""
    return rejection(Rejected(503, "overloaded_error", f"The router is overloaded: {problem}.", code="overloaded"))
