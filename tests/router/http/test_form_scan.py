"""The scanner of forms: what it takes, Starlette's parser, which vLLM's servers use, reads alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from sllm_vllm.router.http.admission import read_body
from sllm_vllm.router.http.errors import ApiError
from tests.support.cases import every_case

MISSING = "no model"
REFUSED = "refused"
TYPES = (
    b"multipart/form-data; boundary=B",
    b'multipart/form-data; boundary="B"',
    b"multipart/form-data; xboundary=A; boundary=B",
    b"multipart/form-data; xboundary=B; boundary=C",
    b"multipart/form-data; boundary=B; boundary=C",
    b"multipart/form-data; boundary=B; charset=latin-1",
    b"multipart/form-data; BOUNDARY=B",
    b"multipart/form-data; boundary= B",
    b"multipart/form-data",
)
DISPOSITIONS = (
    b'Content-Disposition: form-data; name="model"',
    b"content-disposition: form-data; name=model",
    b'Content-Disposition: form-data; name="model"; filename="x"',
    b'Content-Disposition: form-data; filename="name=model"; name="file"',
    b'Content-Disposition: attachment; name="model"',
    b'Content-Disposition: form-data; name="other"; x="; name=model"',
    b'Content-Disposition: form-data; name="model"\r\nContent-Disposition: form-data; name="other"',
    b'Content-Disposition: form-data; name="mod\\"el"',
    b"Content-Type: text/plain",
    b'X: y\r\nContent-Disposition:form-data;name="model"',
    b"Content-Disposition: form-data; name*=utf-8''model",
)
VALUES = (b"tiny", b"other", b"\xff", b"", b"a\r\nb", b"--B", b"\r\n--C", b" tiny ", "é".encode())
PARTS = st.tuples(st.sampled_from(DISPOSITIONS), st.sampled_from(VALUES))
ENDS = (b"--B--\r\n", b"--B--", b"--C--\r\n", b"", b"--B")


def as_the_router_reads(body: bytes, kind: bytes) -> str:
    try:
        return read_body(body, kind, takes_form=True).model or MISSING
    except ApiError:
        return REFUSED


def as_vllm_reads(body: bytes, kind: bytes) -> str:
    async def pieces() -> AsyncGenerator[bytes, None]:
        yield body

    headers = Headers(raw=[(b"content-type", kind)])
    try:
        form = asyncio.run(MultiPartParser(headers, pieces()).parse())
    except (MultiPartException, KeyError):
        return REFUSED
    value = form.get("model")  # of two the last, as FastAPI takes it
    return REFUSED if isinstance(value, UploadFile) else value or MISSING


@given(st.lists(PARTS, max_size=4), st.sampled_from(TYPES), st.sampled_from(ENDS), st.sampled_from([b"B", b"B", b"C"]))
def test_what_is_taken_is_read_as_vllm_reads_it(
    parts: list[tuple[bytes, bytes]], kind: bytes, end: bytes, boundary: bytes
) -> None:
    body = b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, head, value) for head, value in parts) + end
    if (ours := as_the_router_reads(body, kind)) != REFUSED:
        assert ours == as_vllm_reads(body, kind)


@every_case(
    "kind, parts, expected",
    [
        (TYPES[3], [(b"C", DISPOSITIONS[0], b"right"), (b"B", DISPOSITIONS[0], b"wrong")], None),
        (TYPES[0], [(b"B", DISPOSITIONS[0], b"a"), (b"B", DISPOSITIONS[0], b"b")], REFUSED),
        (TYPES[0], [(b"B", DISPOSITIONS[2], b"a")], REFUSED),
        (TYPES[0], [(b"B", DISPOSITIONS[0], b"\xff")], REFUSED),
        (TYPES[0], [(b"B", DISPOSITIONS[0], b"tiny"), (b"B", DISPOSITIONS[3], b"RIFF" * 100_000)], "tiny"),
    ],
)
def test_forms_that_parsers_differ_in(
    kind: bytes, parts: list[tuple[bytes, bytes, bytes]], expected: str | None
) -> None:
    written = (b"--%b\r\n%b\r\n\r\n%b\r\n" % part for part in parts)
    body = b"".join(written) + b"--" + parts[0][0] + b"--\r\n"
    ours = as_the_router_reads(body, kind)
    assert ours == (as_vllm_reads(body, kind) if expected is None else expected)
