"""Lists phrases that this project's prose does without: they are vague, or word-for-word translations.

Read are the package, its tools and benchmarks, configurations and all Markdown files, whole lines at a time, also what
is code. Standard library only.

    python3 tools/prose.py      print each place; exits with 1 if there is one
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHRASES = (
    "are told of",
    "by itself",
    "by themselves",
    "comes free",
    "for ever",
    "is told of",
    "mended",
    "nobody",
    "so many",
    "somebody",
    "the mend",
    "whoever",
)
"""Say *default*, *fix*, *reported*, *no one*, *as many*, or what is meant instead."""
PATTERN = re.compile(rf"\b({'|'.join(map(re.escape, PHRASES))})\b", re.IGNORECASE)
WHERE = ("*.md", "configs/*", "sllm_vllm/*.py", "benchmarks/*.py", "tools/*.py")


def main() -> int:
    """Print what is found; 1 if anything is."""
    found = list(places())
    print("\n".join(found) or "prose: no phrase of the list")
    return 1 if found else 0


def places() -> Iterator[str]:
    """Each place, as ``path:line: phrase``."""
    listed = subprocess.run(["git", "ls-files", "-z", *WHERE], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if ROOT / name != Path(__file__).resolve():
            yield from found_in(name, (ROOT / name).read_text(errors="replace"))


def found_in(name: str, text: str) -> Iterator[str]:
    """The phrases in one file's text."""
    for number, line in enumerate(text.splitlines(), 1):
        yield from (f"{name}:{number}: {match[0]!r}" for match in PATTERN.finditer(line))


if __name__ == "__main__":
    sys.exit(main())
