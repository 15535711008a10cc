"""The file that keeps what the estimator has learned across restarts of the router."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.units import MIB

logger = logging.getLogger(__name__)

NBYTES_MAX = 64 * MIB


def read_estimates(path: Path) -> Estimator:
    """An estimator with the valid entries of the file. If the file is missing or can't be read, it knows nothing."""
    try:
        return Estimator.from_record(json.loads(read_plain(path, NBYTES_MAX)))
    except FileNotFoundError:
        return Estimator()
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("event=estimates_lost path=%s reason=%r", path, str(error))
        return Estimator()


def write_record(path: Path, record: dict[str, object]) -> None:
    """Replace the file atomically, readable by this user alone. Any thread may call it, but only one at a time.

    ``record``: the estimator's, made on the loop that owns it.

    Raises:
        OSError: the file can't be written.
    """
    staging = path.with_name(f"{path.name}.{os.getpid()}")
    staging.unlink(missing_ok=True)
    fd = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # No fsync: if a power cut empties the file it counts as missing, and the router learns again.
        with open(fd, "w", encoding="ascii") as file:
            json.dump(record, file)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
