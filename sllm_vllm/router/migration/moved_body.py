"""A request's body as a move needs it: a few members are read, and others are added after the last one. Pure."""

from __future__ import annotations

import json
from typing import Any

from sllm_vllm.engine.resume import RESUME_KEY, sign_resume
from sllm_vllm.router.http.admission import MEMBERS_MAX, Body
from sllm_vllm.router.http.json_scan import JsonLimits, scan_members

VALUE_NBYTES_MAX = 1 << 16
"""Largest size of a member that is read."""
_READ = frozenset({"cache_salt", "echo", "kv_transfer_params", "vllm_xargs"})
_NAME_NBYTES_MAX = 1024
_ADMITTED = JsonLimits(depth=1 << 30, containers=1 << 30, members=MEMBERS_MAX)
"""Hardly a limit: the body was admitted within tighter bounds."""


class NotMovable(Exception):
    """A member that a move has to read is too large; the message names it."""


class MovedBody:
    """The JSON object in a body that an engine has accepted. The body is not copied."""

    def __init__(self, body: Body) -> None:
        """Raises: NotMovable. ValueError: the body is not a JSON object."""
        self._body = body
        self._end = len(body)
        self._values: dict[str, object] = {}
        self._names: set[str] = set()
        for member in scan_members(body, _ADMITTED):
            self._end = member.end
            name = json.loads(member.name) if len(member.name) <= _NAME_NBYTES_MAX else ""
            self._names.add(name)
            if name in _READ:
                self._values[name] = self._value(name, member.start, member.end)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(self, name: str) -> object:
        """The value of a member that a move reads. If a name occurs twice the last one counts, as for engines."""
        return self._values.get(name)

    def with_members(self, members: dict[str, object]) -> bytes:
        """The same object with these members added; they override members of the same names."""
        added = json.dumps(members, separators=(",", ":")).encode()
        return b"".join((memoryview(self._body)[: self._end], b",", memoryview(added)[1:]))

    def _value(self, name: str, start: int, end: int) -> object:
        if end - start > VALUE_NBYTES_MAX:
            raise NotMovable(f"its `{name}` is larger than {VALUE_NBYTES_MAX} bytes")
        return json.loads(bytes(self._body[start:end]))


_XARGS, _TRANSFER = "vllm_xargs", "kv_transfer_params"


def resumed_body(body: MovedBody, resume: dict[str, Any], *, prompt: list[int] | None, key: str, request: str) -> bytes:
    """The body that makes the target continue an answer that another engine began.

    It is the client's own body with what the answer has so far, signed with the target's key: engines accept no other.

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
