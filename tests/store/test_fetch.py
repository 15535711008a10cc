"""A ranged read against a server that misbehaves: what heals, what does not, and what is asked for again."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.errors import RemoteCorrupt, RemoteMissing, RemoteUnreachable, SllmError
from sllm_vllm.store.fetch import (
    BACKOFF_S,
    BACKOFF_S_MAX,
    RemoteFile,
    fetch_header,
    fetch_manifest,
    fetch_range,
    fetch_span,
)
from sllm_vllm.store.remote import open_remote
from sllm_vllm.units import MIB
from tests.store.faulty_http import DRIP_NBYTES, Fault, FaultyServer, faulty_server
from tests.support.cases import every_case
from tests.support.checkpoints import CHUNK_NBYTES, make_checkpoint

NAME, PATH = "model", "partitions/rank-00000.safetensors"
URL_PATH = f"/{NAME}/{PATH}"
DATA = random.Random(0).randbytes(4 * MIB)
START, END = 1000, 3 * MIB + 77
GUARD = 64


@dataclass(frozen=True, slots=True)
class Limits:
    retries_max: int = 3
    stall_s: float = 30.0
    redirect_hosts: tuple[str, ...] = ()


class NoPause(random.Random):
    """Remembers the longest pause that each retry could have had, and takes none."""

    def __init__(self) -> None:
        super().__init__(0)
        self.longest_s: list[float] = []

    def uniform(self, a: float, b: float) -> float:
        self.longest_s.append(b)
        return a


async def fetch(server: FaultyServer, *, limits: Limits | None = None, jitter: random.Random | None = None) -> bytes:
    """What arrives of DATA[START:END]; nothing may be written beside it."""
    buffer = bytearray(b"\xa5" * (END - START + 2 * GUARD))
    file = RemoteFile(open_remote(server.url), NAME, PATH, len(DATA))
    into = memoryview(buffer)[GUARD:-GUARD]
    try:
        await fetch_range(file, START, into, limits=limits or Limits(), jitter=jitter or NoPause())
    finally:
        assert buffer[:GUARD] == buffer[-GUARD:] == b"\xa5" * GUARD
    return bytes(into)


def asked(server: FaultyServer) -> list[tuple[int, int]]:
    """First and last byte of each range that the server was asked for."""
    bounds = [(text or "").removeprefix("bytes=").split("-") for text in server.ranges]
    return [(int(first), int(last)) for first, last in bounds]


async def test_range_arrives_as_it_is() -> None:
    with faulty_server({URL_PATH: DATA}) as server:
        assert await fetch(server) == DATA[START:END]
        assert asked(server) == [(START, END - 1)]


@every_case("how", ["reset", "close"])
async def test_after_a_break_only_the_rest_is_asked_for(how: str) -> None:
    faults = [Fault(stops_after=2 * MIB, how=how)]  # type: ignore[arg-type]
    with faulty_server({URL_PATH: DATA}, faults) as server:
        assert await fetch(server) == DATA[START:END]
        first, second = asked(server)
    assert first == (START, END - 1)
    assert START < second[0] <= START + 2 * MIB or (how == "reset" and second[0] == START)  # it may lose what came
    assert second[1] == END - 1


async def test_stall_is_noticed_and_the_rest_asked_for() -> None:
    with faulty_server({URL_PATH: DATA}, [Fault(stops_after=2 * MIB, how="stall")]) as server:
        assert await fetch(server, limits=Limits(stall_s=0.5)) == DATA[START:END]
        second = asked(server)[1]
    assert START < second[0] <= START + 2 * MIB


async def test_answer_that_never_begins_is_noticed() -> None:
    with faulty_server({URL_PATH: DATA}, [Fault(stops_after=0, how="stall")]) as server:
        assert await fetch(server, limits=Limits(stall_s=0.5)) == DATA[START:END]


async def test_stall_for_ever_ends() -> None:
    with faulty_server({URL_PATH: DATA}, forever=Fault(stops_after=0, how="stall")) as server:
        with pytest.raises(RemoteUnreachable, match=r"it stalls: no data arrived for 0\.2 s \(attempts: 2\)"):
            await fetch(server, limits=Limits(retries_max=1, stall_s=0.2))
        assert len(server.requests) <= 2


async def test_slow_is_no_stall() -> None:
    data = DATA[: 40 * DRIP_NBYTES]
    with faulty_server({URL_PATH: data}, [Fault(drips=True)]) as server:
        into = bytearray(len(data))
        file = RemoteFile(open_remote(server.url), NAME, PATH, len(data))
        await fetch_range(file, 0, memoryview(into), limits=Limits(), jitter=NoPause())
        assert bytes(into) == data
        assert len(server.requests) == 1


async def test_busy_server_is_asked_again() -> None:
    with faulty_server({URL_PATH: DATA}, [Fault(status=503), Fault(status=503)]) as server:
        assert await fetch(server) == DATA[START:END]
        assert len(server.requests) == 3


@every_case("fault", [Fault(status=500), Fault(status=429), Fault(stops_after=5, how="reset")])
async def test_number_of_attempts_is_bounded(fault: Fault) -> None:
    with faulty_server({URL_PATH: DATA}, forever=fault) as server:
        with pytest.raises(RemoteUnreachable, match=r"attempts: 4"):
            await fetch(server)
        assert len(server.requests) == 4


async def test_progress_does_not_buy_more_attempts() -> None:
    """A server that gives a little each time could otherwise keep a reader for ever."""
    with faulty_server({URL_PATH: DATA}, forever=Fault(stops_after=300_000)) as server:
        with pytest.raises(RemoteUnreachable):
            await fetch(server, limits=Limits(retries_max=2))
        assert len(server.requests) == 3


async def test_pauses_grow_and_have_an_end() -> None:
    pauses = NoPause()
    with faulty_server({URL_PATH: DATA}, forever=Fault(status=503)) as server, pytest.raises(RemoteUnreachable):
        await fetch(server, limits=Limits(retries_max=9), jitter=pauses)
    assert pauses.longest_s[:3] == [BACKOFF_S, 2 * BACKOFF_S, 4 * BACKOFF_S]
    assert pauses.longest_s[-1] == BACKOFF_S_MAX
    assert len(pauses.longest_s) == 9


@every_case(
    "fault, error, told",
    [
        (Fault(extra=10), RemoteCorrupt, "more bytes than were asked for"),
        (Fault(shift=5), RemoteCorrupt, "another range than was asked for"),
        (Fault(total=END + 5), RemoteCorrupt, f"has {END + 5} bytes, the manifest says {len(DATA)}"),
        (Fault(total=7), RemoteCorrupt, "another range"),
        (Fault(status=416), RemoteCorrupt, "another range"),
        (Fault(ignores_range=True), RemoteUnreachable, "ignores ranges"),
        (Fault(status=404), RemoteMissing, "no such file"),
        (Fault(status=401), RemoteUnreachable, "check the credentials"),
        (Fault(status=403), RemoteUnreachable, "check the credentials"),
        (Fault(status=400), RemoteUnreachable, "HTTP 400"),
    ],
)
async def test_refusals_and_lies_end_it_at_once(fault: Fault, error: type[SllmError], told: str) -> None:
    with faulty_server({URL_PATH: DATA}, forever=fault) as server:
        with pytest.raises(error, match=told) as caught:
            await fetch(server)
        assert type(caught.value) is error or error is RemoteUnreachable
        assert len(server.requests) == 1
        assert str(caught.value).isprintable()
        assert f"{server.url}{URL_PATH}: " in str(caught.value)


async def test_short_answer_is_completed() -> None:
    with faulty_server({URL_PATH: DATA}, [Fault(extra=-1000)]) as server:
        assert await fetch(server) == DATA[START:END]
        assert asked(server) == [(START, END - 1), (END - 1000, END - 1)]


async def test_server_that_is_not_there_is_named() -> None:
    with faulty_server({}) as server:
        url = server.url
    with pytest.raises(RemoteUnreachable, match="no connection can be made"):
        await fetch(FaultyServer({}, port=int(url.rpartition(":")[2])))


async def test_nothing_is_written_after_a_cancellation() -> None:
    with faulty_server({URL_PATH: DATA}, [Fault(stops_after=2 * MIB, how="stall")]) as server:
        buffer = bytearray(END - START)
        file = RemoteFile(open_remote(server.url), NAME, PATH, len(DATA))
        reading = fetch_range(file, START, memoryview(buffer), limits=Limits(), jitter=NoPause())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await reading
        there = bytes(buffer)
        server.ended.set()
        await asyncio.sleep(0)
        assert bytes(buffer) == there


async def test_span_is_checked_and_only_its_bad_chunk_fetched_again(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path)
    partition = RankPartition(Path(NAME), original.manifest, original.manifest.partitions[0])
    content = original.partition(0).path.read_bytes()
    chunks = range(1, 4)
    start, nbytes = partition.chunk_range(1)[0], 3 * CHUNK_NBYTES
    into = memoryview(bytearray(nbytes + GUARD))
    with faulty_server({URL_PATH: content}, [Fault(flips=CHUNK_NBYTES + 5)]) as server:
        remote = open_remote(server.url)
        got = await fetch_span(remote, partition, chunks, into=into, limits=Limits(), jitter=NoPause())
        assert got == nbytes
        assert into[:nbytes] == content[start : start + nbytes]
        assert into[nbytes:] == bytes(GUARD)
        bad = start + CHUNK_NBYTES
        assert asked(server) == [(start, start + nbytes - 1), (bad, bad + CHUNK_NBYTES - 1)]
        assert await fetch_span(remote, partition, range(0), into=into, limits=Limits(), jitter=NoPause()) == 0


async def test_header_that_differs_twice_is_corrupt(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path)
    partition = RankPartition(Path(NAME), original.manifest, original.manifest.partitions[0])
    content = original.partition(0).path.read_bytes()
    with faulty_server({URL_PATH: content}, forever=Fault(flips=5)) as server:
        with pytest.raises(RemoteCorrupt, match="its header differs from its checksum"):
            await fetch_header(open_remote(server.url), partition, limits=Limits(), jitter=NoPause())
        assert len(server.requests) == 2


async def test_manifest_is_asked_for_again_and_then_missing() -> None:
    with faulty_server({f"/{NAME}/manifest.json": b"{}"}) as server:
        remote = open_remote(server.url)
        assert await fetch_manifest(remote, NAME, limits=Limits(), jitter=NoPause()) == b"{}"
        with pytest.raises(RemoteMissing):
            await fetch_manifest(remote, "other", limits=Limits(), jitter=NoPause())
        assert len(server.requests) == 2
