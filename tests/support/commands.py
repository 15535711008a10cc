"""The command ``sllm-vllm`` as the tests of its node commands call it: in this process, or as one of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sllm_vllm.cli import main as cli

Run = Callable[..., tuple[int, str, str]]


def command(*arguments: str) -> list[str]:
    """The entry point as a process."""
    return [sys.executable, "-c", "from sllm_vllm.cli.main import main; main()", *arguments]


def caller(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the entry point in this process; gives exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sllm-vllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.run_command()
        captured = capfd.readouterr()
        code = caught.value.code
        return code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err

    return call


def use_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point every command to folders of this test; gives the agent's."""
    monkeypatch.setenv("SLLM_NODE_DIR", str(tmp_path / "node"))
    monkeypatch.setenv("SLLM_STORE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("SLLM_STORE_SOCKET", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path / "node"
