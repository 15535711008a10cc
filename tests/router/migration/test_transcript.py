"""A stream that begins anew at a target goes on where the client is, however either side cut it into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.router.migration import transcript
from sllm_vllm.router.migration.transcript import FOLD_NBYTES, Continuation, NotAligned, Transcript, split_events
from tests.support.cases import every_case

DONE = b"data: [DONE]\n\n"
TEXTS = st.lists(st.sampled_from(["a", "", "Ü", '"x":1', '"created":7', "\n\n", "東京", "{", "\\"]), max_size=30)
CREATED, LATER = 1764000000, 1764000009


def event(created: int, *choices: dict[str, Any], **more: Any) -> bytes:
    whole = {"id": "cmpl-1", "created": created, "model": "m", "choices": list(choices), **more}
    return b"data: " + json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def merged(tokens: Sequence[str], sizes: Sequence[int]) -> Iterator[tuple[int, list[str]]]:
    """Steps of an engine that has one, or several, tokens in each."""
    at, turn = 0, 0
    while at < len(tokens):
        size = sizes[turn % len(sizes)]
        yield at, list(tokens[at : at + size])
        at, turn = at + size, turn + 1


def completion(tokens: Sequence[str], sizes: Sequence[int], *, created: int, index: int = 0) -> list[bytes]:
    """What vLLM streams of /v1/completions, with logprobs and token ids."""
    events = []
    for at, step in merged(tokens, sizes):
        logprobs = {
            "tokens": step,
            "token_logprobs": [-0.5] * len(step),
            "text_offset": list(range(at, at + len(step))),
        }
        is_last = at + len(step) >= len(tokens)
        choice: dict[str, Any] = {"index": index, "text": "".join(step), "logprobs": logprobs}
        choice |= {"finish_reason": "length" if is_last else None, "token_ids": list(range(at, at + len(step)))}
        events.append(event(created, choice))
    return events


def chat(tokens: Sequence[str], sizes: Sequence[int], *, created: int, call: str) -> list[bytes]:
    """What it streams of a chat: a role, reasoning, content, and a call whose id is new each time."""
    half = len(tokens) // 2
    events = [event(created, {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})]
    for at, step in merged(tokens, sizes):
        delta: dict[str, Any] = {}
        if thought := "".join(token for place, token in enumerate(step, at) if place < half):
            delta["reasoning"] = thought
        if said := "".join(token for place, token in enumerate(step, at) if place >= half):
            delta["content"] = said
        events.append(event(created, {"index": 0, "delta": delta, "finish_reason": None}))
    head = {"index": 0, "id": call, "type": "function", "function": {"name": "f", "arguments": ""}}
    events.append(event(created, {"index": 0, "delta": {"tool_calls": [head]}, "finish_reason": None}))
    for _, step in merged(tokens, sizes):
        part = {"index": 0, "function": {"arguments": "".join(step)}}
        events.append(event(created, {"index": 0, "delta": {"tool_calls": [part]}, "finish_reason": None}))
    events.append(event(created, {"index": 0, "delta": {}, "finish_reason": "tool_calls"}))
    return [*events, event(created, usage={"total_tokens": 7})]


def folded(stream: bytes) -> dict[str, Any]:
    """All that a client makes of a stream."""
    found: dict[str, Any] = {"created": set(), "calls": set(), "finish": [], "roles": []}
    for one in stream.removesuffix(DONE).split(b"\n\n"):
        if not one:
            continue
        parsed = json.loads(one.removeprefix(b"data: "))
        found["created"].add(parsed["created"])
        found["usage"] = parsed.get("usage")
        for choice in parsed["choices"]:
            fold(found, choice, f"{choice['index']}.")
    return found


def fold(found: dict[str, Any], choice: dict[str, Any], name: str) -> None:
    delta = choice.get("delta", choice)
    for key in ("text", "content", "reasoning"):
        found[name + key] = found.get(name + key, "") + (delta.get(key) or "")
    for key, values in {**(choice.get("logprobs") or {}), "token_ids": choice.get("token_ids") or []}.items():
        found[name + key] = [*found.get(name + key, []), *values]
    for call in delta.get("tool_calls", ()):
        found["calls"] |= {call["id"]} if "id" in call else set()
        for key in ("name", "arguments"):
            found[name + key] = found.get(name + key, "") + call["function"].get(key, "")
    if "role" in delta:
        found["roles"].append(delta["role"])
    if choice.get("finish_reason"):
        found["finish"].append(choice["finish_reason"])


def moved(source: Sequence[bytes], target: bytes, *, num_sent: int, piece: int) -> bytes:
    """What a client gets that has the first events of the source, and then the target's, cut into pieces."""
    transcript = Transcript()
    for one in source[:num_sent]:
        transcript.note(one)
    continuation = Continuation(transcript)
    pieces = (target[at : at + piece] for at in range(0, len(target), piece))
    return b"".join([*source[:num_sent], *(continuation.feed(one) for one in pieces)])


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(tokens=TEXTS, sizes=SIZES, others=SIZES, share=st.floats(0, 1), piece=st.integers(1, 400))
def test_a_completion_goes_on_where_the_client_is(
    tokens: list[str], sizes: list[int], others: list[int], share: float, piece: int
) -> None:
    source = [*completion(tokens, sizes, created=CREATED), DONE]
    target = b"".join([*completion(tokens, others, created=LATER), DONE])
    num_sent = int(share * (len(source) - 1))
    stream = moved(source, target, num_sent=num_sent, piece=piece)
    whole = b"".join(source) if num_sent else target
    assert folded(stream) == folded(whole)
    assert stream.endswith(DONE)


