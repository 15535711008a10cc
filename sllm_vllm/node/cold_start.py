"""An engine started by exec. In the new process: ends with the agent, and then becomes ``vllm serve``.

``python -m sllm_vllm.node.cold_start AGENT_PID ARGUMENTS…``. Imports nothing that costs time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def command_of(arguments: Sequence[str]) -> list[str]:
    """The command line of an engine whose parent is this process."""
    return [sys.executable, "-m", "sllm_vllm.node.cold_start", str(os.getpid()), *arguments]


def main(agent: int, arguments: Sequence[str]) -> None:
    """Become ``vllm serve``; the kernel ends this process when the agent ends, also after the exec."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:  # it ended before
        sys.exit(1)
    program = Path(sys.executable).with_name("vllm")
    if program.exists():
        os.execv(program, [str(program), "serve", *arguments])
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
