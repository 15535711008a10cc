"""Runs a piece of work so that nothing of it is left behind, however it ends.

The work runs in a child process. The parent only waits, with its signals blocked, for the work's end or for SIGINT,
SIGTERM or SIGHUP at any moment. Then it ends every process that the work started, including orphans, and removes the
work's directories. Linux only. Owns: the layout of the cache directory.

::

    <cache>/            what later runs may use again: random models, bytecode
    <cache>/run-…/      of one run, locked while it runs; if the run was killed, the next run removes it
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
CACHE_DEFAULT = ROOT / ".demo"
STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
GRACE_S = 10.0
"""How long processes have between SIGTERM and SIGKILL."""

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Workspace:
    """Directories for a run to write to. ``cache`` is kept after the run, the others are removed."""

    cache: Path
    run: Path
    """A directory in the cache, for large files."""
    tmp: Path
    """A directory with a short path in the system's temporary directory, for sockets."""


def run_supervised(work: Callable[[Workspace], int], cache: Path) -> int:
    """Do ``work`` in a child process; return its status, or 128 + the number of the signal that ended it.

    This process must not have started any thread yet.
    """
    blocked = STOP_SIGNALS | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    _adopt_orphans()
    with _locked_workspace(cache) as workspace:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _work(work, workspace)
        status = _wait(child)
        _end_all_children()
    if sys.stdout.isatty():
        print("\x1b[?25h", end="", flush=True)  # a killed progress bar leaves the cursor hidden
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    return status


def _work(work: Callable[[Workspace], int], workspace: Workspace) -> NoReturn:
    """The child's body. It may be killed at any moment, so it cleans up nothing."""
    os.setsid()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    status = 1
    try:
        status = work(workspace)
    except BaseException:  # top of a run loop: print the error and turn it into a status
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(status)


def _adopt_orphans() -> None:
    """Make orphaned grandchildren children of this process, so that it can wait for them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _wait(child: int) -> int:
    """Wait until the child ends or a stop signal arrives; reaps other children meanwhile. Returns the exit status."""
    while True:
        number = signal.sigwait(STOP_SIGNALS | {signal.SIGCHLD})
        if number != signal.SIGCHLD:
            print(f"\nstopped by {signal.Signals(number).name}: cleaning up", flush=True)
            return 128 + number
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    return code if code >= 0 else 128 - code


def _end_all_children() -> None:
    """End all descendants of this process and wait for them: first with SIGTERM, then with SIGKILL."""
    deadline_s = time.monotonic() + GRACE_S
    asked: set[int] = set()
    while _reap():
        is_late = time.monotonic() > deadline_s
        for child in _children():
            if is_late or child not in asked:
                asked.add(child)
                _signal_group(child, signal.SIGKILL if is_late else signal.SIGTERM)
        time.sleep(_POLL_S)


def _reap() -> bool:
    """Reap every child that has ended; False if no child is left at all."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _children() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _parent(int(entry)) == os.getpid()]


def _parent(pid: int) -> int | None:
    """Parent of a process, even if it has ended and was not reaped; None if there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(status.rpartition(")")[2].split()[1])


def _signal_group(pid: int, number: int) -> None:
    """Signal a child and its process group, but never our own group."""
    with contextlib.suppress(ProcessLookupError):
        group = os.getpgid(pid)
        if group == os.getpgrp():
            os.kill(pid, number)
        else:
            os.killpg(group, number)


@contextlib.contextmanager
def _locked_workspace(cache: Path) -> Iterator[Workspace]:
    """Make the directories of a run and remove them at the end; also removes those of runs that were killed."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        _remove_abandoned(cache)
        run = Path(tempfile.mkdtemp(prefix="run-", dir=cache))
        lock = (run / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    tmp = Path(tempfile.mkdtemp(prefix="sllm-"))
    try:
        yield Workspace(cache, run, tmp)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)
        lock.close()


def _remove_abandoned(cache: Path) -> None:
    for run in cache.glob("run-*"):
        with contextlib.suppress(OSError), (run / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(run, ignore_errors=True)
