"""Reads the file that ``--config`` names in an engine's arguments, as vLLM does. Blocking, and bounded."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from sllm_vllm.errors import ConfigError
from sllm_vllm.node.core.launch import config_path_of, with_config

CONFIG_NBYTES_MAX = 1 << 20


def expand_config(arguments: Sequence[str], directory: Path | str) -> tuple[str, ...]:
    """Expand arguments with those of their configuration file; returns them unchanged if they name none.

    Args:
        directory: the engine's working directory.

    Raises:
        ConfigError: vLLM would not accept the file.
    """
    name = config_path_of(arguments)
    if name is None:
        return tuple(arguments)
    if not name.endswith((".yaml", ".yml")):
        raise ConfigError(f"--config {name}: vLLM reads only .yaml and .yml files")
    try:
        values = yaml.safe_load(_read(Path(directory, name)))
    except OSError as error:
        raise ConfigError(f"--config {name}: it can't be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--config {name}: it is not valid YAML") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {name}: must be a mapping of options")
    return with_config(arguments, values)


def _read(path: Path) -> bytes:
    """Read a regular file; a FIFO or a device is refused without waiting for it."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(0, "it is not a regular file")
        data = file.read(CONFIG_NBYTES_MAX + 1)
    if len(data) > CONFIG_NBYTES_MAX:
        raise OSError(0, f"it is larger than {CONFIG_NBYTES_MAX} bytes")
    return data
