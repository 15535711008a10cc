"""Every command's help, its options, and what the guide says of commands: walked, so that none is forgotten."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sllm_vllm import __version__
from sllm_vllm.cli import main as cli
from tests.support.cases import every_case
from tests.support.commands import Run, caller, command
from tests.support.waiting import DEADLINE_S

GUIDE = "\n".join(
    page.read_text() for page in sorted((Path(__file__).resolve().parents[2] / "docs" / "guide").glob("*.md"))
)
ROOT: Any = typer.main.get_command(cli.app)
_ROW = re.compile(r"^\| (`.*?) \| .* \|$", re.MULTILINE)


def walk(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group, with the words that call it."""
    yield path, group
    for name, found in getattr(group, "commands", {}).items():
        yield from walk(found, *path, name)


ALL = dict(walk(ROOT))
each_command = every_case("path", ALL)


def options_of(path: tuple[str, ...]) -> set[str]:
    return {name for parameter in ALL[path].params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "80")
    return caller(capfd, monkeypatch)


# ---------------------------------------------------------------------------------------------------------------- help


@each_command
def test_help_is_printed_whole(run: Run, path: tuple[str, ...]) -> None:
    """Markup in it is an error, or silently lost: what is in brackets has to be there."""
    code, out, err = run(*path, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    printed = re.sub(r"\s+", "", out)
    for parameter in ALL[path].params:
        for text in (getattr(parameter, "help", None), parameter.metavar):
            assert re.sub(r"\s+", "", text or "") in printed
    described = out.partition("Commands:")[2].splitlines()
    assert [line for line in described if line.endswith("...")] == [], "a command's first sentence is too long"


def test_help_of_a_process() -> None:
    done = subprocess.run(command("pull", "--help"), capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "hf://org/name[@revision][/NAME]" in re.sub(r"\s+", "", done.stdout)


@pytest.mark.parametrize("word", ["[red]", "[/]", "[/NAME]", ":smile:", "[link=x]y"])
def test_what_was_typed_is_repeated_as_it_was(run: Run, tmp_path: Path, word: str) -> None:
    code, out, err = run(word)
    assert (code, out) == (2, "")
    assert f"No such command '{word}'" in err
    option = f"--{word}".partition("=")[0]
    assert f"No such option: {option}" in run("list", f"--{word}")[2].replace("\n", "")
    code, _, err = run("inspect", tmp_path / word)
    assert (code, str(tmp_path / word) in err) == (1, True)


def test_a_folder_whose_name_is_markup_is_a_title(run: Run, tmp_path: Path) -> None:
    from sllm_vllm.cli.output import print_table

    print_table("[red]a[/]", [{"[b]": "[/b]"}, {"[b]": "\x1b[1mno\nline"}])
    assert capture(run) == "[red]a[/]\n[b]\n[/b]\n?[1mno line\n"


def capture(run: Run) -> str:
    """What was printed before an empty call."""
    return run("--version")[1].rpartition("sllm-vllm ")[0]


def test_the_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert (code, out.count("\n")) == (0, 1)
    assert out.startswith(f"sllm-vllm {__version__} (")
    assert f"Python {sys.version.split()[0]}" in out


def test_a_shell_completes_commands_and_options() -> None:
    for words, expected in (
        ("dep", "deploy"),
        ("store st", "status"),
        ("ps --js", "--json"),
    ):
        variables = {"COMP_WORDS": f"sllm-vllm {words}", "COMP_CWORD": str(len(words.split()))}
        environment = os.environ | {"_SLLM_VLLM_COMPLETE": "complete_bash"} | variables
        script = Path(sys.executable).with_name("sllm-vllm")
        done = subprocess.run(
            [script], env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert expected in done.stdout.split()


# --------------------------------------------------------------------------------------------------------------- guide


def rows() -> list[tuple[tuple[str, ...], str]]:
    """Each command of the guide's tables, with what stands after it in its cell."""
    found = []
    for cell in _ROW.findall(GUIDE):
        for usage in re.findall(r"`([^`]+)`", cell):
            words = usage.replace("\\|", "|").removeprefix("sllm-vllm ").split()
            if (words[0],) not in ALL:
                continue
            depth = 2 if "commands" in vars(ALL[words[0],]) else 1
            *group, names = words[:depth]
            found += [((*group, name), " ".join(words[depth:])) for name in names.split("|")]
    return found


def test_guide_names_commands_and_options_that_exist() -> None:
    found = rows()
    assert len(found) > 30
    for path, usage in found:
        assert path in ALL
        assert set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", usage)) - options_of(path) == set(), path


def test_every_command_is_in_the_guide() -> None:
    leaves = {path for path, found in ALL.items() if "commands" not in vars(found)}
    assert leaves - {path for path, _ in rows()} == set()


def test_guide_says_which_commands_print_json() -> None:
    said = re.search(r"^Every command takes `--json` but (.*)\.$", GUIDE, re.MULTILINE)
    assert said is not None
    excepted = {tuple(words.split()) for words in re.findall(r"`([^`]+)`", said[1])}
    leaves = {path for path, found in ALL.items() if "commands" not in vars(found)}
    assert {path for path in leaves if "--json" not in options_of(path)} == excepted
