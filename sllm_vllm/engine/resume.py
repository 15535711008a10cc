"""What a moved request carries: its output so far, as JSON under one key of ``vllm_xargs``. Pure.

The target gets the client's own body again, unchanged but for this key. So all that vLLM derives from a body (limits,
chat template, parsers, adapters) is derived anew, and nothing but tokens has to be carried.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

RESUME_KEY = "sllm_resume"
"""In ``vllm_xargs`` of a body, or ``extra_args`` of sampling parameters."""
RESUME_NBYTES_MAX = 32 << 20
"""Two million tokens, or some 20,000 with 20 top logprobs each."""
TOKENS_MAX_FACTOR = 2
"""All choices together own at most so many times the model's length: the replay holds up the front end."""
FINISH_REASONS = ("stop", "length", "repetition")
"""With which a choice may have ended before the others did."""
_SIGNED = re.compile(r"([0-9a-f]{64}):")
_NAMED = re.compile(r"(?:chatcmpl-(.+)|cmpl-(.+)-[0-9]+)")
_VERSION = 1
_FIELDS = frozenset({"version", "prompt_digest", "num_cached_tokens", "step", "choices"})
_CHOICE_FIELDS = frozenset({"token_ids", "logprobs", "finish_reason", "stop_reason"})
_OWNED = "tokens"

TokenLogprob = tuple[int, float, int | None, str | None]
"""Token, its logprob, its rank and its text."""


class ResumeRefused(ValueError):
    """What was asked can't be resumed exactly here; the message says why. The caller lets it run where it is."""


@dataclass(frozen=True, slots=True)
class OwnedChoice:
    """Output of one choice so far. ``logprobs`` has for each token its own entry first, then the top ones."""

    token_ids: tuple[int, ...]
    logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    finish_reason: str | None = None
    """Set for a choice that has ended while others had not."""
    stop_reason: int | str | None = None

    def first(self, num_tokens: int) -> OwnedChoice:
        """The same with no more than so many tokens."""
        if num_tokens >= len(self.token_ids):
            return self
        logprobs = self.logprobs[:num_tokens] if self.logprobs is not None else None
        return OwnedChoice(self.token_ids[:num_tokens], logprobs)


