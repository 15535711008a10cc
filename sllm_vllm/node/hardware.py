"""Detects this machine's resources for engines: GPUs as nvidia-smi lists them, processors, memory. Changes nothing."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from sllm_vllm.errors import ConfigError
from sllm_vllm.node.core.launch import Gpu, Hardware
from sllm_vllm.node.orphans import all_processes
from sllm_vllm.units import KIB, MIB

# Memory use of an engine: the proportional set sizes of its processes, read from the system. A page that several
# processes have mapped counts in equal parts for each, so that the sizes of forked engines, which share most of their
# pages, can be added up. Blocking, milliseconds for each process: called in a thread.


_PSS = b"\nPss:"


def pss_nbytes(pid: int) -> int | None:
    """A process's proportional share of memory; None if it is gone or belongs to another user."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            rest = file.read().partition(_PSS)[2]
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
    # A process that has ended but is not reaped has no lines.
    return int(rest.split(maxsplit=1)[0]) * KIB if rest else None


def session_pss_nbytes(leader: int) -> int:
    """The sum over a session's processes; 0 if none lives.

    Args:
        leader: the process that made the session; it may have ended.
    """
    pids = [process.pid for process in all_processes() if process.session == leader and not process.is_ended]
    return sum(pss_nbytes(pid) or 0 for pid in pids)


logger = logging.getLogger(__name__)

FREE_SHARE = 0.9
"""Share of the memory available at the agent's start that engines may use."""
_QUERY_S_MAX = 20.0
_CGROUP = Path("/sys/fs/cgroup")


def detect_hardware(
    gpus: Sequence[str] | None,
    memory_nbytes: int | None,
    visible: str | None,
    *,
    environment: Mapping[str, str] | None = None,
) -> Hardware:
    """Detect what engines may use. Blocking.

    Args:
        gpus: the only indices or UUIDs that may be used; None for all; empty for none.
        memory_nbytes: for engines on the CPU; None for most of what is available now.
        visible: the value of CUDA_VISIBLE_DEVICES, which limits the choice, too.
        environment: of nvidia-smi; None for this process's own.

    Raises:
        ConfigError: a GPU that was named is not there.
    """
    found: list[tuple[int, Gpu]] = []
    if gpus is None or gpus:
        found = _gpus(environment)
        for names in (visible.split(",") if visible is not None else None, gpus):
            found = found if names is None else _find_all(names, found)
    return Hardware(
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        memory_nbytes=memory_nbytes or int(available_nbytes() * FREE_SHARE),
        gpus=tuple(gpu for _, gpu in found),
    )


def available_nbytes() -> int:
    """Memory available without pushing out other processes: the machine's, or the rest of this control group's limit
    if that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    facts = {name: int(rest.split()[0]) * KIB for name, _, rest in (line.partition(":") for line in lines)}
    available = facts["MemAvailable"]
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        available = min(available, limit - int((_CGROUP / "memory.current").read_text()))
    return max(available, MIB)


def _find_all(names: Sequence[str], gpus: Sequence[tuple[int, Gpu]]) -> list[tuple[int, Gpu]]:
    """The named GPUs, each once; as in CUDA, an empty name or -1 ends the list."""
    wanted = itertools.takewhile(lambda name: name not in {"", "-1"}, (name.strip() for name in names))
    return list(dict.fromkeys(_find(name, gpus) for name in wanted))


def _find(name: str, gpus: Sequence[tuple[int, Gpu]]) -> tuple[int, Gpu]:
    for index, gpu in gpus:
        if name == str(index) or gpu.id.startswith(name):
            return index, gpu
    raise ConfigError(f"there is no GPU {name!r}; nvidia-smi lists {len(gpus)}")


def _gpus(environment: Mapping[str, str] | None) -> list[tuple[int, Gpu]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_QUERY_S_MAX, check=True, env=environment
        )
        return [parse_gpu(line) for line in answer.stdout.splitlines() if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.warning("event=no_gpus reason=%r", str(error))
        return []


def parse_gpu(line: str) -> tuple[int, Gpu]:
    """Parse a line ``0, GPU-1b2c…, 143771`` (MiB) into index and GPU; a GPU that shares the machine's memory has no
    number."""
    index, uuid, total = (part.strip() for part in line.split(","))
    return int(index), Gpu(id=uuid, nbytes=int(total) * MIB if total.isdecimal() else 0)
