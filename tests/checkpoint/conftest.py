"""Fixtures of the checkpoint tests: writer processes, a published checkpoint, small file systems of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.reader import Checkpoint
from tests.checkpoint.writers import Writers
from tests.support.checkpoints import make_checkpoint


@pytest.fixture(scope="package")
def writers() -> Iterator[Writers]:
    with Writers() as running:
        yield running


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path / "store")


@pytest.fixture
def memory_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: for many small writes whose syncing tells nothing."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user may enter, which `tmp_path` is not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@dataclass(frozen=True, slots=True)
class Mounted:
    """A file system that lives in the mount namespace of a shell, seen through that process."""

    path: Path
    shell: subprocess.Popen[str]
    mount_point: Path

    def run(self, command: str) -> None:
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        self.shell.stdin.write(f"{command} 2>&1; echo done $?\n")
        self.shell.stdin.flush()
        told = []
        while not (line := self.shell.stdout.readline()).startswith("done ") and line:
            told.append(line)
        if line.strip() != "done 0":
            pytest.skip(f"this machine does not permit `{command}` in a mount namespace: {''.join(told).strip()}")

    def make_read_only(self) -> None:
        self.run(f"mount -o remount,ro '{self.mount_point}'")


Mount = Callable[..., Mounted]


@pytest.fixture
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """Factory `mount(kind, options)`; skips where neither root nor a user namespace may mount."""
    with contextlib.ExitStack() as stack:

        def make(kind: str = "tmpfs", options: str = "size=1m") -> Mounted:
            point = tmp_path_factory.mktemp(kind)
            rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
            command = ["unshare", *rights, "--mount", "sh"]
            try:
                shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            except FileNotFoundError:
                pytest.skip("there is no `unshare` to make a mount namespace with")
            stack.enter_context(shell)
            stack.callback(shell.kill)
            mounted = Mounted(Path(f"/proc/{shell.pid}/root{point}"), shell, point)
            mounted.run(f"mount -t {kind} -o {options} {kind} '{point}'")
            return mounted

        yield make