@dataclass(frozen=True, slots=True)
class Resume:
    """Output of all choices (``n``) so far, in order, and what belongs to the prompt."""

    prompt_digest: str
    choices: tuple[OwnedChoice, ...]
    num_cached_tokens: int | None = None
    """What the first engine found in its prefix cache: the client's usage names this. None if it has not looked yet."""
    step: int = 1
    """Tokens in one output of the replay, 0 for all: parsers of tool calls want the steps the source made."""

    @property
    def num_tokens(self) -> int:
        """Of all choices together."""
        return sum(len(choice.token_ids) for choice in self.choices)

    def first(self, num_tokens: Sequence[int]) -> Resume:
        """The same with no more than so many tokens of each choice."""
        choices = tuple(choice.first(num) for choice, num in zip(self.choices, num_tokens, strict=True))
        return replace(self, choices=choices)

    def to_json(self) -> str:
        """What goes into the body; floats keep every bit."""
        return json.dumps({"version": _VERSION, **asdict(self)}, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class ResumeLimits:
    """What an engine knows of the request that is to be resumed."""

    prompt_digest: str
    num_prompt_tokens: int
    num_choices: int
    tokens_max: int
    """Output tokens of a choice; when it has them all, it has ended."""
    model_len_max: int
    vocab_size: int
    wants_logprobs: bool


def digest_tokens(token_ids: Iterable[int]) -> str:
    """A short name of a prompt: the same tokens, the same name."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16).hexdigest()


def sign_resume(text: str, *, key: str, request: str) -> str:
    """What a body carries: ``Resume.to_json``, and proof that it comes from who knows the engine's key.

    Args:
        request: the X-Request-Id that the body is sent with; it is good for no other.
    """
    return f"{_signature(text, key, request)}:{text}"


def check_signature(value: object, *, keys: Iterable[str], request: str) -> str:
    """What was signed.

    Args:
        keys: of this engine.
        request: vLLM's id of the request.

    Raises:
        ResumeRefused: it is unsigned, or signed by another key or for another request.
    """
    if not isinstance(value, str) or len(value) > RESUME_NBYTES_MAX:
        raise ResumeRefused(f"{RESUME_KEY} must be a string of JSON of at most {RESUME_NBYTES_MAX} characters")
    found = _SIGNED.match(value)
    if found is None:
        raise ResumeRefused(f"{RESUME_KEY} is the router's: it has to be signed with the engine's key")
    text = value[found.end() :]
    named = _NAMED.fullmatch(request)
    names = {request, *(name for name in (named.groups() if named else ()) if name)}
    is_right = False
    for key in keys:
        for name in names:
            is_right |= hmac.compare_digest(found[1], _signature(text, key, name))
    if not is_right:
        raise ResumeRefused(f"{RESUME_KEY} is signed with another key than this engine's, or for another request")
    return text


def _signature(text: str, key: str, request: str) -> str:
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return hmac.new(key.encode(), f"{RESUME_KEY}\n{request}\n{digest}".encode(), hashlib.sha256).hexdigest()


def parse_resume(value: object) -> Resume:
    """Read ``Resume.to_json``, written by somebody who may have got it wrong.

    Raises:
        ResumeRefused: it is anything else.
    """
    if not isinstance(value, str) or len(value) > RESUME_NBYTES_MAX:
        raise ResumeRefused(f"{RESUME_KEY} must be a string of JSON of at most {RESUME_NBYTES_MAX} characters")
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ResumeRefused(f"{RESUME_KEY} is no JSON: {type(error).__name__}") from None
    _check(isinstance(found, dict) and found.get("version") == _VERSION, f"is no object of version {_VERSION}")
    _check(found.keys() <= _FIELDS, f"has unknown fields: {sorted(found.keys() - _FIELDS)}")
    choices, digest, cached = found.get("choices"), found.get("prompt_digest"), found.get("num_cached_tokens")
    _check(isinstance(choices, list) and bool(choices), "has no choices")
    _check(isinstance(digest, str), "has no prompt_digest")
    return Resume(
        prompt_digest=digest,
        choices=tuple(map(_parse_choice, choices)),
        num_cached_tokens=None if cached is None else _count(cached, "num_cached_tokens"),
        step=_count(found.get("step", 1), "step"),
    )


def check_resume(resume: Resume, limits: ResumeLimits) -> None:
    """Hold what was carried against the request it came with.

    Raises:
        ResumeRefused: it belongs to another request, or there is nothing left to generate.
    """
    if resume.prompt_digest != limits.prompt_digest:
        raise ResumeRefused("the prompt is not the one whose output was carried along")
    if len(resume.choices) != limits.num_choices:
        raise ResumeRefused(f"there are {len(resume.choices)} choices, and the request has n={limits.num_choices}")
    if all(choice.finish_reason is not None for choice in resume.choices):
        raise ResumeRefused("every choice has ended: there is nothing to resume")
    num_tokens, tokens_max = resume.num_tokens, TOKENS_MAX_FACTOR * limits.model_len_max
    if num_tokens > tokens_max:
        raise ResumeRefused(f"there are {num_tokens} tokens in all choices together, more than {tokens_max}")
    for choice in resume.choices:
        _check_choice(choice, limits)


def handed_over(token_ids: Iterable[int]) -> dict[str, list[int]]:
    """What a front end gives its engine core under ``RESUME_KEY``; no ``vllm_xargs`` of a body can have this shape."""
    return {_OWNED: list(token_ids)}


def owned_tokens(extra_args: object) -> list[int]:
    """What is in ``handed_over``; nothing where anything else is."""
    found = extra_args.get(RESUME_KEY) if isinstance(extra_args, dict) else None
    tokens = found.get(_OWNED) if isinstance(found, dict) else None
    if isinstance(tokens, list) and all(type(token) is int for token in tokens):
        return tokens
    return []


def _check_choice(choice: OwnedChoice, limits: ResumeLimits) -> None:
    num_tokens, has_ended = len(choice.token_ids), choice.finish_reason is not None
    if choice.token_ids and max(choice.token_ids) >= limits.vocab_size:
        raise ResumeRefused(f"token {max(choice.token_ids)} is outside the vocabulary of {limits.vocab_size}")
    if num_tokens >= limits.tokens_max + has_ended:
        raise ResumeRefused(f"there are {num_tokens} tokens, and max_tokens={limits.tokens_max}")
    if limits.num_prompt_tokens + num_tokens >= limits.model_len_max + has_ended:
        raise ResumeRefused(f"prompt and {num_tokens} tokens fill the model's length of {limits.model_len_max}")
    if limits.wants_logprobs and num_tokens and choice.logprobs is None:
        raise ResumeRefused("logprobs are asked for, and those of the first tokens were not carried along")


def _parse_choice(found: Any) -> OwnedChoice:
    _check(isinstance(found, dict) and found.keys() <= _CHOICE_FIELDS, "has a choice with unknown fields")
    tokens = found.get("token_ids")
    _check(isinstance(tokens, list), "has a choice without token_ids")
    _check(all(type(token) is int and 0 <= token < 1 << 31 for token in tokens), "has token_ids that are none")
    finish, stop = found.get("finish_reason"), found.get("stop_reason")
    _check(finish is None or (finish in FINISH_REASONS and bool(tokens)), "has an impossible finish_reason")
    _check(stop is None or type(stop) in {int, str}, "has an impossible stop_reason")
    return OwnedChoice(tuple(tokens), _parse_logprobs(found.get("logprobs"), tokens), finish, stop)


def _parse_logprobs(found: Any, tokens: list[int]) -> tuple[tuple[TokenLogprob, ...], ...] | None:
    if found is None:
        return None
    _check(isinstance(found, list) and len(found) == len(tokens), "has logprobs of another number of tokens")
    parsed = []
    for token, entries in zip(tokens, found, strict=True):
        _check(isinstance(entries, list) and bool(entries) and all(map(_is_logprob, entries)), "has broken logprobs")
        _check(entries[0][0] == token, "has logprobs that don't begin with the token's own")
        parsed.append(tuple((int(id_), float(logprob), rank, text) for id_, logprob, rank, text in entries))
    return tuple(parsed)


def _is_logprob(found: Any) -> bool:
    if not isinstance(found, list) or len(found) != 4:
        return False
    token, logprob, rank, text = found
    return (
        _is_small(token) and _is_value(logprob) and (rank is None or _is_small(rank)) and isinstance(text, str | None)
    )


def _is_value(found: Any) -> bool:
    return _is_small(found) or (type(found) is float and not math.isnan(found))


def _is_small(found: Any) -> bool:
    return type(found) is int and abs(found) < 1 << 31


def _count(found: Any, name: str) -> int:
    _check(type(found) is int and 0 <= found < 1 << 31, f"has an impossible {name}")
    return int(found)


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ResumeRefused(f"{RESUME_KEY} {problem}")
