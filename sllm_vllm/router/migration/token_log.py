"""The tokens of one streamed answer, read from the notes that its engine writes beside it. Pure.

``engine/answer_notes.py`` describes the notes. They are removed from what the client gets. With them the answer can
continue at another engine when its own is gone; they always cover at least what the client has.
"""

from __future__ import annotations

import json
import re
from array import array
from dataclasses import dataclass, field
from typing import Any

from sllm_vllm.engine.answer_notes import NOTE

FOLD_NBYTES = 1 << 13
"""Up to this size, notes are kept as they came; then they are parsed into four bytes per token."""
LOG_NBYTES_MAX = 4 << 20
"""For one answer: a million tokens, or about 4,000 with 20 top logprobs each. A longer one can't be continued."""
_LINE = re.compile(rb"(?m)^: sllm (.*)\n\n?")


@dataclass(slots=True)
class _Choice:
    tokens: array[int] = field(default_factory=lambda: array("i"))
    logprobs: list[str] | None = None
    """One per token, as JSON: as objects they would take six times as much memory."""
    ending: tuple[Any, Any] = (None, None)

    def as_json(self) -> dict[str, Any]:
        finish_reason, stop_reason = self.ending
        return {
            "token_ids": list(self.tokens),
            "logprobs": None if self.logprobs is None else [json.loads(one) for one in self.logprobs],
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }


class TokenLog:
    """The tokens of one engine's answer, from its beginning."""

    def __init__(self) -> None:
        self.has_died = False
        """The engine has reported that its core has died."""
        self._pieces: list[bytes] = []
        self._num_raw = 0
        self._nbytes = 0
        self._choices: dict[int, _Choice] = {}
        self._digest = ""
        self._num_cached: int | None = None
        self._is_over = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all choices together."""
        self._fold()
        return sum(len(choice.tokens) for choice in self._choices.values())

    def strip(self, events: bytes) -> bytes:
        """Whole events without their notes, which are added to the log."""
        if NOTE not in events:
            return events
        return _LINE.sub(self._take, events)

    def resume(self) -> dict[str, Any] | None:
        """What a target needs to continue, in the form of ``Resume.to_json``; None if the answer can't be continued."""
        self._fold()
        num_tokens = sum(len(choice.tokens) for choice in self._choices.values())
        if self._is_over or not self._digest or not num_tokens:
            return None
        choices = [self._choices[index].as_json() for index in sorted(self._choices)]
        return {
            "version": 1,
            "prompt_digest": self._digest,
            "num_cached_tokens": self._num_cached,
            "step": 1,
            "choices": choices,
        }

    def goes_on_from(self, owned: dict[str, Any]) -> bool:
        """Whether the logged answer began with the tokens in ``owned``, so that its engine has continued from them."""
        self._fold()
        found = [self._choices.get(index) for index in range(len(owned["choices"]))]
        return self._digest == owned["prompt_digest"] and all(
            one is not None and one.tokens[: len(choice["token_ids"])].tolist() == choice["token_ids"]
            for one, choice in zip(found, owned["choices"], strict=True)
        )

    def _take(self, line: re.Match[bytes]) -> bytes:
        self._pieces.append(line[1])
        self._num_raw += len(line[1])
        self._nbytes += len(line[1])
        self.has_died = self.has_died or line[1] == b'[{"died":true}]'
        if self._nbytes > LOG_NBYTES_MAX:
            self._is_over = True
            self._choices.clear()
        if self._num_raw > FOLD_NBYTES:
            self._fold()
        return b""

    def _fold(self) -> None:
        pieces, self._pieces = self._pieces, []
        self._num_raw = 0
        if self._is_over:
            return
        for piece in pieces:
            try:
                for entry in json.loads(piece):
                    self._add(entry)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):  # an engine of another version
                self._is_over = True

    def _add(self, entry: dict[str, Any]) -> None:
        if "d" in entry:
            self._digest, self._num_cached = entry["d"], entry["c"]
            self._choices = {index: _Choice() for index in range(entry["n"])}
        elif "i" in entry:
            choice = self._choices[entry["i"]]
            choice.tokens.extend(entry["t"])
            if "l" in entry:
                choice.logprobs = choice.logprobs if choice.logprobs is not None else []
                choice.logprobs.extend(json.dumps(one, separators=(",", ":"), ensure_ascii=False) for one in entry["l"])
            if "f" in entry:
                choice.ending = tuple(entry["f"])
        elif "end" in entry:
            self._is_over = True
