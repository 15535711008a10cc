"""Reading a file in chunks: the same bytes by whichever way they come."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.checkpoint.chunk_file import ChunkFile
from sllm_vllm.errors import CheckpointCorrupt
from tests.checkpoint.conftest import Mount
from tests.support.checkpoints import assert_says_where_and_mend
from tests.support.waiting import DEADLINE_S

CHUNK_NBYTES = 1 << 16
CONTENT = random.Random(0).randbytes(10 * CHUNK_NBYTES + 12_345)
OFFSETS = range(0, len(CONTENT), CHUNK_NBYTES)


@pytest.fixture(params=["disk", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file of `CONTENT` on the disk that has the temporary files, or on the tmpfs that has shared memory."""
    if request.param == "disk":
        yield write(tmp_path / "file")
    elif os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            yield write(Path(name) / "file")
    else:
        pytest.skip("there is no /dev/shm to write to")


def write(path: Path) -> Path:
    path.write_bytes(CONTENT)
    return path


def opened(path: Path) -> ChunkFile:
    return ChunkFile(os.open(path, os.O_RDONLY), str(path))


def drop_from_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def page_buffer(nbytes: int = CHUNK_NBYTES) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes))


def read_chunk(file: ChunkFile, offset: int, *, buffer: memoryview | None = None) -> bytes:
    buffer = buffer if buffer is not None else page_buffer()
    nbytes = min(CHUNK_NBYTES, len(CONTENT) - offset)
    assert file.read_into(buffer, offset, nbytes) in ("cache", "disk")
    return bytes(buffer[:nbytes])


def read_chunks(file: ChunkFile) -> bytes:
    return b"".join(read_chunk(file, offset) for offset in OFFSETS)


def read_all(path: Path) -> bytes:
    with opened(path) as file:
        return read_chunks(file)


def direct_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "direct_io=off" in record.getMessage()]


def test_cached_file_is_read_whole(path: Path) -> None:
    assert path.read_bytes() == CONTENT
    assert read_all(path) == CONTENT


def test_uncached_file_is_read_whole(path: Path) -> None:
    drop_from_cache(path)
    assert read_all(path) == CONTENT


def test_half_cached_file_is_read_whole(path: Path) -> None:
    drop_from_cache(path)
    with path.open("rb", buffering=0) as file:
        for offset in (0, CHUNK_NBYTES + 8192, 2 * CHUNK_NBYTES + 4096 * 15):
            os.pread(file.fileno(), 4096, offset)
    assert read_all(path) == CONTENT


def test_chunk_says_whether_it_came_from_the_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "file")
    with path.open("rb") as probe:
        try:
            os.preadv(probe.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError as error:
            pytest.skip(f"this file system does not tell what it has cached ({error.strerror})")
    with opened(path) as file:
        drop_from_cache(path)
        assert file.read_into(page_buffer(), 0, CHUNK_NBYTES) == "disk"
        assert path.read_bytes() == CONTENT
        assert file.read_into(page_buffer(), 0, CHUNK_NBYTES) == "cache"


def test_range_that_ends_within_a_page_leaves_the_rest_of_the_file_alone(path: Path) -> None:
    with opened(path) as file:
        buffer = page_buffer()
        file.read_into(buffer, 4096, 5000)
        assert bytes(buffer[:5000]) == CONTENT[4096:9096]


def test_threads_read_the_same_file_at_once(path: Path) -> None:
    drop_from_cache(path)
    with opened(path) as file, ThreadPoolExecutor(4) as pool:
        chunks = list(pool.map(lambda offset: read_chunk(file, offset), list(OFFSETS) * 5))
    assert b"".join(chunks) == CONTENT * 5


@pytest.mark.parametrize("left", [0, 4096, 5 * CHUNK_NBYTES + 100, len(CONTENT) - 1])
def test_file_that_shrinks_while_it_is_read_is_corrupt(path: Path, left: int) -> None:
    with opened(path) as file:
        os.truncate(path, left)
        with pytest.raises(CheckpointCorrupt, match=f"ends at byte {left}") as found:
            read_chunks(file)
    assert_says_where_and_mend(found.value, str(path))


def test_file_system_without_direct_io_is_read_buffered(mount: Mount, caplog: pytest.LogCaptureFixture) -> None:
    path = write(mount("ramfs", "mode=700").path / "file")
    with caplog.at_level(logging.WARNING):
        assert read_all(path) == CONTENT
    assert len(direct_warnings(caplog)) == 1
    assert str(path) in direct_warnings(caplog)[0]


Preadv = Callable[..., int]


@pytest.fixture
def direct_path(tmp_path: Path) -> Path:
    """A file of `CONTENT` that can be opened with O_DIRECT."""
    path = write(tmp_path / "file")
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"the file system of the temporary files has no O_DIRECT ({error.strerror})")
    return path


