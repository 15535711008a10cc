"""The scanner of JSON: any object reads as the standard library reads it, wherever slices end."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sllm_vllm.router.http import json_scan
from sllm_vllm.router.http.json_scan import JsonLimits, NotJson, scan_members
from tests.support.cases import every_case

BOUNDS = JsonLimits(depth=64, containers=10_000, members=1000)
# Quotes, backslashes and brackets are what can go wrong.
TEXTS = st.text(st.sampled_from('"\\\\[]{},: \na\u00e9\u4e16\U0001f600'), max_size=12)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(params=[1, 3, 64], scope="module", autouse=True)
def slices(request: pytest.FixtureRequest) -> Iterator[None]:
    before, json_scan.SLICE_NBYTES = json_scan.SLICE_NBYTES, request.param
    yield
    json_scan.SLICE_NBYTES = before


@given(st.dictionaries(TEXTS, VALUES, max_size=6), st.sampled_from([None, 1]), st.booleans())
@example({"a": "\\"}, None, True)
@example({"\\": '"'}, None, True)
def test_any_object_is_taken_apart_as_the_standard_library_does(
    members: dict[str, object], indent: int | None, is_ascii: bool
) -> None:
    body = json.dumps(members, indent=indent, ensure_ascii=is_ascii).encode()
    found = [(json.loads(one.name), json.loads(body[one.start : one.end])) for one in scan_members(body, BOUNDS)]
    assert found == list(members.items())


@given(st.binary(max_size=60) | st.text(st.sampled_from('{}[]",:\\ a1'), max_size=30).map(str.encode))
def test_what_the_standard_library_reads_is_never_read_otherwise(body: bytes) -> None:
    """Rubbish within values may pass; a valid object never reads as another one."""
    try:
        expected = json.loads(body.decode(), object_pairs_hook=lambda pairs: pairs)
    except ValueError:
        expected = None
    try:
        found = [(json.loads(one.name), one) for one in scan_members(body, BOUNDS)]
    except ValueError:
        found = None
    if expected is not None and body.strip().startswith(b"{"):
        assert found is not None
        assert [name for name, _ in found] == [name for name, _ in expected]


@every_case(
    "body",
    [
        b"",
        b" ",
        b"[]",
        b"{",
        b"}",
        b"{}}",
        b"{} x",
        b"x {}",
        b"{1:2}",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b'{"a":1 "b":2}',
    ],
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(NotJson):
        list(scan_members(body, BOUNDS))
