"""How large a model's weights are before there is a checkpoint of it: its source's own files. Blocking: for threads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_KINDS = ("*.safetensors", "*.bin", "*.pt")
"""vLLM reads the first of these kinds that there is."""
_CONSOLIDATED = "consolidated"
"""Some sources hold the same weights twice, as files that begin so and as files that do not."""
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin"})


def weights_nbytes(source: Path) -> int:
    """Bytes of the weight files in a directory; 0 if it is none, can't be read, or holds none."""
    if not os.path.isdir(source):  # a name of the Hub: three searches less; a path that is too long is none either
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