@pytest.fixture
def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> Callable[[Preadv], None]:
    """Replace how a chunk is read with O_DIRECT; what asks for cached pages finds none."""

    def install(direct: Preadv) -> None:
        real = os.preadv

        def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if flags & os.RWF_NOWAIT:
                raise BlockingIOError
            is_direct = os.readlink(f"/proc/self/fd/{fd}") and flags_of(fd) & os.O_DIRECT
            return direct() if is_direct else real(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)

    return install


def flags_of(fd: int) -> int:
    (line,) = [line for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if line.startswith("flags:")]
    return int(line.split()[1], 8)


def raising(number: int) -> Preadv:
    def direct(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return direct


def test_direct_read_that_is_refused_falls_back_once(
    direct_path: Path, refuse_direct: Callable[[Preadv], None], caplog: pytest.LogCaptureFixture
) -> None:
    refuse_direct(raising(errno.EINVAL))
    assert read_all(direct_path) == CONTENT
    assert len(direct_warnings(caplog)) == 1


def test_threads_that_are_refused_at_once_log_once(
    direct_path: Path, refuse_direct: Callable[[Preadv], None], caplog: pytest.LogCaptureFixture
) -> None:
    together = threading.Barrier(4)

    def direct() -> int:
        together.wait(timeout=DEADLINE_S)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    refuse_direct(direct)
    with opened(direct_path) as file, ThreadPoolExecutor(4) as pool:
        chunks = list(pool.map(lambda offset: read_chunk(file, offset), OFFSETS[:4]))
    assert b"".join(chunks) == CONTENT[: 4 * CHUNK_NBYTES]
    assert len(direct_warnings(caplog)) == 1


def test_fallback_leaves_no_descriptor_open(direct_path: Path, refuse_direct: Callable[[Preadv], None]) -> None:
    before = os.listdir("/proc/self/fd")
    refuse_direct(raising(errno.EINVAL))
    read_all(direct_path)
    assert os.listdir("/proc/self/fd") == before


def test_device_error_reaches_the_caller(direct_path: Path, refuse_direct: Callable[[Preadv], None]) -> None:
    refuse_direct(raising(errno.EIO))
    with opened(direct_path) as file, pytest.raises(OSError, match="Input/output error"):
        read_chunk(file, 0)


def test_error_while_asking_the_cache_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(write(tmp_path / "file")) as file:
        monkeypatch.setattr(os, "preadv", raising(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            read_chunk(file, 0)


def test_kernel_that_can_not_tell_the_cache_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert read_all(write(tmp_path / "file")) == CONTENT


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError
        return real(fd, [buffers[0][: 3 * 4096]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert read_all(write(tmp_path / "file")) == CONTENT


@pytest.mark.parametrize("short", ["cached", "direct"])
def test_read_that_ends_within_a_page_does_not_end_direct_reading(
    direct_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, short: str
) -> None:
    """O_DIRECT takes multiples of a page alone, wherever the last read ended."""
    real, left, direct_offsets = os.preadv, [1], set()

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags_of(fd) & os.O_DIRECT:
            direct_offsets.add(offset - CHUNK_NBYTES)
        if left and bool(flags) == (short == "cached"):
            left.pop()
            return real(fd, [buffers[0][:8192]], offset) - 3192
        if flags:
            raise BlockingIOError
        if offset % 4096 and flags_of(fd) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with opened(direct_path) as file:
        assert read_chunk(file, CHUNK_NBYTES) == CONTENT[CHUNK_NBYTES : 2 * CHUNK_NBYTES]
    assert direct_warnings(caplog) == []
    assert direct_offsets == ({4096} if short == "cached" else {0})


def test_closing_twice_does_no_harm(path: Path) -> None:
    file = opened(path)
    file.close()
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.read_into(page_buffer(), 0, 1)
