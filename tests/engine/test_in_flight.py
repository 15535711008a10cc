"""Requests in flight, as a router gets to know them."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sllm_vllm.engine.in_flight import IdAmbiguous, find_in_flight, list_in_flight
from sllm_vllm.engine.resume import OwnedChoice, digest_tokens, parse_resume

PROMPT = [1, 2, 3]
NUMBERS = itertools.count()


class Params(msgspec.Struct):
    """Stands in for SamplingParams."""

    seed: int | None = None
    prompt_logprobs: int | None = None
    output_kind: Any = SimpleNamespace(name="DELTA")
    extra_args: dict[str, Any] | None = None
    stops: set[int] = msgspec.field(default_factory=lambda: {7})


def state(id_: str, *tokens: int, index: int = 0, parent: Any = None, **more: Any) -> Any:
    """Stands in for vLLM's RequestState."""
    request = SimpleNamespace(
        prompt_embeds=None, prompt_token_ids=PROMPT, mm_features=None, resumable=False, sampling_params=Params(seed=5)
    )
    detokenizer = SimpleNamespace(output_token_ids=list(tokens), num_output_tokens=lambda: len(tokens))
    made = SimpleNamespace(
        request_id=f"{id_}-{next(NUMBERS)}",
        external_req_id=id_,
        parent_req=parent,
        request_index=index,
        prompt_token_ids=PROMPT,
        prompt_len=len(PROMPT),
        num_cached_tokens=2,
        is_prefilling=False,
        detokenizer=detokenizer,
        logprobs_processor=SimpleNamespace(logprobs=None),
        sllm_request=request,
    )
    vars(made).update(more)
    return made


def engine(*states: Any) -> Any:
    named = {one.request_id: one for one in states}
    config = SimpleNamespace(model_config=SimpleNamespace(), speculative_config=None, kv_transfer_config=None)
    return SimpleNamespace(vllm_config=config, output_processor=SimpleNamespace(request_states=named))


def test_a_request_is_found_by_either_of_its_names() -> None:
    serving = engine(state("cmpl-a-0", 8), state("chatcmpl-b", 9))
    for name, id_ in (("a", "cmpl-a-0"), ("cmpl-a-0", "cmpl-a-0"), ("b", "chatcmpl-b"), ("chatcmpl-b", "chatcmpl-b")):
        found = find_in_flight(serving, name)
        assert found is not None
        assert found["id"] == id_
    assert find_in_flight(serving, "c") is None


def test_requests_that_came_with_the_same_id_are_never_mixed() -> None:
    """Clients choose their X-Request-Id: a router must get the tokens of one request or none."""
    parent = SimpleNamespace(request_id="p", n=2)
    first, second = (state("cmpl-a-0", token, index=index, parent=parent) for index, token in enumerate((8, 9)))
    parent.sllm_states = {0: first, 1: second}
    serving = engine(first, state("cmpl-a-0", 5), second, state("chatcmpl-b", 6), state("cmpl-b-0", 7))
    told = [(one["id"], one["num_output_tokens"]) for one in list_in_flight(serving)]
    assert told[:2] == [("cmpl-a-0", [1, 1]), ("cmpl-a-0", [1])]
    for name in ("a", "cmpl-a-0", "b"):
        with pytest.raises(IdAmbiguous, match="2 requests"):
            find_in_flight(serving, name)
    assert (find_in_flight(serving, "chatcmpl-b") or {})["num_output_tokens"] == [1]


def test_what_it_tells_is_what_a_target_reads() -> None:
    position = {8: SimpleNamespace(logprob=-0.5, rank=1, decoded_token="x")}
    serving = engine(state("cmpl-a-0", 8, logprobs_processor=SimpleNamespace(logprobs=[position])))
    found = json.loads(json.dumps(find_in_flight(serving, "a")))
    resume = parse_resume(json.dumps(found["resume"]))
    assert resume.choices == (OwnedChoice((8,), (((8, -0.5, 1, "x"),),)),)
    assert (resume.prompt_digest, resume.num_cached_tokens) == (digest_tokens(PROMPT), 2)
    assert (found["sampling_params"]["seed"], found["sampling_params"]["stops"]) == (5, [7])
    assert found["prompt_token_ids"] == PROMPT


def test_cached_tokens_are_not_told_before_the_engine_has_looked() -> None:
    new = state("cmpl-a-0", is_prefilling=True)
    moved = state("cmpl-b-0", 8, is_prefilling=True, remote_prefill_cached_tokens=2)
    serving = engine(new, moved)
    told = [(find_in_flight(serving, name) or {})["resume"]["num_cached_tokens"] for name in "ab"]
    assert told == [None, 2]


def test_choices_that_have_ended_are_told_with_the_others() -> None:
    parent = SimpleNamespace(request_id="p", n=2, sllm_ended={0: ("stop", 7)})
    ended, going = state("cmpl-a-0", 8, 7, index=0, parent=parent), state("cmpl-a-0", 9, index=1, parent=parent)
    parent.sllm_states = {0: ended, 1: going}
    found = find_in_flight(engine(going), "a")
    assert found is not None
    assert found["num_output_tokens"] == [2, 1]
    assert [choice["finish_reason"] for choice in found["resume"]["choices"]] == ["stop", None]
    assert found["resume"]["choices"][0]["stop_reason"] == 7


def test_what_cant_be_moved_says_why_and_has_no_resume() -> None:
    media = state("cmpl-a-0", 8)
    media.sllm_request.mm_features = ["a picture"]
    unseen = state("cmpl-b-0", sllm_request=None)
    failed = SimpleNamespace(request_id="p", n=1, sllm_ended={0: ("error", None)})
    failed.sllm_states = {0: state("cmpl-c-0", 8, parent=failed)}
    few = SimpleNamespace(request_id="q", n=2, sllm_states={})
    serving = engine(media, unseen, failed.sllm_states[0], state("cmpl-d-0", 8, parent=few))
    told = {one["id"]: one["immovable"] for one in list_in_flight(serving)}
    assert told == {
        "cmpl-a-0": "its prompt has media",
        "cmpl-b-0": "it came before this was watched, or it generates nothing",
        "cmpl-c-0": "one of its choices failed",
        "cmpl-d-0": "not all of its choices are known yet",
    }
    for name in "abcd":
        assert "resume" not in (find_in_flight(serving, name) or {})
