"""Asks a real engine for an answer, whole or resumed after some of its tokens, and folds either into what to compare.

A body goes out as a client would send it. Streams are folded token by token: what a client has after each of them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import urllib.error
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

from sllm_vllm.engine.resume import RESUME_KEY, OwnedChoice, Resume, digest_tokens, parse_resume, sign_resume
from tests.support.waiting import wait_until

REQUEST_MAX_S = 300.0
TAKE_OVER_TRIES_MAX = 50
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(slots=True)
class Folded:
    """One choice of an answer. ``states`` has what was there after so many tokens; equal if both are equal."""

    token_ids: list[int] = field(default_factory=list)
    parts: defaultdict[str, str] = field(default_factory=lambda: defaultdict(str))
    logprobs: list[Any] = field(default_factory=list)
    ending: tuple[Any, Any] | None = None
    states: dict[int, dict[str, str]] = field(default_factory=dict, compare=False)

    def add(self, choice: dict[str, Any]) -> None:
        """Take in a chunk, or a whole choice."""
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        for name in ("content", "reasoning"):
            self.parts[name] += said.get(name) or ""
        for index, call in enumerate(said.get("tool_calls") or ()):
            function = call.get("function") or {}
            for name in ("name", "arguments"):
                self.parts[f"tool {call.get('index', index)} {name}"] += function.get(name) or ""
        self.token_ids += choice.get("token_ids") or ()
        self.states[len(self.token_ids)] = dict(self.parts)
        self._add_logprobs(choice.get("logprobs"))
        if choice.get("finish_reason") is not None:
            assert self.ending is None
            self.ending = (choice["finish_reason"], choice.get("stop_reason"))

    def _add_logprobs(self, found: dict[str, Any] | None) -> None:
        if found is None:
            return
        if "content" in found:
            self.logprobs += found["content"] or ()
        else:
            self.logprobs += zip(*(found[name] for name in sorted(found)), strict=True)


@dataclass(slots=True)
class Answer:
    """All choices of an answer, its usage, and the prompt it was made from."""

    choices: dict[int, Folded] = field(default_factory=lambda: defaultdict(Folded))
    usage: Any = None
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: Any = None

    def add(self, found: dict[str, Any]) -> None:
        """Take in a chunk, or a whole answer."""
        assert "error" not in found, found
        self.usage = found.get("usage") or self.usage
        for choice in found["choices"]:
            self.prompt_token_ids = choice.get("prompt_token_ids") or self.prompt_token_ids
            self.prompt_logprobs = choice.get("prompt_logprobs") or self.prompt_logprobs
            self.choices[choice["index"]].add(choice)
        self.prompt_token_ids = found.get("prompt_token_ids") or self.prompt_token_ids

    @property
    def token_ids(self) -> list[list[int]]:
        """Of each choice."""
        return [self.choices[index].token_ids for index in sorted(self.choices)]

    def resume(self, num_tokens: int) -> Resume:
        """What carries the first tokens of each choice; a shorter one goes with all but its last."""
        owned = [OwnedChoice(tuple(ids[: min(num_tokens, len(ids) - 1)])) for ids in self.token_ids]
        cached = ((self.usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Resume(digest_tokens(self.prompt_token_ids), tuple(owned), cached)


@dataclass(frozen=True, slots=True)
class Client:
    """Asks one engine."""

    url: str
    model: str
    headers: dict[str, str] = field(default_factory=dict)
    key: str | None = None
    """Signs what a request owns; None: the one it sends."""

    def ask(self, path: str, body: dict[str, Any], resume: Resume | None = None) -> Answer:
        """The whole answer.

        Raises:
            urllib.error.HTTPError: the engine refuses.
        """
        answer = Answer()
        for found in self.chunks(path, body, resume):
            answer.add(found)
        return answer

    def chunks(self, path: str, body: dict[str, Any], resume: Resume | None = None) -> Generator[dict[str, Any]]:
        """What comes, as it comes: chunks of a stream, or the one answer."""
        whole = {"model": self.model, "return_token_ids": True, **body}
        if whole.get("stream"):
            whole["stream_options"] = {"include_usage": True}
        if resume is not None:
            whole["vllm_xargs"] = {**whole.get("vllm_xargs", {}), RESUME_KEY: resume.to_json()}
        headers = {"Content-Type": "application/json", "X-Request-Id": uuid.uuid4().hex, **self.headers}
        if isinstance(owned := whole.get("vllm_xargs", {}).get(RESUME_KEY), str):
            key = self.headers.get("Authorization", "").removeprefix("Bearer ") if self.key is None else self.key
            signed = sign_resume(owned, key=key, request=headers["X-Request-Id"])
            whole["vllm_xargs"] = {**whole["vllm_xargs"], RESUME_KEY: signed}
        request = urllib.request.Request(self.url + path, json.dumps(whole).encode(), headers)
        with urllib.request.urlopen(request, timeout=REQUEST_MAX_S) as answer:
            if not whole.get("stream"):
                yield json.loads(answer.read())
                return
            for line in answer:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[6:])

    def get(self, path: str) -> Any:
        """A GET of one of our own routes."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=self.headers)) as answer:
            return json.loads(answer.read())

    def status(self, path: str) -> int:
        """Of a GET."""
        try:
            self.get(path)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def refusal(self, path: str, body: dict[str, Any], resume: Any) -> tuple[int, str]:
        """Status and message of a request that the engine refuses; ``resume`` is what stands in the body."""
        try:
            self.ask(path, {**body, "vllm_xargs": {RESUME_KEY: resume}})
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]["message"]
        raise AssertionError("the engine did not refuse")


