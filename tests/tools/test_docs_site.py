"""The site's pages: which are copied, and that the environment is made once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tools import docs_site


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be run, in a folder of its own."""
    ran: list[str] = []

    def run(command: Sequence[str | Path], what: str) -> str:
        ran.append(what)
        docs_site.HOME.mkdir(exist_ok=True)
        return ""

    monkeypatch.setattr(docs_site, "HOME", tmp_path / ".docs")
    monkeypatch.setattr(docs_site, "run", run)
    return ran


def test_an_environment_that_is_ready_is_not_made_again(commands: list[str]) -> None:
    first = docs_site.environment()
    assert commands[-1] == "installing MkDocs"
    num = len(commands)
    assert docs_site.environment() == first
    assert len(commands) == num


def test_one_that_was_broken_off_is_made_again(commands: list[str]) -> None:
    docs_site.environment()
    (docs_site.HOME / ".ready").unlink()
    num = len(commands)
    docs_site.environment()
    assert len(commands) == 2 * num


def test_pages_keep_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_site, "PAGES", tmp_path / "pages")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "old.md").touch()
    docs_site.copy_pages()
    copied = {path.relative_to(tmp_path / "pages").as_posix() for path in (tmp_path / "pages").rglob("*.*")}
    assert {"README.md", "docs/security.md", "sllm_vllm/router/DESIGN.md", "docs/images/cold-start.png"} <= copied
    assert "old.md" not in copied
    assert not any(name.endswith(".py") for name in copied)
