"""What a moved request carries: its output so far, as JSON under one key of ``vllm_xargs``. Pure.

The target gets the client's own body again, with only this key added. So vLLM derives everything else (limits, chat
template, parsers, adapters) from the body again, and only the output has to be carried.
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
"""Key in a body's ``vllm_xargs``, and in the ``extra_args`` of sampling parameters."""
RESUME_NBYTES_MAX = 32 << 20
"""Largest resume: room for two million tokens, or about 20,000 tokens with 20 top logprobs each."""
TOKENS_MAX_FACTOR = 2
"""All choices together own at most this many times the model's length, because the replay blocks the front end."""
FINISH_REASONS = ("stop", "length", "repetition")
"""Finish reasons of a choice that has ended before the request's other choices."""
_SIGNED = re.compile(r"([0-9a-f]{64}):")
_NAMED = re.compile(r"(?:chatcmpl-(.+)|cmpl-(.+)-[0-9]+)")
_VERSION = 1
_FIELDS = frozenset({"version", "prompt_digest", "num_cached_tokens", "step", "choices"})
_CHOICE_FIELDS = frozenset({"token_ids", "logprobs", "finish_reason", "stop_reason"})
_OWNED = "tokens"

TokenLogprob = tuple[int, float, int | None, str | None]
"""A token with its logprob, rank and text."""


class ResumeRefused(ValueError):
    """The request can't be resumed exactly on this engine; the message says why. The caller leaves it where it runs."""


@dataclass(frozen=True, slots=True)
class OwnedChoice:
    """Output of one choice so far. ``logprobs`` has, for each token, its own entry first, then the top ones."""

    token_ids: tuple[int, ...]
    logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    finish_reason: str | None = None
    """Set if the choice has ended while others have not."""
    stop_reason: int | str | None = None

    def first(self, num_tokens: int) -> OwnedChoice:
        """The choice cut to its first ``num_tokens`` tokens."""
        if num_tokens >= len(self.token_ids):
            return self
        logprobs = self.logprobs[:num_tokens] if self.logprobs is not None else None
        return OwnedChoice(self.token_ids[:num_tokens], logprobs)


@dataclass(frozen=True, slots=True)
class Resume:
    """Output of all choices (``n``) so far, in order, and facts about the prompt."""

    prompt_digest: str
    choices: tuple[OwnedChoice, ...]
    num_cached_tokens: int | None = None
    """Prompt tokens that the first engine found in its prefix cache, for the usage that the client gets. None if that
    engine has not looked yet."""
    step: int = 1
    """Tokens per output of the replay; 0 for all in one. Parsers of tool calls need the steps that the source made."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices together."""
        return sum(len(choice.token_ids) for choice in self.choices)

    def first(self, num_tokens: Sequence[int]) -> Resume:
        """The resume with each choice cut to its first tokens, ``num_tokens`` for each."""
        choices = tuple(choice.first(num) for choice, num in zip(self.choices, num_tokens, strict=True))
        return replace(self, choices=choices)

    def to_json(self) -> str:
        """The JSON that goes into the body, to be signed; floats keep all their bits."""
        return json.dumps({"version": _VERSION, **asdict(self)}, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class ResumeLimits:
    """What an engine knows about a request to be resumed, for checking its ``Resume``."""

    prompt_digest: str
    num_prompt_tokens: int
    num_choices: int
    tokens_max: int
    """Most output tokens of a choice; a choice that has this many has ended."""
    model_len_max: int
    vocab_size: int
    wants_logprobs: bool


def digest_tokens(token_ids: Iterable[int]) -> str:
    """A short digest that identifies a prompt's tokens."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16).hexdigest()


def sign_resume(text: str, *, key: str, request: str) -> str:
    """Sign the text of ``Resume.to_json`` with an engine's key, to prove that the sender knows the key.

    Args:
        request: the X-Request-Id that the body is sent with. The signature is valid for this id only.
    """
    return f"{_signature(text, key, request)}:{text}"


def check_signature(value: object, *, keys: Iterable[str], request: str) -> str:
    """Check the signature of ``sign_resume`` and return the text that was signed.

    Args:
        keys: this engine's keys.
        request: vLLM's id of the request.

    Raises:
        ResumeRefused: the value is not signed, or signed with another key or for another request.
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
    """Parse the text of ``Resume.to_json``, which is validated because the sender may be wrong.

    Raises:
        ResumeRefused: the value is not a valid resume.
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
    """Check a resume against the request that carries it.

    Raises:
        ResumeRefused: it does not match the request, or there is nothing left to generate.
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
    """What a front end passes to its engine core under ``RESUME_KEY``. No body's ``vllm_xargs`` can have this shape."""
    return {_OWNED: list(token_ids)}


def owned_tokens(extra_args: object) -> list[int]:
    """The tokens that a front end passed on with ``handed_over``; empty if there is anything else, or nothing."""
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
