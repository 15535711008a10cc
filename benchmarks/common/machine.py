"""What a run's results say about the machine that they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sllm_vllm.config import child_environment

TOLD_VARIABLES = ("OMP_", "KMP_", "GOMP_", "HF_HUB_", "VLLM_")
"""Prefixes of the variables that a run's results show."""


def machine(environment: Mapping[str, str] | None = None, **settings: object) -> dict[str, Any]:
    """Return the machine and the settings of a measurement, for a line of JSON.

    Args:
        environment: of the measured processes; default: the one that children of this process get.
    """
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    variables = child_environment() if environment is None else environment
    return {
        "kind": "machine",
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cpu": names[0] if names else platform.machine(),
        "cuda": has_cuda(),
        "versions": {name: installed(name) for name in ("vllm", "torch", "safetensors", "runai-model-streamer")},
        "python": platform.python_version(),
        "kernel": platform.release(),
        "environment": {name: value for name, value in variables.items() if name.startswith(TOLD_VARIABLES)},
        **settings,
    }


def installed(name: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def has_cuda() -> bool:
    """Whether there is an NVIDIA device. Does not import torch, which would start threads."""
    return Path("/proc/driver/nvidia/version").exists()
