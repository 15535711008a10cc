"""Builds the documentation as a site in `build/site`, for `make docs`. A dead link or a page outside the nav fails.

Markdown files are spread over the repository, and MkDocs reads one folder. So they are copied to `build/docs`, each to
its own path: every relative link then works on the site as it does in the repository. MkDocs has an environment of its
own, `.docs`. Standard library only.

    python3 -m tools.docs_site
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tools.setup_env import ROOT, SetupError, exclusive, run

HOME = ROOT / ".docs"
REQUIREMENTS = ROOT / "tools" / "requirements-docs.txt"
PAGES = ROOT / "build" / "docs"
_NO_ADVERTISEMENT = "NO_MKDOCS_2_WARNING"
"""The theme prints a page about its successor unless this variable is set."""
WHERE = ("*.md", "docs/*", "configs/*", "benchmarks/results/*", "LICENSE")
"""What is copied: the pages, and the files that they link to."""


def main() -> int:
    """Build the site; return the exit status."""
    try:
        with exclusive():
            python = environment()
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    copy_pages()
    # -I keeps the repository's own folders out of what MkDocs imports. Not --quiet: then it would not count warnings.
    command = ["/usr/bin/env", f"{_NO_ADVERTISEMENT}=1", str(python), "-I", "-m", "mkdocs", "build"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def environment() -> Path:
    """Return the Python that has MkDocs; makes its environment if that is missing, incomplete or out of date."""
    python, ready = HOME / "bin" / "python", HOME / ".ready"
    stamp = f"{HOME} {sys.version_info[:2]}\n{REQUIREMENTS.read_text()}"
    if ready.exists() and ready.read_text() == stamp:
        return python
    shutil.rmtree(HOME, ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", HOME], f"making {HOME}")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--requirement", str(REQUIREMENTS)], "installing MkDocs")
    ready.write_text(stamp)
    return python


def copy_pages() -> None:
    """Copy all pages of the working tree, committed or not, in place of those of the last build."""
    shutil.rmtree(PAGES, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *WHERE]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, PAGES / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


if __name__ == "__main__":
    raise SystemExit(main())
