"""Logs of engines: bounded, followed while they grow, and no reason to stop anything when the disk is full."""

from __future__ import annotations

import asyncio
import errno
import os
from functools import partial
from pathlib import Path

import pytest

from sllm_vllm.node.logs import BoundedLog, OutputPipe, read_log
from tests.support.cases import every_case
from tests.support.waiting import DEADLINE_S, wait_until


def test_a_log_is_two_files_of_bounded_size(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", 100)
    for number in range(50):
        log.write(f"line {number:02}\n".encode())
    log.close()
    older, newer = (tmp_path / "log.1").read_bytes(), (tmp_path / "log").read_bytes()
    assert len(older) <= 100
    assert len(newer) <= 100
    assert (older + newer).endswith(b"line 47\nline 48\nline 49\n")


def test_a_log_is_for_this_user_alone(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", 100)
    log.write(b"secret")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_loses_lines_and_says_how_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write = BoundedLog(tmp_path / "log", 1000), os.write

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log.write(b"before\n")
    monkeypatch.setattr(os, "write", full)
    log.write(b"lost\n")
    log.write(b"lost, too\n")
    monkeypatch.setattr(os, "write", write)
    log.write(b"after\n")
    assert (tmp_path / "log").read_text() == "before\n[15 bytes were lost: the disk was full]\nafter\n"


async def test_lines_are_told_as_they_come_however_they_are_cut(tmp_path: Path) -> None:
    lines: list[str] = []
    pipe = OutputPipe(BoundedLog(tmp_path / "log", 1000), lines.append)
    for piece in (b"on", b"e\ntwo\nth", b"ree \xff"):
        os.write(pipe.writer, piece)
        await asyncio.sleep(0)
    pipe.close_writer()
    async with asyncio.timeout(DEADLINE_S):
        await pipe.wait_closed()
    assert lines == ["one", "two", "three \ufffd"]
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree \xff"


async def test_a_log_is_followed_into_the_next_file_until_its_engine_ends(tmp_path: Path) -> None:
    log, over, found = BoundedLog(tmp_path / "log", 64), asyncio.Event(), bytearray()
    log.write(b"earlier\nfirst\n")

    async def follow() -> None:
        async for data in read_log(tmp_path / "log", tail_nbytes=6, is_over=over.is_set):
            found.extend(data)

    following = asyncio.create_task(follow())
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.to_thread(wait_until, partial(found.endswith, b"first\n"), "what was there to be read")
        for number in range(20):
            line = f"line {number:02}\n".encode()
            log.write(line)
            await asyncio.to_thread(wait_until, partial(found.endswith, line), "the line to be read")
        over.set()
        await following
    assert bytes(found) == b"first\n" + b"".join(f"line {number:02}\n".encode() for number in range(20))


@every_case("tail_nbytes", [None, 1000, 190, 150, 101, 100, 99, 30, 1, 0])
async def test_a_tail_reaches_into_the_older_file(tmp_path: Path, tail_nbytes: int | None) -> None:
    log = BoundedLog(tmp_path / "log", 100)
    for number in range(30):
        log.write(f"line {number:03}\n".encode())
    log.close()
    kept = (tmp_path / "log.1").read_bytes() + (tmp_path / "log").read_bytes()
    assert len(kept) > 100
    found = [data async for data in read_log(tmp_path / "log", tail_nbytes=tail_nbytes, is_over=lambda: True)]
    expected = kept if tail_nbytes is None else kept[max(0, len(kept) - tail_nbytes) :]
    assert b"".join(found) == expected


async def test_a_log_that_turns_twice_while_it_is_not_looked_at_loses_nothing_that_is_kept(tmp_path: Path) -> None:
    log, over, found = BoundedLog(tmp_path / "log", 10), asyncio.Event(), bytearray()
    log.write(b"one\n")
    reading = read_log(tmp_path / "log", tail_nbytes=None, is_over=over.is_set)
    found.extend(await anext(reading))
    for line in (b"two two\n", b"three..\n"):  # each of them turns it
        log.write(line)
    over.set()
    async for data in reading:
        found.extend(data)
    assert bytes(found) == b"one\ntwo two\nthree..\n"


async def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert [data async for data in read_log(tmp_path / "no", tail_nbytes=None, is_over=lambda: True)] == []
