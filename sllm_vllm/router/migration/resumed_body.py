"""The body that makes an engine continue an answer that another one began. Pure.

It is the client's own body with what the answer has so far, signed with the target's key: engines accept no other.
"""

from __future__ import annotations

import json
from typing import Any

from sllm_vllm.engine.resume import RESUME_KEY, sign_resume
from sllm_vllm.router.migration.moved_body import MovedBody

_XARGS, _TRANSFER = "vllm_xargs", "kv_transfer_params"


def resumed_body(body: MovedBody, resume: dict[str, Any], *, prompt: list[int] | None, key: str, request: str) -> bytes:
    """The body for the target.

    Args:
        body: the client's.
        resume: what ``Resume.to_json`` gives, as an object.
        prompt: the prompt's tokens, if known. With them a chat is not rendered again, which could give another prompt:
            its template may contain the time.
        key: the target's.
        request: the X-Request-Id that is sent with the body.
    """
    is_chat = "messages" in body
    if not is_chat:
        resume = {**resume, "step": 0}  # all tokens in one step: only chats have parsers that need single steps
    given = body.get(_XARGS)
    signed = sign_resume(json.dumps(resume, separators=(",", ":")), key=key, request=request)
    members: dict[str, object] = {_XARGS: {**(given if isinstance(given, dict) else {}), RESUME_KEY: signed}}
    if prompt is not None and is_chat and not body.get(_TRANSFER) and not body.get("echo"):
        members[_TRANSFER] = {"prompt_token_ids": prompt}
    return body.with_members(members)
