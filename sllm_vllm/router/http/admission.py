"""Reads a request's body: all of it within limits, then in it the model's name, the prompt's length and its beginning.

The second part is pure. Only the top level of a JSON object is walked. In a small body the standard library's scanner
parses, and so checks, the values; in a large body, or one with many brackets, ``json_scan.py`` finds them without
building any objects. The body itself is never changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import mmap
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.engine_client.headers import Headers, value_of
from sllm_vllm.router.http.deadline import Ended, Receive
from sllm_vllm.router.http.errors import ApiError, overloaded
from sllm_vllm.router.http.form_scan import NotAForm, scan_form
from sllm_vllm.router.http.json_scan import JsonLimits, JsonMember, NotJson, NotUtf8, TooMuch, scan_members

_DISCARDED_BODIES_MAX = 4
"""Up to this many times the allowed size is read and dropped, so that the client gets the refusal, not a reset."""
_MAPPED_NBYTES = 1 << 16
"""Larger bodies get their own memory mapping, which returns to the system at once; the heap would be fragmented."""

Body = bytes | memoryview


class BodyReader:
    """Reads bodies, within limits on size and time, and counts what all hold together: ``nbytes``. On one loop."""

    def __init__(self, settings: IngressSettings) -> None:
        self._settings = settings
        self.nbytes = 0

    @contextlib.asynccontextmanager
    async def read(self, headers: Headers, receive: Receive) -> AsyncIterator[Body]:
        """Read a body, which counts as held until the block ends.

        Raises:
            ApiError: 413, it is too large; 408, it took too long; 503, all bodies together are too large.
            Ended: the client left before the body was complete.
        """
        declared = _declared(headers)
        held = _Held(declared or self._settings.body_bytes)
        limit_s = self._settings.body_timeout
        try:
            try:
                async with asyncio.timeout(limit_s):
                    await self._fill(held, declared, receive=receive)
            except TimeoutError:
                message = f"The body took longer than {limit_s:g} s."
                raise ApiError(408, message, kind="timeout_error").closing() from None
            yield held.body()
        finally:
            self.nbytes -= held.nbytes
            held.release()

    async def _fill(self, held: _Held, declared: int, *, receive: Receive) -> None:
        nbytes_max = self._settings.body_bytes
        nbytes = 0
        if declared > nbytes_max * _DISCARDED_BODIES_MAX:
            raise self._too_large()
        has_more = True
        while has_more:
            piece, has_more = await _next_piece(receive)
            nbytes += len(piece)
            if nbytes > nbytes_max * _DISCARDED_BODIES_MAX:
                raise self._too_large()
            if piece and max(declared, nbytes) <= nbytes_max:
                self._hold(piece, held)
        if nbytes > nbytes_max:
            raise self._too_large()

    def _hold(self, piece: bytes, held: _Held) -> None:
        if self.nbytes + len(piece) > self._settings.bodies_bytes:
            raise overloaded("the bodies of all requests have reached their limit").closing()
        self.nbytes += len(piece)
        held.add(piece)

    def _too_large(self) -> ApiError:
        nbytes_max = self._settings.body_bytes
        return ApiError(413, f"The body is larger than {nbytes_max} bytes.", code="body_too_large").closing()


class _Held:
    """What was read of one body: on the heap while small, then in a mapping of ``nbytes_max`` that fills as needed."""

    def __init__(self, nbytes_max: int) -> None:
        self.nbytes = 0
        self._nbytes_max = nbytes_max
        self._small: bytes = b""
        self._mapped: mmap.mmap | None = None
        self._view: memoryview | None = None

    def add(self, piece: bytes) -> None:
        """Append the next piece."""
        self.nbytes += len(piece)
        if self._mapped is None and self.nbytes <= _MAPPED_NBYTES:
            self._small = self._small + piece if self._small else piece
            return
        if self._mapped is None:
            self._mapped = mmap.mmap(-1, self._nbytes_max, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._mapped.madvise(mmap.MADV_NOHUGEPAGE)  # else a few bytes could hold a whole huge page
            self._mapped.write(self._small)
            self._small = b""
        self._mapped.write(piece)

    def body(self) -> Body:
        """Return the whole body."""
        if self._mapped is None:
            return self._small
        self._view = memoryview(self._mapped)[: self.nbytes]
        return self._view

    def release(self) -> None:
        """Return the memory to the system at once, or, if the body is still being sent or read, after that."""
        self._small = b""
        if self._mapped is None:
            return
        with contextlib.suppress(BufferError):
            if self._view is not None:
                self._view.release()
            self._mapped.close()
        self._mapped = self._view = None


async def _next_piece(receive: Receive) -> tuple[bytes, bool]:
    """Return the next piece, which may be empty, and whether more follows."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Ended("client_left", "the client left")
    return message.get("body", b""), message.get("more_body", False)


