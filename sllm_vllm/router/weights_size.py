"""The size of a model's weights before it has a checkpoint, from its source files. Blocking: call it in a thread."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_KINDS = ("*.safetensors", "*.bin", "*.pt")
"""vLLM reads only the first of these kinds that exists."""
_CONSOLIDATED = "consolidated"
"""Some sources hold the same weights twice: in files with this prefix and in files without it."""
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin"})


def weights_nbytes(source: Path) -> int:
    """Bytes of the weight files in a directory; 0 if it is not a directory, can't be read, or holds none."""
    if not os.path.isdir(source):  # a Hub name, which saves three searches; also False if the path is too long
        return 0
    for kind in _KINDS:
        try:
            files = [path for path in source.glob(kind) if path.name not in _NO_WEIGHTS]
            nbytes = _total_nbytes([path for path in files if not path.name.startswith(_CONSOLIDATED)] or files)
        except OSError:
            return 0
        if nbytes:
            return nbytes
    return 0


def _total_nbytes(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)
