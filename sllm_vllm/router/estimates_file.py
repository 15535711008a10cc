"""What the estimator has learned, kept in a file from one life of the router to the next."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from sllm_vllm.plain_file import read_plain
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.units import MIB

logger = logging.getLogger(__name__)

NBYTES_MAX = 64 * MIB


def read_estimates(path: Path) -> Estimator:
    """One that knows what is sound in the file. Without a file, or with one that can't be read, it knows nothing."""
    try:
        return Estimator.from_record(json.loads(read_plain(path, NBYTES_MAX)))
    except FileNotFoundError:
        return Estimator()
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("event=estimates_lost path=%s reason=%r", path, str(error))
        return Estimator()


def write_estimates(path: Path, estimator: Estimator) -> None:
    """Replace the file, whole or not at all, readable by this user alone. For the loop that owns the estimator.

    Raises:
        OSError: it can't be written.
    """
    write_record(path, estimator.to_record())


def write_record(path: Path, record: dict[str, object]) -> None:
    """The half of ``write_estimates`` that touches the disk alone, for any thread; one at a time.

    Raises:
        OSError: it can't be written.
    """
    staging = path.with_name(f"{path.name}.{os.getpid()}")
    staging.unlink(missing_ok=True)
    fd = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Not synced: a file that a power cut emptied is read as none, and the router learns anew.
        with open(fd, "w", encoding="ascii") as file:
            json.dump(record, file)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
