"""What is read of a request's body: the model, how long the prompt is, and how it begins. Pure.

Of a JSON object only its top level is walked; values are skipped by the standard library's scanner. The body itself is
never changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from dataclasses import dataclass

from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.openai_errors import ApiError

PREFIX_CHARS = 512
"""What of a prompt makes its prefix key."""
NBYTES_A_TOKEN = 4
HASHED_AT_ONCE_NBYTES_MAX = 1 << 20
"""Larger bodies are hashed in a thread: one of 32 MiB takes some 40 ms."""
MODEL_CHARS_MAX = 1024
MEMBERS_MAX = 1000
PARTS_MAX = 100

_PROMPTS = frozenset({"messages", "prompt", "input", "query", "text_1", "text"})
_SPACE = re.compile(r"[ \t\n\r]*")
_decoder = json.JSONDecoder()
_BOUNDARY = re.compile(rb'boundary=(?:"([^"\r\n]{1,70})"|([^\s;",]{1,70}))', re.IGNORECASE)
_MODEL_PART = re.compile(
    rb'content-disposition:[ \t]*form-data[ \t]*;[ \t]*name="?model"?[ \t]*(?:\r\n|$)', re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Admission:
    """What a body says. ``prefix``: see ``RequestFacts``."""

    model: str
    prompt_tokens: int
    prefix: str

    def facts(self, request: str) -> RequestFacts:
        """As the gate wants it."""
        return RequestFacts(id=request, model=self.model, prompt_tokens=self.prompt_tokens, prefix=self.prefix)


def read_body(body: bytes, content_type: bytes, *, takes_form: bool) -> Admission:
    """Read a request's body.

    Raises:
        ApiError: 400, it is not what it should be; 415, it is of a kind that is not read here.
    """
    kind = content_type.partition(b";")[0].strip().lower()
    if kind == b"multipart/form-data" and takes_form:
        return _read_form(body, content_type)
    if kind in {b"multipart/form-data", b"application/x-www-form-urlencoded"}:
        raise ApiError(415, "The body has to be JSON here.")
    return read_json(body)


async def digest_of(target: str, body: bytes) -> str:
    """A short name of what is asked: the same path and body, the same name."""
    if len(body) <= HASHED_AT_ONCE_NBYTES_MAX:
        return _digest(target, body)
    return await asyncio.to_thread(_digest, target, body)


def _digest(target: str, body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=16, key=hashlib.blake2b(target.encode()).digest()).hexdigest()


def read_json(body: bytes) -> Admission:
    """Read a JSON object.

    Raises:
        ApiError: 400 that says what is wrong with it.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8: byte {error.start} is wrong.") from None
    try:
        model, prefix = _walk(text)
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"The body is not JSON: {error.msg} at character {error.pos}.") from None
    except ValueError:  # int() refuses more than 4300 digits
        raise ApiError(400, "The body holds a number that is too large.") from None
    return Admission(_model(model), len(body) // NBYTES_A_TOKEN, prefix)


def _walk(text: str) -> tuple[object, str]:
    """The model, None if there is none, and the prefix key."""
    model: object = None
    prefix = ""
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        _decoder.decode(text)
        raise ApiError(400, "The body has to be a JSON object.")
    at = _skip(text, at + 1)
    is_first = True
    for _ in range(MEMBERS_MAX):
        if text[at : at + 1] == "}" and is_first:
            return _ended(text, at, (model, prefix))
        is_first = False
        name, start = _name(text, at)
        value, at = _decoder.raw_decode(text, start)
        if name == "model":
            if model is not None:  # engines and proxies differ in which of two counts
                raise ApiError(400, "`model` stands in the body twice.", param="model")
            model = value
        elif name in _PROMPTS:
            prefix = prefix or _prefix(text[start : min(at, start + PREFIX_CHARS)])
        at = _skip(text, at)
        if text[at : at + 1] == "}":
            return _ended(text, at, (model, prefix))
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _skip(text, at + 1)
    raise ApiError(400, f"The body has more than {MEMBERS_MAX} members.")


def _name(text: str, at: int) -> tuple[str, int]:
    """A member's name, and where its value begins."""
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("Expecting a property name in double quotes", text, at)
    name, at = _decoder.raw_decode(text, at)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
    return name, _skip(text, at + 1)


def _ended(text: str, at: int, result: tuple[object, str]) -> tuple[object, str]:
    at = _skip(text, at + 1)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)
    return result


def _skip(text: str, at: int) -> int:
    if text[at : at + 1] > " ":  # as nearly always: no space
        return at
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


def _prefix(beginning: str) -> str:
    return hashlib.blake2b(beginning.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _model(value: object) -> str:
    if value is None:
        raise ApiError(400, "`model` is missing.", param="model")
    if not isinstance(value, str) or not 0 < len(value) <= MODEL_CHARS_MAX:
        raise ApiError(400, f"`model` has to be a text of 1 to {MODEL_CHARS_MAX} characters.", param="model")
    return value


def _read_form(body: bytes, content_type: bytes) -> Admission:
    """One plain field of a form; its files are not looked at."""
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise ApiError(400, "The form has no boundary.")
    parts = (b"\r\n" + body).split(b"\r\n--" + (boundary[1] or boundary[2]), PARTS_MAX + 1)
    if len(parts) > PARTS_MAX + 1:
        raise ApiError(400, f"The form has more than {PARTS_MAX} parts.")
    split = (part.partition(b"\r\n\r\n") for part in parts[1:])
    models = [value for head, _, value in split if _MODEL_PART.search(head)]
    if len(models) > 1:
        raise ApiError(400, "`model` stands in the form twice.", param="model")
    model = models[0].decode("utf-8", "replace") if models else None
    # An audio file says nothing of tokens.
    return Admission(_model(model), 0, "")
