"""The house rules that ruff, mypy and import-linter do not know: sizes, names, what has one place alone."""

from __future__ import annotations

import ast
import functools
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cases import every_case

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 60
ARGUMENTS_MAX = 6
UNDECIDED_NAMES = {"utils.py", "common.py", "helpers.py", "base.py", "manager.py"}
RUN_LOOP_MARK = "# top of a run loop"
EDGES = {
    "vllm": re.compile(r"sllm_vllm/(loader/vllm/\w+|convert/rank|node/warm_parent|engine/\w+)\.py"),
    "ray": re.compile(r"sllm_vllm/ray/\w+\.py"),
}
"""Where alone each of them is imported."""

NOTE = re.compile(r"\b(TODO|FIXME|XXX)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|work|opt/wheels|home/\w+|Users/\w+)/")
REGISTRY_HOST = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


SOURCES = python_files("sllm_vllm", "tools", "benchmarks")
EVERYTHING = SOURCES + python_files("tests")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules ask of one file. Lines are numbered from 1."""

    num_lines: int
    has_docstring: bool
    function_lines: dict[str, int]
    """By place and name, how many lines a function has."""
    function_arguments: dict[str, int]
    """By place and name, how many arguments it takes, but for `self` and `cls`."""
    imported: frozenset[str]
    """Top-level names of what it imports, wherever in it."""
    environment_lines: tuple[int, ...]
    broad_handlers: tuple[int, ...]
    """Lines of handlers that catch everything and do not end by raising it again."""
    notes: tuple[tuple[int, str], ...]
    """Comments with TODO and the like."""


@functools.cache
def facts(path: Path) -> Facts:
    """One parse serves all tests of a process."""
    text = path.read_text()
    tree = ast.parse(text, name_of(path))
    nodes = list(ast.walk(tree))
    functions = {f"{name_of(path)}:{f.lineno} {f.name}": f for f in nodes if isinstance(f, Function)}
    return Facts(
        num_lines=len(text.splitlines()),
        has_docstring=not tree.body or ast.get_docstring(tree) is not None,
        function_lines={name: (f.end_lineno or f.lineno) - f.lineno + 1 for name, f in functions.items()},
        function_arguments={name: num_arguments(f) for name, f in functions.items()},
        imported=frozenset(imported(nodes)),
        environment_lines=tuple(environment_lines(nodes)),
        broad_handlers=tuple(h.lineno for h in nodes if isinstance(h, ast.ExceptHandler) and hides_errors(h)),
        notes=tuple(notes_of(text)),
    )


def num_arguments(function: Function) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    extra = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return len([name for name in names if name not in {"self", "cls"}]) + len(extra)


def imported(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def environment_lines(nodes: list[ast.AST]) -> Iterator[int]:
    names = {"environ", "environb", "getenv", "getenvb"}
    for node in nodes:
        if (isinstance(node, ast.Attribute) and node.attr in names) or (
            isinstance(node, ast.alias) and node.name in names
        ):
            yield node.lineno


def hides_errors(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    is_broad = any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"}) for kind in caught
    )
    last = handler.body[-1]
    return is_broad and not (isinstance(last, ast.Raise) and last.exc is None)


def notes_of(text: str) -> Iterator[tuple[int, str]]:
    if NOTE.search(text):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and NOTE.search(token.string):
                yield token.start[0], token.string


def project_files() -> list[Path]:
    """What git tracks or would track; skips the test outside a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in project_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


def test_files_are_short_enough() -> None:
    lines = {name_of(path): facts(path).num_lines for path in EVERYTHING}
    assert {name: num for name, num in lines.items() if num > FILE_LINES_MAX} == {}


def test_functions_are_short_enough() -> None:
    lines = {name: num for path in EVERYTHING for name, num in facts(path).function_lines.items()}
    assert len(lines) > 1000
    assert {name: num for name, num in lines.items() if num > FUNCTION_LINES_MAX} == {}


def test_functions_take_few_arguments() -> None:
    counts = {name: num for path in SOURCES for name, num in facts(path).function_arguments.items()}
    assert {name: num for name, num in counts.items() if num > ARGUMENTS_MAX} == {}


def test_file_names_say_what_is_in_them() -> None:
    assert [name_of(path) for path in SOURCES if path.name in UNDECIDED_NAMES] == []


def test_modules_have_docstrings() -> None:
    assert [name_of(path) for path in EVERYTHING if not facts(path).has_docstring] == []


def test_environment_is_read_in_config_alone() -> None:
    uses = {name_of(path): facts(path).environment_lines for path in SOURCES}
    assert uses.pop("sllm_vllm/config.py")
    assert {name: lines for name, lines in uses.items() if lines} == {}


def test_no_handler_hides_every_error() -> None:
    hidden = []
    for path in SOURCES:
        lines = path.read_text().splitlines() if facts(path).broad_handlers else []
        hidden += [f"{name_of(path)}:{n}" for n in facts(path).broad_handlers if RUN_LOOP_MARK not in lines[n - 1]]
    assert hidden == []


@every_case("package", EDGES)
def test_vllm_and_ray_are_imported_at_the_edge_alone(package: str) -> None:
    users = [name_of(path) for path in SOURCES if package in facts(path).imported]
    ours = [name for name in users if name.startswith("sllm_vllm/")]
    assert ours != []
    assert [name for name in ours if not EDGES[package].fullmatch(name)] == []


def test_todos_have_a_home_in_the_changelog() -> None:
    """A note is written TODO(title), and the title stands in CHANGELOG.md under "Known gaps"."""
    gaps = (ROOT / "CHANGELOG.md").read_text().partition("Known gaps")[2]
    for path in EVERYTHING:
        for line, comment in facts(path).notes:
            title = re.search(r"TODO\((.+?)\)", comment)
            assert title is not None, f"{name_of(path)}:{line}: {comment}"
            assert title[1] in gaps, f"{name_of(path)}:{line}: no known gap called {title[1]!r}"


def test_no_path_of_one_machine() -> None:
    assert lines_matching(MACHINE_PATH) == []


def test_no_host_name_of_a_package_registry() -> None:
    assert lines_matching(REGISTRY_HOST) == []


def test_import_of_the_package_loads_nothing_else() -> None:
    """Neither torch nor vLLM nor Ray, nor any other package: only the standard library, so it takes milliseconds."""
    script = "import json, sys; old = set(sys.modules); import sllm_vllm; print(json.dumps([*set(sys.modules) - old]))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert loaded - set(sys.stdlib_module_names) == {"sllm_vllm"}
