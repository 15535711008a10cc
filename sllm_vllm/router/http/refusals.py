"""The core's refusals as errors of HTTP and OpenAI's API. Pure."""

from __future__ import annotations

from sllm_vllm.router.core.events import Refusal, RejectRequest
from sllm_vllm.router.gate import Rejected

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
    return Rejected(503, "server_error", "The router is stopping.", retry_after_s=5.0)
