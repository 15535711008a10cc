"""A body in a move: the resumed one is the client's own, with members put behind its last."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.router.migration.moved_body import VALUE_NBYTES_MAX, MovedBody, NotMovable

NAMES = st.sampled_from(["model", "messages", "vllm_xargs", "echo", "cache_salt", "n", 'a"b', "\u00e9"])
VALUES = (
    st.none() | st.booleans() | st.text(max_size=5) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


@given(st.dictionaries(NAMES, VALUES, min_size=1), st.dictionaries(NAMES, VALUES, min_size=1), st.booleans())
def test_added_members_count_and_the_others_stay(
    members: dict[str, object], added: dict[str, object], is_indented: bool
) -> None:
    body = json.dumps(members, indent=2 if is_indented else None).encode() + b" \n"
    for given_body in (body, memoryview(body)):
        moved = MovedBody(given_body)
        assert json.loads(moved.with_members(added)) == members | added
        assert all(name in moved for name in members)
        assert moved.get("vllm_xargs") == members.get("vllm_xargs")


def test_of_two_members_with_one_name_the_last_counts_as_engines_read_it() -> None:
    assert MovedBody(b'{"echo": true, "echo": false}').get("echo") is False


def test_member_that_is_too_large_to_be_read_is_named() -> None:
    with pytest.raises(NotMovable, match="vllm_xargs"):
        MovedBody(json.dumps({"vllm_xargs": {"a": "x" * VALUE_NBYTES_MAX}}).encode())
