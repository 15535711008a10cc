"""FIFOs and devices in the place of files: nothing waits for them, and SIGTERM always ends a daemon."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.repository import CheckpointRepository, VerifiedMarks
from sllm_vllm.checkpoint.source_records import SourceRecords
from sllm_vllm.daemon.plain_file import open_key, open_plain, read_plain
from sllm_vllm.daemon.unix_listener import locked
from sllm_vllm.errors import ConfigError, NodeError
from sllm_vllm.loader.limits import LIMITS_NAME, read_limits
from sllm_vllm.loader.vllm.source import Location
from sllm_vllm.node.daemon import WORDS
from sllm_vllm.node.logs import BoundedLog
from sllm_vllm.node.orphans import Record
from sllm_vllm.router.config.file import read_router_config
from sllm_vllm.router.state.estimates import read_estimates
from sllm_vllm.store.calibrate import CALIBRATION_NAME, read_calibration
from sllm_vllm.store.staged_file import StagedCheckpoint
from tests.support.router_process import write_config
from tests.support.waiting import wait_until

NAME = "from-elsewhere"
COMMAND = str(Path(sys.executable).with_name("sllm-vllm"))


def in_time(work: Callable[[], object]) -> object:
    """What it returns or raises; fails if it waits."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20.0)
    assert found, "it waits"
    return found[0]


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path, 0o600)
    return path


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND])
def test_a_fifo_is_refused_at_once_and_left_alone(fifo: Path, flags: int) -> None:
    error = in_time(lambda: open_plain(fifo, flags))
    assert isinstance(error, OSError)
    assert (error.strerror, fifo.is_fifo()) == ("it is not a regular file", True)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/"])
def test_a_device_or_a_folder_is_refused(path: str) -> None:
    assert isinstance(in_time(lambda: read_plain(path, 10)), OSError)


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_plain(path, 10) == b"x" * 10
    with pytest.raises(OSError, match="it is larger than 9 bytes"):
        read_plain(path, 9)


def test_a_link_is_followed_unless_it_must_not_be(tmp_path: Path, fifo: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"x")
    link.symlink_to(file)
    assert read_plain(link, 1) == b"x"
    with pytest.raises(OSError, match="symbolic link"):
        open_plain(link, os.O_RDONLY | os.O_NOFOLLOW)
    link.unlink()
    link.symlink_to(fifo)
    assert isinstance(in_time(lambda: read_plain(link, 1)), OSError)


def test_no_file_that_a_daemon_reads_or_writes_is_waited_for(tmp_path: Path, fifo: Path) -> None:
    """Each by the function that the daemon calls."""
    os.mkfifo(tmp_path / CALIBRATION_NAME)
    os.mkfifo(tmp_path / "engines.new")
    assert isinstance(in_time(lambda: open_key(fifo)), ConfigError)
    assert isinstance(in_time(lambda: read_router_config(fifo)), ConfigError)
    assert isinstance(in_time(lambda: locked(fifo, tmp_path, WORDS).__enter__()), NodeError)
    assert not isinstance(in_time(lambda: read_estimates(fifo)), Exception)
    assert in_time(lambda: read_calibration(tmp_path)) is None
    in_time(lambda: BoundedLog(fifo, 1 << 20).write(b"x"))
    in_time(lambda: Record(tmp_path / "engines").add(os.getpid()))
    assert (tmp_path / "engines").is_file()


def test_no_file_of_a_store_is_waited_for(tmp_path: Path) -> None:
    for name in (CALIBRATION_NAME, LIMITS_NAME, f".staging/.received/{NAME}/manifest.json", "ref"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / name)
    repository = CheckpointRepository(tmp_path)
    assert isinstance(in_time(lambda: StagedCheckpoint(repository, NAME, b"{}")), Exception)
    assert in_time(lambda: read_limits(tmp_path)) == {}
    assert in_time(lambda: Location("org/name", tmp_path, commit="0" * 40, ref=tmp_path / "ref").is_current()) is True

    file = tmp_path / "file"
    file.write_bytes(b"x")
    marks = VerifiedMarks(tmp_path)
    assert marks.mark(file, file.stat())
    assert marks.is_marked(file)
    [mark] = (tmp_path / ".verified").iterdir()
    mark.unlink()
    os.mkfifo(mark)
    assert in_time(lambda: marks.is_marked(file)) is False

    records = SourceRecords(tmp_path)
    records.identify(tmp_path, ())
    [record] = (tmp_path / ".sources").glob("*.json")
    record.unlink()
    os.mkfifo(record)
    assert in_time(lambda: records.folders()) == {}


# -------------------------------------------------------------------------------------------------------------- daemons


def ends_by(process: subprocess.Popen[bytes], log: Path, serving: str) -> int:
    """Its status; one that serves is told to stop."""
    wait_until(lambda: process.poll() is not None or serving in log.read_text(), "the daemon")
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    wait_until(lambda: process.poll() is not None, "its end")
    return process.returncode


@pytest.mark.parametrize(
    ("name", "status"), [("admin.key", 1), ("state.sqlite", 1), ("lock", 1), ("estimates.json", 0)]
)
def test_a_router_refuses_a_fifo_or_does_without_it(tmp_path: Path, name: str, status: int) -> None:
    write_config(tmp_path, "fine")
    (tmp_path / "node").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "node" / name, 0o600)
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([COMMAND, "serve", str(tmp_path / "router.yaml")], stdout=output, stderr=output)
    try:
        assert ends_by(process, log, "event=router_serving") == status
        assert re.search(rf"{re.escape(name)}.*not a regular file", log.read_text())
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("name", "status"), [("metrics.key", 1), ("lock", 1), ("pins.json", 0)])
def test_a_store_refuses_a_fifo_or_does_without_it(tmp_path: Path, name: str, status: int) -> None:
    (tmp_path / ".store").mkdir(mode=0o700)
    os.mkfifo(tmp_path / ".store" / name, 0o600)
    log = tmp_path / "log"
    arguments = ("--store-dir", str(tmp_path), "--memory", "64MiB", "--metrics-port", "0")
    with log.open("wb") as output:
        process = subprocess.Popen([COMMAND, "store", "serve", *arguments], stdout=output, stderr=output)
    try:
        assert ends_by(process, log, "event=store_serving") == status
    finally:
        process.kill()
        process.wait()
