"""Admission: what is read of a body, and that nothing in one can do more than be refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.router.http.admission import (
    MEMBERS_MAX,
    MODEL_CHARS_MAX,
    PARTS_MAX,
    SMALL_NBYTES,
    Admission,
    BodyBounds,
    read_body,
    read_json,
)
from sllm_vllm.router.http.errors import ApiError
from tests.support.cases import every_case

JSON = b"application/json"
FORM = b"multipart/form-data; boundary=xyz"


def refusal(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_json(body)
    return caught.value


def outcome(body: bytes) -> str | int:
    try:
        read_json(body)
    except ApiError as error:
        return error.status
    return "read"


def form(*parts: tuple[str, str]) -> bytes:
    written = [f'--xyz\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in parts]
    return ("".join(written) + "--xyz--\r\n").encode()


def test_model_and_size_are_read() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 4000}], "model": "meta/tiny"}).encode()
    admission = read_json(body)
    assert admission.model == "meta/tiny"
    assert admission.prompt_tokens == len(body) // 4


def test_facts_carry_what_was_read() -> None:
    facts = Admission("m", 12, "abc").facts("request-1")
    assert (facts.id, facts.model, facts.prompt_tokens, facts.prefix) == ("request-1", "m", 12, "abc")


@every_case(
    "body, message",
    [
        (b"", "not JSON"),
        (b"   ", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b'"model"', "JSON object"),
        (b"null", "JSON object"),
        (b'{"model": 1}', "string of 1 to"),
        (b'{"model": ""}', "string of 1 to"),
        (b'{"model": ["a"]}', "string of 1 to"),
        (json.dumps({"model": "x" * (MODEL_CHARS_MAX + 1)}).encode(), "string of 1 to"),
        (b'{"model": "a", "model": "b"}', "twice"),
        (b'{"model": "a", "mod\\u0065l": "b"}', "twice"),
        (b'{"model": "a",}', "not JSON"),
        (b'{"model": "a"} {}', "not JSON"),
        (b'{"model": "a" "b": 1}', "not JSON"),
        (b'{"model" "a"}', "not JSON"),
        (b"{model: 1}", "not JSON"),
        (b'{"model": "a\x00"}', "not JSON"),
        (b'{"model": "\xff"}', "not UTF-8"),
        ('{"model": "a"}'.encode("utf-16"), "not UTF-8"),
        ('{"model": "a"}'.encode("utf-16-le"), "not JSON"),
        (b'\xef\xbb\xbf{"model": "a"}', "not JSON"),
        (b'{"model": "a", "n": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"model": "a", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b"[" * 100_000, "nested"),
        (json.dumps({str(number): 0 for number in range(MEMBERS_MAX + 1)}).encode(), "members"),
    ],
)
def test_what_is_wrong_is_refused_and_said(body: bytes, message: str) -> None:
    error = refusal(body)
    assert error.status == 400
    assert message in error.message


@every_case("body", [b"{}", b'{"model": null}', b' { "a": "model" } '])
def test_body_may_leave_the_model_to_the_ingress(body: bytes) -> None:
    assert read_json(body).model == ""
    assert read_body(form(("file", "RIFF")), FORM, takes_form=True).model == ""


@every_case("kind", [b"", b"text/plain", b"application/x-www-form-urlencoded", b"application/xml"])
def test_missing_header_is_named(kind: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        read_body(b'{"model": "a"}', kind, takes_form=False)
    assert caught.value.status == 415
    assert "`Content-Type: application/json`" in caught.value.message


@every_case(
    "body, message",
    [
        (b'{"model": "a", "n": [' + b"[[[0]]]," * 200_000 + b"0]}", "arrays and objects"),
        (b'{"model": "a", "n": ' + b"[" * 300 + b"]" * 300 + b"}", "nested"),
        (b'{"model": "a", "model": "b", "n": "' + b"x" * SMALL_NBYTES + b'"}', "twice"),
        (b'{"model": ["a"], "n": "' + b"x" * SMALL_NBYTES + b'"}', "string of 1 to"),
        (b'{"model": "a", "n": "\xff' + b"x" * SMALL_NBYTES + b'"}', "not UTF-8"),
        (b'{"model": "a", "n": "' + b"x" * SMALL_NBYTES + b'"', "its end"),
        (b'{"model": "a", "n": "' + b"x" * SMALL_NBYTES + b'"} {}', "closes what is not open"),
        (b'{"model": "a", "n": "' + b"x" * SMALL_NBYTES + b'"} x', "follows its end"),
        (b'{"model" "a", "n": "' + b"x" * SMALL_NBYTES + b'"}', "JSON object"),
        (b'["' + b"x" * SMALL_NBYTES + b'"]', "must be an object"),
    ],
)
def test_what_is_wrong_with_a_large_body_is_said(body: bytes, message: str) -> None:
    error = refusal(body)
    assert error.status == 400
    assert message in error.message


def test_bounds_are_those_of_the_settings() -> None:
    body = b'{"model": "a", "n": [[[0]], [[0]]]}'
    assert read_json(body, BodyBounds(depth=4, containers=6)).model == "a"
    for bounds in (BodyBounds(depth=3, containers=6), BodyBounds(depth=4, containers=5)):
        with pytest.raises(ApiError):
            read_json(body, bounds)


def test_large_body_reads_as_a_small_one() -> None:
    text = "Grüße, 世界 \U0001f600 " * 40
    values = {"stream": True, "messages": [{"content": text}], "model": "a\u00e9", "seed": 1}
    small, large = (json.dumps(values | {"x": "y" * num}, ensure_ascii=False).encode() for num in (1, SMALL_NBYTES))
    for body in (large, memoryview(large)):
        admission = read_json(body)
        assert (admission.model, admission.prefix) == ("a\u00e9", read_json(small).prefix)


def test_nested_model_does_not_count() -> None:
    assert read_json(b'{"a": {"model": "b"}, "model": "c", "d": [{"model": 1}]}').model == "c"


def test_equal_beginnings_have_equal_prefixes() -> None:
    system = "You are a careful assistant. " * 30
    first, second = (
        read_json(json.dumps({"model": "a", "messages": [{"content": system + end}]}).encode()) for end in ("x", "y")
    )
    assert first.prefix == second.prefix
    assert len(first.prefix) == 16


def test_other_beginnings_have_other_prefixes() -> None:
    first, second = (read_json(json.dumps({"model": "a", "prompt": begin}).encode()) for begin in ("x", "y"))
    assert first.prefix != second.prefix


def test_without_a_prompt_there_is_no_prefix() -> None:
    assert read_json(b'{"model": "a"}').prefix == ""


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)))
def test_any_object_reads_as_the_standard_library_does(members: dict[str, object]) -> None:
    body = json.dumps(members | {"model": "the model"}, indent=1).encode()
    assert read_json(body).model == json.loads(body)["model"]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    assert outcome(body) in {"read", 400}


def test_form_names_its_model() -> None:
    assert read_body(form(("file", "RIFF"), ("model", "whisper")), FORM, takes_form=True).model == "whisper"


def test_quoted_boundary_is_one() -> None:
    kind = b'multipart/form-data; boundary="xyz"'
    assert read_body(form(("model", "whisper")), kind, takes_form=True).model == "whisper"


@every_case(
    "body, kind, status",
    [
        (form(("model", "a"), ("model", "b")), FORM, 400),
        (form(*[("x", "1")] * (PARTS_MAX + 1)), FORM, 400),
        (form(("model", "a")), b"multipart/form-data", 400),
        (b"model=a", b"application/x-www-form-urlencoded", 415),
    ],
)
def test_form_that_is_wrong_is_refused(body: bytes, kind: bytes, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        read_body(body, kind, takes_form=True)
    assert caught.value.status == status


def test_form_is_read_only_where_one_is_expected() -> None:
    with pytest.raises(ApiError) as caught:
        read_body(form(("model", "a")), FORM, takes_form=False)
    assert caught.value.status == 415