def _declared(headers: Headers) -> int:
    """Return Content-Length, or 0 if there is none. The HTTP parser has admitted digits only."""
    value = value_of(headers, b"content-length")
    return int(value) if value.isdigit() and len(value) < 20 else 0


PREFIX_CHARS = 512
"""How much of a prompt's beginning makes up its prefix key."""
NBYTES_A_TOKEN = 4
HASHED_AT_ONCE_NBYTES_MAX = 1 << 20
"""Larger bodies are hashed in a thread: one of 32 MiB takes some 40 ms."""
MODEL_CHARS_MAX = 1024
MEMBERS_MAX = 1000
PARTS_MAX = 100
DEPTH_MAX = 256
CONTAINERS_MAX = 100_000
SMALL_NBYTES = 1 << 15
"""A body up to this size is read on the event loop: that takes a few milliseconds at most."""
SMALL_CONTAINERS = 2000
"""Most arrays and objects of a body that is read by the standard library's scanner; they cost the most time."""

_PROMPTS = frozenset({"messages", "prompt", "input", "query", "text_1", "text"})
_SPACE = re.compile(r"[ \t\n\r]*")
_decoder = json.JSONDecoder()
_NAME_NBYTES_MAX = 128
"""No relevant member's name is longer, even with each character escaped."""
_MODEL_NBYTES_MAX = 12 * MODEL_CHARS_MAX


@dataclass(frozen=True, slots=True)
class Admission:
    """What was read from a body. ``model``: empty if it names none; ``prefix``: see ``RequestFacts``."""

    model: str
    prompt_tokens: int
    prefix: str

    def facts(self, request: str) -> RequestFacts:
        """Return the facts that the gate takes."""
        return RequestFacts(id=request, model=self.model, prompt_tokens=self.prompt_tokens, prefix=self.prefix)


@dataclass(frozen=True, slots=True)
class BodyBounds:
    """Limits of a JSON body: how deep its values may be nested, and how many arrays and objects it may have."""

    depth: int = DEPTH_MAX
    containers: int = CONTAINERS_MAX


def is_small(body: Body) -> bool:
    """Whether a body may be read on a shared event loop; larger ones belong in a thread."""
    return len(body) <= SMALL_NBYTES


def read_body(body: Body, content_type: bytes, *, takes_form: bool, bounds: BodyBounds | None = None) -> Admission:
    """Read a request's body.

    Raises:
        ApiError: 400, the body is not valid; 415, its content type is not supported.
    """
    kind = content_type.partition(b";")[0].strip().lower()
    if kind == b"multipart/form-data" and takes_form:
        return _read_form(body, content_type)
    if kind != b"application/json":
        media_type = kind.decode("latin-1")[:MODEL_CHARS_MAX]
        found = f"it has `Content-Type: {media_type}`" if kind else "it has no Content-Type"
        raise ApiError(415, f"The request needs JSON and the header `Content-Type: application/json`; {found}.")
    return read_json(body, bounds)


async def digest_of(target: str, body: Body) -> str:
    """Return a digest of a request's path and body."""
    if len(body) <= HASHED_AT_ONCE_NBYTES_MAX:
        return _digest(target, body)
    return await asyncio.to_thread(_digest, target, body)


def _digest(target: str, body: Body) -> str:
    return hashlib.blake2b(body, digest_size=16, key=hashlib.blake2b(target.encode()).digest()).hexdigest()


def read_json(body: Body, bounds: BodyBounds | None = None) -> Admission:
    """Read a JSON object.

    Raises:
        ApiError: 400; its message says what is wrong.
    """
    bounds = bounds or BodyBounds()
    if is_small(body):
        whole = bytes(body)
        if whole.count(b"[") + whole.count(b"{") <= min(SMALL_CONTAINERS, bounds.depth):
            return _read_small(whole)
    return _read_large(body, bounds)