@given(tokens=TEXTS, sizes=SIZES, others=SIZES, share=st.floats(0, 1), piece=st.integers(1, 400))
def test_a_chat_with_reasoning_and_a_call_goes_on_where_the_client_is(
    tokens: list[str], sizes: list[int], others: list[int], share: float, piece: int
) -> None:
    source = [*chat(tokens, sizes, created=CREATED, call="call-1"), DONE]
    target = b"".join([*chat(tokens, others, created=LATER, call="call-2"), DONE])
    num_sent = int(share * (len(source) - 2))  # a usage is the last thing it is sent
    found, whole = folded(moved(source, target, num_sent=num_sent, piece=piece)), folded(b"".join(source))
    assert len(found.pop("calls")) == len(whole.pop("calls")) == 1
    assert found.pop("created") == ({CREATED} if num_sent else {LATER})
    whole.pop("created")
    assert found == whole


@given(tokens=TEXTS, sizes=SIZES, is_ascii=st.booleans())
def test_events_count_the_same_together_as_one_by_one(tokens: list[str], sizes: list[int], is_ascii: bool) -> None:
    """Together those that are alike are not parsed."""
    plain = [event(1, {"index": 0, "text": token, "logprobs": None, "finish_reason": None}) for token in tokens * 3]
    for events in (plain, completion(tokens, sizes, created=1), chat(tokens, sizes, created=1, call="c")):
        if is_ascii:
            events = [json_escaped(one) for one in events]
        together, singly = Transcript(), Transcript()
        together.note(b"".join(events))
        for one in events:
            singly.note(one)
            singly.told()
        assert together.told() == singly.told()


def json_escaped(one: bytes) -> bytes:
    return b"data: " + json.dumps(json.loads(one.removeprefix(b"data: "))).encode() + b"\n\n"


def test_events_that_are_alike_are_not_parsed_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 streams whose clients do not read cost 28 s of processor time when they were."""
    num_parsed = 0
    parse = transcript._parsed

    def counted(one: bytes) -> dict[str, Any]:
        nonlocal num_parsed
        num_parsed += 1
        return parse(one)

    monkeypatch.setattr(transcript, "_parsed", counted)
    told = Transcript()
    texts = ["word ", 'a "quoted" one', "new\nline", "東京"] * 500
    told.note(b"".join(event(1, {"index": 0, "delta": {"content": text}, "finish_reason": None}) for text in texts))
    assert told.told() == {0: {("delta", "content"): sum(map(len, texts))}}
    assert num_parsed <= 5


def test_choices_go_on_each_from_its_own_place() -> None:
    parts = [completion("abcdef", [1], created=CREATED, index=index) for index in (0, 1)]
    target = b"".join(one for pair in zip(*parts, strict=True) for one in pair)
    sent = [*parts[0][:4], *parts[1][:1]]
    found = folded(moved(sent, target, num_sent=len(sent), piece=1000))
    assert (found["0.text"], found["1.text"]) == ("abcdef", "abcdef")


def test_what_was_sent_in_a_long_stream_is_counted_and_forgotten() -> None:
    transcript = Transcript()
    events = completion(["word "] * 2000, [1], created=CREATED)
    for one in events[:1999]:
        transcript.note(one)
        assert transcript._nbytes <= FOLD_NBYTES
    assert Continuation(transcript).feed(b"".join(completion(["word "] * 2000, [7], created=LATER))) == events[1999]


def test_events_pass_as_they_are_once_the_client_is_reached() -> None:
    """But for the time, which is the first engine's."""
    transcript = Transcript()
    source = completion("abc", [1], created=CREATED)
    transcript.note(source[0])
    odd = b'data: {"created":1764000009, "choices": [{"index": 0, "text": "b"} ], "odd":1.50}\n\n'
    continuation = Continuation(transcript)
    assert continuation.feed(completion("abc", [1], created=LATER)[0]) == b""
    assert continuation.feed(odd) == odd.replace(b"1764000009", b"1764000000")


@every_case(
    "events, problem",
    [
        (b'data: {"error": {"message": "no blocks left"}}\n\n', "no blocks left"),
        (b'data: {"error": "odd"}\n\n', "odd"),
        (DONE, "ended before"),
    ],
)
def test_a_target_that_never_gets_there_is_told(events: bytes, problem: str) -> None:
    transcript = Transcript()
    transcript.note(completion("abc", [1], created=CREATED)[0])
    with pytest.raises(NotAligned, match=problem):
        Continuation(transcript).feed(events)


def test_an_error_of_a_target_that_has_gone_on_passes() -> None:
    transcript = Transcript()
    continuation = Continuation(transcript)
    first = completion("abc", [1], created=CREATED)[0]
    error = b'data: {"error": {"message": "it died"}}\n\n'
    assert continuation.feed(first) == first
    assert continuation.feed(error) == error


def test_whole_events_are_split_from_the_rest() -> None:
    assert split_events(b"data: 1\n\ndata: 2\n\nda") == (b"data: 1\n\ndata: 2\n\n", b"da")
    assert split_events(b"data: 1\n") == (b"", b"data: 1\n")
