"""Every knob of this package, validated, and the only place that reads the environment. Pure but for that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sllm_vllm.errors import ConfigError
from sllm_vllm.units import GIB, KIB, MIB

CHUNK_NBYTES_DEFAULT = 16 * MIB
CHUNK_NBYTES_MIN = 4 * KIB
CHUNK_NBYTES_MAX = GIB
MANIFEST_NBYTES_MAX = 256 * MIB
HEADER_NBYTES_MAX = 100_000_000
"""Largest header that the safetensors library itself accepts (its ``MAX_HEADER_SIZE``)."""


def default_store_dir() -> Path:
    """Where checkpoints are kept: ``SLLM_STORE_DIR``, else ``sllm-vllm/checkpoints`` in the user's cache."""
    if explicit := os.environ.get("SLLM_STORE_DIR"):
        return Path(explicit).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "sllm-vllm" / "checkpoints"


def child_environment(**overrides: str) -> dict[str, str]:
    """This process's environment for a child, with some variables set."""
    return {**os.environ, **overrides}


class LoaderConfig(BaseModel):
    """What ``--model-loader-extra-config`` may hold with ``--load-format sllm``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store_dir: Path = Field(default_factory=default_store_dir, description="directory that holds the checkpoints")
    threads: int | None = Field(
        default=None, ge=1, le=64, description="threads that read the disk; by itself four, or one a free processor"
    )
    chunk_bytes: int = Field(default=CHUNK_NBYTES_DEFAULT, description="unit of reading; a multiple of 4096")
    verify: Literal["always", "first", "never"] = Field(
        default="first", description="when chunks are held against their checksums: every load, the first one, never"
    )
    write_through: bool = Field(default=True, description="write a checkpoint when there is none")
    report_path: Path | None = Field(default=None, description="file that gets the load report as JSON, one a rank")

    @field_validator("chunk_bytes")
    @classmethod
    def _aligned(cls, value: int) -> int:
        if not CHUNK_NBYTES_MIN <= value <= CHUNK_NBYTES_MAX or value % CHUNK_NBYTES_MIN:
            raise ValueError(f"must be a multiple of 4096 from {CHUNK_NBYTES_MIN} to {CHUNK_NBYTES_MAX}")
        return value

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any] | None) -> LoaderConfig:
        """Validate vLLM's ``model_loader_extra_config``.

        Raises:
            ConfigError: names the first wrong key; for an unknown one, also the known ones.
        """
        try:
            return cls.model_validate(dict(extra or {}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            known = ", ".join(cls.model_fields)
            problem = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
            raise ConfigError(f"--model-loader-extra-config: {key!r}: {problem}; known keys: {known}") from None
