"""What a moved request carries: there and back without a loss, and nothing wrong gets through."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.engine.resume import (
    RESUME_KEY,
    RESUME_NBYTES_MAX,
    OwnedChoice,
    Resume,
    ResumeLimits,
    ResumeRefused,
    check_resume,
    check_signature,
    digest_tokens,
    handed_over,
    owned_tokens,
    parse_resume,
    sign_resume,
)
from tests.support.cases import every_case

PROMPT = [1, 2, 3]
LIMITS = ResumeLimits(
    prompt_digest=digest_tokens(PROMPT),
    num_prompt_tokens=3,
    num_choices=1,
    tokens_max=10,
    model_len_max=20,
    vocab_size=100,
    wants_logprobs=False,
)
SOUND: dict[str, Any] = {"version": 1, "prompt_digest": "d", "choices": [{"token_ids": [5, 6]}]}
WRONG: list[dict[str, Any]] = [
    {"version": 2},
    {"more": 1},
    {"prompt_digest": 3},
    {"choices": []},
    {"choices": {}},
    {"choices": [7]},
    {"choices": [{}]},
    {"choices": [{"token_ids": "56"}]},
    {"choices": [{"token_ids": [5.0]}]},
    {"choices": [{"token_ids": [True]}]},
    {"choices": [{"token_ids": [-1]}]},
    {"choices": [{"token_ids": [2**40]}]},
    {"choices": [{"token_ids": [5], "more": 1}]},
    {"choices": [{"token_ids": [5], "finish_reason": "abort"}]},
    {"choices": [{"token_ids": [], "finish_reason": "stop"}]},
    {"choices": [{"token_ids": [5], "stop_reason": [1]}]},
    {"choices": [{"token_ids": [5], "logprobs": []}]},
    {"choices": [{"token_ids": [5], "logprobs": [[]]}]},
    {"choices": [{"token_ids": [5], "logprobs": [[[6, 0.0, 1, "a"]]]}]},
    {"choices": [{"token_ids": [5], "logprobs": [[[5, "0", 1, "a"]]]}]},
    {"choices": [{"token_ids": [5], "logprobs": [[[5, 0.0, 1]]]}]},
    {"choices": [{"token_ids": [5], "logprobs": [[[5, 10**400, 1, "a"]]]}]},
    {"choices": [{"token_ids": [5], "logprobs": [[[5, math.nan, 1, "a"]]]}]},
    {"choices": [{"token_ids": [5], "logprobs": [[[5, 0.0, 10**400, "a"]]]}]},
    {"choices": [{"token_ids": [5], "logprobs": [[[5, 0.0, 1, "a"], [10**400, 0.0, 1, "a"]]]}]},
    {"num_cached_tokens": -1},
    {"step": 0.5},
]


def owning(*tokens: int, **more: Any) -> Resume:
    return Resume(digest_tokens(PROMPT), (OwnedChoice(tokens, **more),))


tokens = st.integers(0, 2**31 - 1)
entries = st.tuples(tokens, st.floats(allow_nan=False), st.none() | st.integers(1, 9), st.none() | st.text(max_size=3))


@st.composite
def choices(draw: st.DrawFn) -> OwnedChoice:
    ids = tuple(draw(st.lists(tokens, max_size=5)))
    logprobs = None
    if draw(st.booleans()):
        logprobs = tuple(((id_, *draw(entries)[1:]), *draw(st.lists(entries, max_size=2))) for id_ in ids)
    finish = draw(st.sampled_from([None, "stop", "length"])) if ids else None
    return OwnedChoice(ids, logprobs, finish, draw(st.none() | st.integers() | st.text()))


@given(
    st.builds(
        Resume,
        prompt_digest=st.text(),
        choices=st.lists(choices(), min_size=1, max_size=3).map(tuple),
        num_cached_tokens=st.none() | tokens,
        step=st.integers(0, 9),
    )
)
def test_it_comes_out_as_it_went_in(resume: Resume) -> None:
    assert parse_resume(resume.to_json()) == resume


@every_case(
    "value",
    [
        None,
        7,
        [1],
        "",
        "nonsense",
        "[" * 100_000,
        "[]",
        "{}",
        *(json.dumps({**SOUND, **wrong}) for wrong in WRONG),
    ],
)
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(ResumeRefused, match=RESUME_KEY):
        parse_resume(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda deep: (
            st.lists(deep)
            | st.dictionaries(
                st.sampled_from(["version", "choices", "token_ids", "logprobs", "prompt_digest", "step"]), deep
            )
        ),
    )
)
def test_no_json_does_anything_but_parse_or_be_refused(found: Any) -> None:
    with pytest.raises(ResumeRefused):
        parse_resume(json.dumps({"version": 1, **found} if isinstance(found, dict) else found))


def test_infinities_of_logprobs_survive() -> None:
    resume = owning(5, logprobs=(((5, -math.inf, None, None),),))
    assert parse_resume(resume.to_json()) == resume


def test_what_fits_its_request_is_taken() -> None:
    check_resume(owning(), LIMITS)
    check_resume(owning(*range(9)), LIMITS)
    ended = Resume(LIMITS.prompt_digest, (OwnedChoice((5,)), OwnedChoice(tuple(range(10)), None, "length")))
    check_resume(ended, replace(LIMITS, num_choices=2))


def two(num_open: int, num_ended: int) -> Resume:
    return Resume(LIMITS.prompt_digest, (OwnedChoice((5,) * num_open), OwnedChoice((5,) * num_ended, None, "stop")))


@every_case(
    "resume, limits, reason",
    [
        (Resume("another", (OwnedChoice((5,)),)), LIMITS, "prompt"),
        (owning(5), replace(LIMITS, num_choices=2), "n=2"),
        (owning(100), LIMITS, "vocabulary"),
        (owning(*range(10)), LIMITS, "max_tokens"),
        (owning(*range(17)), replace(LIMITS, tokens_max=99), "length"),
        (owning(5), replace(LIMITS, wants_logprobs=True), "logprobs"),
        (owning(5, finish_reason="stop"), LIMITS, "nothing to resume"),
        (two(1, 11), replace(LIMITS, num_choices=2), "max_tokens"),
        (two(1, 18), replace(LIMITS, num_choices=2, tokens_max=99), "length"),
        (two(21, 20), replace(LIMITS, num_choices=2), "together, more than 40"),
    ],
)
def test_what_does_not_fit_its_request_is_refused(resume: Resume, limits: ResumeLimits, reason: str) -> None:
    with pytest.raises(ResumeRefused, match=reason):
        check_resume(resume, limits)


def test_a_shorter_one_has_the_first_tokens_and_has_not_ended() -> None:
    logprobs = tuple(((id_, -1.0, 1, "x"),) for id_ in (5, 6, 7))
    resume = owning(5, 6, 7, logprobs=logprobs, finish_reason="stop", stop_reason=7)
    assert resume.first([2]).choices == (OwnedChoice((5, 6), logprobs[:2]),)
    assert resume.first([3]) == resume


def test_prompts_have_names_of_their_own() -> None:
    assert digest_tokens([1, 2]) == digest_tokens((1, 2))
    assert len({digest_tokens(ids) for ids in ([], [0], [0, 0], [1, 2], [2, 1], [258])}) == 6


@every_case(
    "extra_args",
    [
        None,
        {},
        {RESUME_KEY: "5"},
        {RESUME_KEY: [5]},
        {RESUME_KEY: {}},
        {RESUME_KEY: handed_over([True])},
        {RESUME_KEY: {"tokens": "5"}},
        "text",
    ],
)
def test_a_core_takes_tokens_from_a_front_end_alone(extra_args: object) -> None:
    """A body's `vllm_xargs` may hold a list of numbers."""
    assert owned_tokens(extra_args) == []
    assert owned_tokens({RESUME_KEY: handed_over((5, 6))}) == [5, 6]


SIGNED = sign_resume("{}", key="key", request="name")


@every_case("request_id", ["name", "chatcmpl-name", "cmpl-name-0", "cmpl-name-3"])
def test_what_the_router_signed_is_taken_under_every_id_that_vllm_makes_of_its_name(request_id: str) -> None:
    assert check_signature(SIGNED, keys=["another", "key"], request=request_id) == "{}"


@every_case(
    "value, keys, request_id",
    [
        ("{}", ["key"], "name"),
        (SIGNED, ["another"], "name"),
        (SIGNED, [], "name"),
        (SIGNED, ["key"], "name2"),
        (SIGNED, ["key"], "cmpl-other-0"),
        (SIGNED + " ", ["key"], "name"),
        (SIGNED.replace(":", ":\n"), ["key"], "name"),
        (f"{'0' * 64}:{{}}", ["key"], "name"),
        ({"tokens": [5]}, ["key"], "name"),
        ("x" * (RESUME_NBYTES_MAX + 1), ["key"], "name"),
    ],
)
def test_what_anyone_else_wrote_is_refused(value: object, keys: list[str], request_id: str) -> None:
    with pytest.raises(ResumeRefused, match=RESUME_KEY):
        check_signature(value, keys=keys, request=request_id)
