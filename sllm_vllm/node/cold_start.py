"""Starts an engine by exec. Runs in the new process: ties it to the agent's life, then becomes ``vllm serve``.

``python -m sllm_vllm.node.cold_start AGENT_PID DIRECTORY CPUS PROGRAM ARGUMENTS…``. Imports nothing that takes time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def serve_command() -> tuple[str, ...]:
    """``vllm serve`` of the vLLM that is installed beside this Python."""
    program = Path(sys.executable).with_name("vllm")
    if program.exists():
        return (str(program), "serve")
    return (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")


def command_of(command: Sequence[str], directory: str, cpus: Sequence[int]) -> list[str]:
    """The command line of an engine whose parent is this process.

    Args:
        command: program and arguments.
        cpus: where it may run; empty for everywhere.
    """
    words = (str(os.getpid()), directory, ",".join(map(str, cpus)))
    return [sys.executable, "-m", "sllm_vllm.node.cold_start", *words, *command]


def main(agent: int, directory: str, cpus: str, *, command: list[str]) -> None:
    """Become ``command``; the kernel ends this process when the agent ends, also after the exec."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:  # the agent ended before the call above
        sys.exit(1)
    if cpus:
        os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
    try:
        os.chdir(directory)
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{error.filename or command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], command=sys.argv[4:])
