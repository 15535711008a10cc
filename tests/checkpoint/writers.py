"""Writers in processes of their own, which may kill themselves at any step. Torch-free, so a fork is cheap and safe.

`python -m tests.checkpoint.writers` serves: a JSON list of jobs a line on stdin, their outcomes a line on stdout. The
jobs of one line are forked at once and start together.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Self

from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.errors import WriteError
from tests.support.checkpoints import CHUNK_NBYTES, make_key, write_rank
from tests.support.waiting import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("open", "pwrite", "fsync", "rename", "mkdir", "unlink", "rmdir")


@dataclass(frozen=True, slots=True)
class Job:
    """Write one rank below `root`; with `dies_at`, be killed in place of that file-system step, counted from 0."""

    root: str
    rank: int = 0
    num_partitions: int = 1
    dies_at: int | None = None
    tears: bool = False
    """A `pwrite` that it dies at is done by half."""
    action: str = "write"


class Writers:
    """The serving process. A context manager; one caller."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.checkpoint.writers"]
        self._server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        with self._server:
            assert self._server.stdin is not None
            self._server.stdin.close()

    def run(self, *jobs: Job) -> list[str]:
        """Run jobs at once. Each outcome: published, recorded, busy, killed, `steps N`, or the error."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([asdict(job) for job in jobs]) + "\n")
        self._server.stdin.flush()
        outcomes: list[str] = json.loads(self._server.stdout.readline())
        return outcomes


def serve() -> None:
    """Answer until stdin ends."""
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        jobs = [Job(**value) for value in json.loads(line)]
        barrier = context.Barrier(len(jobs), timeout=DEADLINE_S)
        pipes = [context.Pipe(duplex=False) for _ in jobs]
        children = [
            context.Process(target=_child, args=(job, barrier, sender))
            for job, (_, sender) in zip(jobs, pipes, strict=True)
        ]
        for child, (_, sender) in zip(children, pipes, strict=True):
            child.start()
            sender.close()
        outcomes = [_outcome(receiver) for receiver, _ in pipes]
        for child in children:
            child.join()
        print(json.dumps(outcomes), flush=True)


def _outcome(receiver: Connection) -> str:
    with receiver:
        try:
            return str(receiver.recv())
        except EOFError:
            return "killed"


def _child(job: Job, barrier: Barrier, sender: Connection) -> None:
    steps = _Steps(job)
    barrier.wait()
    steps.watch()
    try:
        outcome = ACTIONS[job.action](job)
    except WriteError as error:
        outcome = f"{type(error).__name__}: {error}"
    sender.send(f"steps {steps.num_done}" if job.action == "count" else outcome)


def _write(job: Job) -> str:
    published = write_rank(Path(job.root), make_key(job.num_partitions), job.rank)
    return "published" if published else "recorded"


def _set_aside(job: Job) -> str:
    return str(CheckpointRepository(Path(job.root)).set_aside(make_key(job.num_partitions).name))


def _remove(job: Job) -> str:
    return str(CheckpointRepository(Path(job.root)).remove(make_key(job.num_partitions).name))


def _die_with_lock(job: Job) -> str:
    staging = CheckpointRepository(Path(job.root)).stage(make_key(job.num_partitions), CHUNK_NBYTES)
    with staging.writer(job.rank):
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


ACTIONS: dict[str, Callable[[Job], str]] = {
    "write": _write,
    "count": _write,
    "set_aside": _set_aside,
    "remove": _remove,
    "die_with_lock": _die_with_lock,
}


class _Steps:
    """Counts the file-system steps of this process, and ends it at one of them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.num_done = 0

    def watch(self) -> None:
        for name in STEPS:
            setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.num_done == self._job.dies_at:
                if self._job.tears and step.__name__ == "pwrite":
                    fd, data, offset = args
                    step(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            self.num_done += 1
            return step(*args, **kwargs)

        return watched


if __name__ == "__main__":
    serve()
