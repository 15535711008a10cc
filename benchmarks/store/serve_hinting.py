"""``vllm`` with or without the plugin's hint to the store's daemon.

Run it as ``python -m benchmarks.store.serve_hinting yes|no serve …``. Both variants start in the same way, so that only
the hint makes a difference.
"""

from __future__ import annotations

import sys
from pathlib import Path


def keep_silent(path: Path, model: str, tensor_parallel_size: int | None) -> bool:
    """Replaces ``send_hint`` and sends nothing."""
    return False


def main() -> None:
    """Command line. Removes its own argument, since the plugin guesses the model from ``sys.argv``."""
    word = sys.argv.pop(1)
    if word not in {"yes", "no"}:
        raise SystemExit("give yes or no first")
    if word == "no":
        from sllm_vllm.store import channel

        channel.send_hint = keep_silent
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