def _read_small(body: bytes) -> Admission:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8: byte {error.start} is invalid.") from None
    try:
        model, prefix = _walk(text)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"The body is not JSON: {error.msg} at character {error.pos}.") from None
    except ValueError:  # int() refuses more than 4300 digits
        raise ApiError(400, "The body holds a number that is too large.") from None
    return Admission(_model(model), len(body) // NBYTES_A_TOKEN, prefix)


def _read_large(body: Body, bounds: BodyBounds) -> Admission:
    model: object = None
    prefix = ""
    try:
        for member in scan_members(body, JsonLimits(bounds.depth, bounds.containers, MEMBERS_MAX)):
            name = _scalar(member.name) if len(member.name) <= _NAME_NBYTES_MAX else ""
            if name == "model":
                if model is not None:
                    raise _twice("body")
                model = _model_value(body, member)
            elif name in _PROMPTS:
                prefix = prefix or _prefix(_beginning(body, member))
    except NotUtf8 as error:
        raise ApiError(400, f"The body is not UTF-8: {error}.") from None
    except TooMuch as error:
        raise ApiError(400, f"The body {error}.") from None
    except NotJson as error:
        raise ApiError(400, f"The body is not a JSON object: {error}.") from None
    return Admission(_model(model), len(body) // NBYTES_A_TOKEN, prefix)


def _scalar(written: bytes) -> object:
    try:
        return json.loads(written)
    except ValueError:
        raise NotJson("a name or `model` is wrong") from None


def _model_value(body: Body, member: JsonMember) -> object:
    """Return the value of ``model``; 0, which is never valid, if it is too long for a name, or no text or null."""
    written = bytes(body[member.start : min(member.end, member.start + _MODEL_NBYTES_MAX)])
    is_whole = member.end - member.start == len(written)
    return _scalar(written) if is_whole and written[:1] in b'"n' else 0


def _beginning(body: Body, member: JsonMember) -> str:
    nbytes = 4 * PREFIX_CHARS  # UTF-8 takes at most 4 bytes per character
    written = bytes(body[member.start : min(member.end, member.start + nbytes)])
    return written.decode("utf-8", "ignore")[:PREFIX_CHARS]


def _walk(text: str) -> tuple[object, str]:
    """Return the model, or None if there is none, and the prefix key."""
    model: object = None
    prefix = ""
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        _decoder.decode(text)
        raise ApiError(400, "The body must be a JSON object.")
    at = _skip(text, at + 1)
    is_first = True
    for _ in range(MEMBERS_MAX):
        if text[at : at + 1] == "}" and is_first:
            return _ended(text, at, (model, prefix))
        is_first = False
        name, start = _name(text, at)
        value, at = _decoder.raw_decode(text, start)
        if name == "model":
            if model is not None:  # engines and proxies differ in which of the two they use
                raise _twice("body")
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
    """Return a member's name, and where its value begins."""
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
    if text[at : at + 1] > " ":  # nearly always there is no space
        return at
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


def _prefix(beginning: str) -> str:
    return hashlib.blake2b(beginning.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _twice(where: str) -> ApiError:
    return ApiError(400, f"`model` appears twice in the {where}.", param="model")


def _model(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not 0 < len(value) <= MODEL_CHARS_MAX:
        raise ApiError(400, f"`model` must be a string of 1 to {MODEL_CHARS_MAX} characters.", param="model")
    return value


def _read_form(body: Body, content_type: bytes) -> Admission:
    """Read the ``model`` field of a form; its files are not read."""
    try:
        models = [one for one in scan_form(body, content_type, PARTS_MAX) if one.name == b"model"]
    except NotAForm as error:
        raise ApiError(400, str(error)) from None
    if len(models) > 1:
        raise _twice("form")
    if models and models[0].is_file:
        raise ApiError(400, "`model` must be a form field without a file name.", param="model")
    try:
        model = models[0].value.decode() if models else None
    except UnicodeDecodeError:
        raise ApiError(400, "`model` is not UTF-8.", param="model") from None
    # The number of tokens can't be derived from an audio file.
    return Admission(_model(model), 0, "")
