"""Messages to bytes and back, and what is done with bytes that are none."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.store.protocol import (
    Answer,
    Failed,
    Find,
    FrameReader,
    Given,
    Hello,
    Hint,
    Leased,
    LeaseOrder,
    Order,
    Ping,
    ProtocolError,
    RefusedReply,
    Release,
    Request,
    StoreReply,
    StoreWelcome,
    decode_answer,
    decode_request,
    encode,
)
from tests.support.cases import every_case

REQUESTS: tuple[Request, ...] = (
    Hello(version=1),
    Find(checkpoint="a"),
    LeaseOrder(checkpoint="a", rank=0, digest="0" * 32, hold=True),
    Release(token=1, spans=(1, 2, 3)),
    Ping(),
    Hint(model="m"),
    Order(order="prefetch", checkpoint="a", wait=True),
)
ANSWERS: tuple[Answer, ...] = (
    StoreWelcome(version=1, slot_nbytes=4096, num_slots=3, page_nbytes=4096),
    Leased(token=1, chunks_per_span=1, num_spans=3),
    Given(token=1, spans=((0, 1, True),)),
    Failed(token=1, error="CheckpointCorrupt", path="p", problem="q", mend="m"),
    StoreReply(data={"a": [1, None]}),
    RefusedReply(error="StoreRefused", path="p", problem="q", mend="m"),
)


@every_case("message", REQUESTS)
def test_requests_come_back_as_they_were(message: Request) -> None:
    (body,) = FrameReader(1 << 16).feed(encode(message))
    assert decode_request(body) == message


@every_case("message", ANSWERS)
def test_answers_come_back_as_they_were(message: Answer) -> None:
    (body,) = FrameReader(1 << 16).feed(encode(message))
    assert decode_answer(body) == message


@given(cuts=st.lists(st.integers(1, 9), min_size=1))
def test_frames_are_found_however_the_stream_is_cut(cuts: list[int]) -> None:
    stream = b"".join(encode(message) for message in REQUESTS)
    reader, found, at = FrameReader(1 << 16), list[Request](), 0
    for index in range(len(stream)):
        step = cuts[index % len(cuts)]
        found += [decode_request(body) for body in reader.feed(stream[at : at + step])]
        at += step
    assert tuple(found) == REQUESTS


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_break_the_protocol(data: bytes) -> None:
    for decode in (decode_request, decode_answer):
        with contextlib.suppress(ProtocolError):
            assert decode(data).kind


@given(st.binary(max_size=200))
def test_the_reader_never_holds_more_than_it_may(data: bytes) -> None:
    reader = FrameReader(64)
    try:
        bodies = list(reader.feed(data))
    except ProtocolError:
        return
    assert all(len(body) <= 64 for body in bodies)


@every_case(
    "body",
    [
        b'{"kind":"hello","version":1,"more":2}',
        b'{"kind":"lease","checkpoint":"a","rank":-1,"digest":"' + b"0" * 32 + b'","hold":true}',
        b'{"kind":"lease","checkpoint":"a","rank":0,"digest":"xyz","hold":true}',
        b'{"kind":"lease","checkpoint":"' + b"a" * 5000 + b'","rank":0,"digest":"' + b"0" * 32 + b'","hold":true}',
        b'{"kind":"release","token":0,"spans":[]}',
        b'{"kind":"order","order":"format"}',
        b'{"kind":"nothing"}',
        b"[" * 100_000,
        b"null",
        b"",
    ],
)
def test_what_is_out_of_bounds_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_request(body)


def test_too_long_a_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="at most 16"):
        list(FrameReader(16).feed(b"\xff\xff\xff\xff"))
