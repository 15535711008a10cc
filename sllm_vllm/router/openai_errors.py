"""Errors as OpenAI's clients know them: status, body, and the event that ends a stream. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from sllm_vllm.router.gate import Rejected

NAMES_SHOWN_MAX = 20
NAME_CHARS_MAX = 200
INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """An answer that is an error. ``headers`` go with it; ``closes``: so does the connection."""

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
        """The whole answer."""
        return json.dumps({"error": self.record}).encode()

    @property
    def record(self) -> dict[str, object]:
        """What stands under ``error``."""
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}

    def event(self, *, is_named: bool) -> bytes:
        """The last event of a stream that breaks. ``is_named``: as /v1/messages and /v1/responses do it."""
        if is_named:
            return b"event: error\ndata: " + json.dumps({"type": "error", "error": self.record}).encode() + b"\n\n"
        return b"data: " + self.body + b"\n\n"

    def closing(self) -> ApiError:
        """Itself, and the client's connection ends after it: its body was not read to the end."""
        self.closes = True
        return self


def rejection(rejected: Rejected) -> ApiError:
    """How the gate's refusal is told. 429 and 503 always say when to come again."""
    error = ApiError(rejected.status, rejected.message, kind=rejected.kind, code=rejected.code)
    if rejected.status in {429, 503} or rejected.retry_after_s is not None:
        seconds = max(1, math.ceil(rejected.retry_after_s or 1))
        error.headers.append((b"retry-after", str(seconds).encode()))
    return error


def unknown_model(model: str, known: Sequence[str]) -> ApiError:
    """404 that names the models there are."""
    shown = ", ".join(known[:NAMES_SHOWN_MAX]) or "none"
    more = f" and {len(known) - NAMES_SHOWN_MAX} more" if len(known) > NAMES_SHOWN_MAX else ""
    message = f"The model `{model[:NAME_CHARS_MAX]}` does not exist. Served are: {shown}{more}."
    return ApiError(404, message, param="model", code="model_not_found")


def unauthorized() -> ApiError:
    """401, whatever is wrong with the key."""
    error = ApiError(401, "The API key is missing or wrong.", kind="authentication_error", code="invalid_api_key")
    error.headers.append((b"www-authenticate", b"Bearer"))
    return error


def no_such_path(path: str) -> ApiError:
    """404 for what is not served here."""
    return ApiError(404, f"There is nothing at {path[:NAME_CHARS_MAX]}.", code="not_found")


def wrong_method(method: str, allowed: Sequence[str]) -> ApiError:
    """405 with what would be right."""
    error = ApiError(405, f"{method[:NAME_CHARS_MAX]} is not possible here, only {', '.join(allowed)}.")
    error.headers.append((b"allow", ", ".join(allowed).encode()))
    return error


def engine_failed(problem: str) -> ApiError:
    """502: the engine broke off or could not be reached, after a retry if one was possible."""
    return ApiError(502, f"The engine failed: {problem}.", kind=SERVER, code="engine_failed")


def timed_out(problem: str) -> ApiError:
    """504 for any time that is over."""
    return ApiError(504, f"It took too long: {problem}.", kind="timeout_error", code="timeout")


def overloaded(problem: str) -> ApiError:
    """503 before the gate was even asked."""
    return rejection(Rejected(503, "overloaded_error", f"The router is full: {problem}.", code="overloaded"))
