"""What engines print, by way of the agent: followed, bounded, forgotten with the replica, and lost on a full disk."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import aiofiles.os
import pytest

from sllm_vllm.errors import ReplicaUnknown
from sllm_vllm.node.logs import BoundedLog, read_log
from sllm_vllm.units import KIB, MIB
from tests.checkpoint.conftest import Mount, mount  # noqa: F401 (a fixture)
from tests.node.agent_bench import Bench, ask, running_agent, text_of, until
from tests.support.fake_engine import NOISE, NOISE_NBYTES
from tests.support.waiting import DEADLINE_S

_PAGE = b"\0" * 4096


async def read(bench: Bench, replica_id: str, *, tail_nbytes: int | None = None, follow: bool = False) -> str:
    async with asyncio.timeout(DEADLINE_S):
        pieces = [data async for data in bench.agent.logs(replica_id, tail_nbytes=tail_nbytes, follow=follow)]
    return b"".join(pieces).decode()


def without_questions(text: str) -> list[str]:
    """Its lines, but for those about its health, which the fake engine words in its own way."""
    return [line for line in text.splitlines() if "GET /health" not in line]


# ---------------------------------------------------------------------------------------------------------- reading


async def test_a_log_is_read_as_a_whole_or_from_near_its_end(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        report = await bench.ready()
        whole = await read(bench, report.id)
        assert "non-default args" in whole
        assert "INFO:     Application startup complete.\n" in whole
        await bench.stop(report.id)
        whole = await read(bench, report.id)
        assert await read(bench, report.id, tail_nbytes=50) == whole[-50:]
        assert await read(bench, report.id, tail_nbytes=0) == ""
        assert await read(bench, report.id, tail_nbytes=MIB, follow=True) == whole


async def test_a_log_is_followed_from_before_its_first_line_to_its_end(tmp_path: Path) -> None:
    """It ended at once, if it was followed before there was a line."""
    async with running_agent(tmp_path, slots=1) as bench:
        first = await bench.ready()
        waiting = await bench.order(waits=True)
        following = asyncio.create_task(read(bench, waiting.id, follow=True))
        await bench.stop(first.id)
        report = await bench.reach(waiting.id, "ready")
        assert (await ask(report, "/v1/completions", post=True))[0] == 200
        await bench.stop(report.id)
        followed = await following
        assert "POST /v1/completions" in followed
        assert followed == text_of(report.log) == await read(bench, report.id)


async def test_a_log_that_turns_is_followed_into_the_next_file(tmp_path: Path) -> None:
    async with running_agent(tmp_path, log_bytes=NOISE_NBYTES * 3 // 4) as bench:
        ordered = await bench.order("noisy")
        following = asyncio.create_task(read(bench, ordered.id, follow=True))
        await bench.reach(ordered.id, "ready")
        await bench.stop(ordered.id)
        followed = await following
        assert followed == text_of(ordered.log)
        assert without_questions(followed).count(NOISE) == NOISE_NBYTES // len(NOISE) + 1


async def test_a_noisy_engine_fills_no_disk(tmp_path: Path) -> None:
    bound = 64 * KIB
    async with running_agent(tmp_path, log_bytes=bound) as bench:
        report = await bench.ready("noisy")
        assert (await ask(report, "/v1/models"))[0] == 200
        assert (await bench.stop(report.id)).state == "stopped"
        sizes = [path.stat().st_size for path in log_files(bench)]
        assert len(sizes) == 2
        assert max(sizes) <= bound
        assert without_questions(text_of(report.log))[-1].endswith('"GET /v1/models HTTP/1.1"')


def log_files(bench: Bench) -> list[Path]:
    return sorted(bench.config.log_dir.iterdir())


async def test_the_last_lines_of_one_that_failed_are_in_its_report(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        report = await bench.reach((await bench.order("exits-1")).id, "failed")
        assert list(report.tail) == without_questions(await read(bench, report.id))[-30:]


# What the thread that reads may see while the loop turns the log.


async def read_while_it_turns(path: Path, monkeypatch: pytest.MonkeyPatch, turn: Callable[[], None]) -> bytes:
    """``turn`` is called after the first file was read to its end, and before the reader looks for another one."""
    stat, turned = aiofiles.os.stat, asyncio.Event()

    async def stat_late(name: Path) -> os.stat_result:
        if not turned.is_set():
            turned.set()
            turn()
        return await stat(name)

    monkeypatch.setattr(aiofiles.os, "stat", stat_late)
    async with asyncio.timeout(DEADLINE_S):
        pieces = [data async for data in read_log(path, tail_nbytes=None, is_over=turned.is_set)]
    return b"".join(pieces)


async def test_what_is_written_just_before_a_log_turns_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = BoundedLog(tmp_path / "log", 10)
    log.write(b"one\n")

    def turn() -> None:
        log.write(b"two\n")
        log.write(b"three\n")

    assert await read_while_it_turns(log.path, monkeypatch, turn) == b"one\ntwo\nthree\n"
    log.close()


async def test_a_log_that_has_no_file_for_a_moment_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, loop = BoundedLog(tmp_path / "log", 10), asyncio.get_running_loop()
    log.write(b"one\n")
    log.close()

    def turn() -> None:
        os.replace(log.path, f"{log.path}.1")
        loop.call_later(0.01, log.write, b"two\n")

    assert await read_while_it_turns(log.path, monkeypatch, turn) == b"one\ntwo\n"
    log.close()


# ------------------------------------------------------------------------------------------------------- forgetting


async def test_what_has_ended_is_remembered_for_a_while(tmp_path: Path) -> None:
    async with running_agent(tmp_path, ended_max=2) as bench:
        reports = [await bench.reach((await bench.order("exits-1")).id, "failed") for _ in range(4)]
        known = [row.id for row in (await bench.agent.report()).replicas]
        assert known == [report.id for report in reports[2:]]
        assert {path.name for path in log_files(bench)} == {f"{name}.log" for name in known}
        with pytest.raises(ReplicaUnknown):
            bench.agent.replica(reports[0].id)
        assert [report async for report in bench.agent.watch(reports[0].id)] == []


async def test_a_watch_of_one_that_is_forgotten_ends(tmp_path: Path) -> None:
    async with running_agent(tmp_path, slots=1, ended_max=1) as bench:
        first = await bench.ready()
        watch = bench.agent.watch((await bench.order(waits=True)).id)
        async with asyncio.timeout(DEADLINE_S):
            waiting = await anext(watch)
            await bench.agent.stop_replica(waiting.id)
            await bench.stop(first.id)  # now that is the one that ended last
            with pytest.raises(StopAsyncIteration):
                await anext(watch)


async def test_logs_of_agents_before_this_one_are_removed_but_for_the_newest(tmp_path: Path) -> None:
    logs = tmp_path / "node" / "logs"
    logs.mkdir(parents=True)
    for number in range(5):
        (logs / f"{number}.log").write_text("old")
        (logs / f"{number}.log.1").write_text("older")
        os.utime(logs / f"{number}.log", (number, number))
    async with running_agent(tmp_path, ended_max=2) as bench:
        assert [path.name for path in log_files(bench)] == ["3.log", "3.log.1", "4.log", "4.log.1"]


# ------------------------------------------------------------------------------------------------------- a full disk


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(_PAGE):
            pass


async def test_on_a_full_disk_engines_run_and_the_log_says_what_was_lost(
    tmp_path: Path,
    mount: Mount,  # noqa: F811
) -> None:
    directory = mount("tmpfs", "size=64k").path / "node"
    async with running_agent(tmp_path, node_dir=directory) as bench:
        await asyncio.to_thread(fill, directory / "ballast")
        report = await bench.ready()
        assert (await ask(report, "/v1/models"))[0] == 200
        assert text_of(report.log) == ""
        os.unlink(directory / "ballast")
        assert (await ask(report, "/v1/completions", post=True))[0] == 200
        await until(lambda: "/v1/completions" in text_of(report.log), "the log to go on")
        assert re.match(r"\[[1-9]\d* bytes were lost: the disk was full\]\n", text_of(report.log))
        assert (await bench.stop(report.id)).status == 0


async def test_a_disk_that_is_full_from_the_beginning_is_told_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the logs nor the record of engines can be made."""
    opened = os.open

    def full(path: str | os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, flags, mode)

    async with running_agent(tmp_path) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", full)
            report = await bench.ready()
        assert (await ask(report, "/v1/models"))[0] == 200
        await bench.stop(report.id)
        assert (await read(bench, report.id)).startswith("[")  # so and so many bytes were lost