def compare(whole: Answer, resumed: Answer) -> None:
    """Assert that two answers are the same, and, if both were streamed, that they were after each token of both."""
    assert resumed.token_ids == whole.token_ids
    assert resumed.choices == whole.choices
    assert resumed.usage == whole.usage
    assert resumed.prompt_logprobs == whole.prompt_logprobs
    for index, choice in whole.choices.items():
        seen = resumed.choices[index].states
        assert {num: seen[num] for num in choice.states.keys() & seen.keys()} == {
            num: state for num, state in choice.states.items() if num in seen
        }


def take_over(
    client: Client, path: str, body: dict[str, Any], *, num_tokens: int, resume: Resume | None = None
) -> tuple[dict[str, Any], Answer]:
    """Stream until every choice has so many tokens or has ended, ask our route what the request has, and hang up.

    Returns what the route said, and what the client had been sent, when the engine has dropped the request: the last
    bits of another request's logprobs depend on what is computed with it. The engine may be done before it is asked,
    as in life: then it is tried again.
    """
    for _ in range(TAKE_OVER_TRIES_MAX):
        sent, id_, streamed = Answer(), uuid.uuid4().hex, {**body, "stream": True}
        route = f"/sllm/requests/{id_}/tokens"
        named = replace(client, headers={**client.headers, "X-Request-Id": id_})
        told = None
        with contextlib.closing(named.chunks(path, streamed, resume)) as chunks:
            for found in chunks:
                sent.add(found)
                done = [len(one.token_ids) >= num_tokens or one.ending is not None for one in sent.choices.values()]
                if len(done) == body.get("n", 1) and all(done):
                    with contextlib.suppress(urllib.error.HTTPError):
                        told = client.get(route)
                    break
        wait_until(functools.partial(_is_gone, client, route), "the engine to drop the request")
        if told is not None:
            return told, sent
    raise AssertionError("it ended first each time")


def _is_gone(client: Client, route: str) -> bool:
    return client.status(route) == 404


def carried(told: dict[str, Any]) -> Resume:
    """What the route gave for a target, through JSON as a router hands it on."""
    return parse_resume(json.dumps(told["resume"]))
