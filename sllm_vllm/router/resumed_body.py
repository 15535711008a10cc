"""The body that has an engine go on with an answer that another one began. Pure.

It is the client's own, with what the answer has got so far, signed with the target's key: engines take no other.
"""

from __future__ import annotations

import json
from typing import Any

from sllm_vllm.engine.resume import RESUME_KEY, sign_resume
from sllm_vllm.router.moved_body import MovedBody

_XARGS, _TRANSFER = "vllm_xargs", "kv_transfer_params"


def resumed_body(body: MovedBody, resume: dict[str, Any], *, prompt: list[int] | None, key: str, request: str) -> bytes:
    """The body for the target.

    Args:
        body: the client's.
        resume: of ``Resume.to_json``, as an object.
        prompt: its tokens, where they are known: so a chat is not rendered again, whose template may name the time.
        key: the target's.
        request: the X-Request-Id that it is sent with.
    """
    is_chat = "messages" in body
    if not is_chat:
        resume = {**resume, "step": 0}  # no parser looks at single steps
    given = body.get(_XARGS)
    signed = sign_resume(json.dumps(resume, separators=(",", ":")), key=key, request=request)
    members: dict[str, object] = {_XARGS: {**(given if isinstance(given, dict) else {}), RESUME_KEY: signed}}
    if prompt is not None and is_chat and not body.get(_TRANSFER) and not body.get("echo"):
        members[_TRANSFER] = {"prompt_token_ids": prompt}
    return body.with_members(members)
