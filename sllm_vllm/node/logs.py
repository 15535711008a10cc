"""Engines' output: read from a pipe as it arrives, kept in files of bounded size, and followed while they grow."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiofiles
import aiofiles.os

from sllm_vllm.daemon.plain_file import open_plain

logger = logging.getLogger(__name__)

PIPE_NBYTES = 1 << 20
LINE_NBYTES_MAX = 1 << 16
"""A longer line is split."""
_READ_NBYTES = 1 << 16
_HEALTH_LINE = re.compile(rb'[^\n]*"GET /health HTTP/1\.[01]" 200[^\n]*\n')
_FOLLOW_S = 0.1
_OLDER = ".1"


class BoundedLog:
    """A log of at most ``2 * nbytes_max`` bytes in two files: ``path``, and the older ``path.1``.

    While the disk is full, lines are lost and nothing else fails; how many bytes were lost is logged once there is room
    again.
    """

    def __init__(self, path: Path, nbytes_max: int) -> None:
        self.path = path
        self._nbytes_max = nbytes_max
        self._nbytes_lost = 0
        self._fd = -1

    def write(self, data: bytes) -> None:
        """Append to the log; never raises."""
        try:
            if self._fd < 0:
                self._open()
            elif os.fstat(self._fd).st_size + len(data) > self._nbytes_max:
                self._turn()
            if self._nbytes_lost:
                self._append(f"[{self._nbytes_lost} bytes were lost: the disk was full]\n".encode())
                self._nbytes_lost = 0
            self._append(data)
        except OSError as error:
            if not self._nbytes_lost:
                logger.warning("event=log_not_written path=%s reason=%s", self.path, error)
            self._nbytes_lost += len(data)

    def close(self) -> None:
        """Close the file, without removing it."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _append(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def _open(self) -> None:
        self._fd = open_plain(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)

    def _turn(self) -> None:
        self.close()
        os.replace(self.path, _older(self.path))
        self._open()


class OutputPipe:
    """The reading end of an engine's standard output. Lives on the agent's loop.

    Args:
        on_line: called with every line, without its end.
    """

    def __init__(self, log: BoundedLog, on_line: Callable[[str], None]) -> None:
        self._log = log
        self._on_line = on_line
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._fd, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        with contextlib.suppress(OSError):  # unprivileged users have a limit
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_NBYTES)
        self._loop.add_reader(self._fd, self._read)

    def close_writer(self) -> None:
        """Close our copy, so that EOF arrives when the engine exits."""
        if self.writer >= 0:
            os.close(self.writer)
        self.writer = -1

    async def wait_closed(self) -> None:
        """Wait for EOF: the last process that could write has ended."""
        await asyncio.shield(self._closed)

    def close(self) -> None:
        """Stop reading."""
        self.close_writer()
        if not self._closed.done():
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._log.close()
            self._closed.set_result(None)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ_NBYTES)
        except BlockingIOError:
            return
        if not data:
            if self._rest:
                self._on_line(self._rest.decode(errors="replace"))
            self.close()
            return
        if b"GET /health" in data:  # the agent's own health checks, one every few seconds
            data = _HEALTH_LINE.sub(b"", data)
        self._log.write(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_NBYTES_MAX:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._on_line(line.decode(errors="replace"))


def remove_log(path: Path) -> None:
    """Remove both files of a log, if they exist."""
    for file in (path, _older(path)):
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def remove_old_logs(directory: Path, *, keep_max: int) -> None:
    """Remove all but the newest logs of a folder.

    Raises:
        OSError: the folder can't be read.
    """
    logs = sorted(directory.glob("*.log"), key=lambda path: path.lstat().st_mtime_ns, reverse=True)
    for path in logs[keep_max:]:
        remove_log(path)


async def read_log(path: Path, *, tail_nbytes: int | None, is_over: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Yield a log's bytes: the last ``tail_nbytes`` (None: all there are), then what is appended until ``is_over``.

    Begins in the older file if the newer one holds less than the tail, and follows the log into the next file when it
    is rotated. Yields nothing if there is no such file.
    """
    with contextlib.suppress(FileNotFoundError):
        inode = -1
        while True:
            was_over = is_over()
            if inode != -1 or await aiofiles.os.path.exists(_older(path)):
                await _wait_for_file(path)
            async with aiofiles.open(path, "rb", opener=open_plain) as file:
                status = os.fstat(file.fileno())
                async for data in _read_older(path, {status.st_ino, inode}, _rest_of(tail_nbytes, status.st_size)):
                    yield data
                if tail_nbytes is not None:
                    await file.seek(max(0, status.st_size - tail_nbytes))
                inode, tail_nbytes = status.st_ino, None
                while True:
                    if data := await file.read(_READ_NBYTES):
                        yield data
                    elif was_over:
                        return
                    elif await _inode_of(path) != inode:
                        while data := await file.read(_READ_NBYTES):  # written before the rotation; no more will be
                            yield data
                        break
                    else:
                        was_over = is_over()
                        await asyncio.sleep(0 if was_over else _FOLLOW_S)


def _older(path: Path) -> Path:
    return path.with_name(path.name + _OLDER)


def _rest_of(tail_nbytes: int | None, nbytes: int) -> int | None:
    """How much of a tail is in the older file."""
    return None if tail_nbytes is None else max(0, tail_nbytes - nbytes)


async def _read_older(path: Path, read: set[int], tail_nbytes: int | None) -> AsyncIterator[bytes]:
    """Yield the end of the older file. ``read``: inodes of files already read, which the log's rotation may have put
    there."""
    with contextlib.suppress(FileNotFoundError):
        async with aiofiles.open(_older(path), "rb", opener=open_plain) as file:
            status = os.fstat(file.fileno())
            if status.st_ino in read:
                return
            if tail_nbytes is not None:
                await file.seek(max(0, status.st_size - tail_nbytes))
            while data := await file.read(_READ_NBYTES):
                yield data


async def _inode_of(path: Path) -> int:
    """The file's inode; 0 during a rotation, when there is no such file."""
    try:
        return (await aiofiles.os.stat(path)).st_ino
    except FileNotFoundError:
        return 0


async def _wait_for_file(path: Path) -> None:
    """Wait until a rotated log has its next file; bounded, since the log may have been removed."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FOLLOW_S):
            while True:
                if await aiofiles.os.path.exists(path):
                    return
                await asyncio.sleep(0)
