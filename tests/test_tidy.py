"""The house rules that ruff, mypy and import-linter do not know: sizes, names, what has one place alone."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 60
ARGUMENTS_MAX = 6
UNDECIDED_NAMES = {"utils.py", "common.py", "helpers.py", "base.py", "manager.py"}
RUN_LOOP_MARK = "# top of a run loop"
EDGES = {
    "vllm": re.compile(r"sllm_vllm/(loader/(vllm_\w+|convert)|node/warm_parent|engine/\w+)\.py"),
    "ray": re.compile(r"sllm_vllm/(node|router)/ray_\w+\.py"),
}
"""Where alone each of them is imported."""

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|work|opt/wheels|home/\w+|Users/\w+)/")
REGISTRY_HOST = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


SOURCES = python_files("sllm_vllm", "tools", "benchmarks")
EVERYTHING = SOURCES + python_files("tests")
each_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)
each_file = pytest.mark.parametrize("path", EVERYTHING, ids=name_of)


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(), name_of(path)))


def functions(path: Path) -> Iterator[Function]:
    return (node for node in nodes(path) if isinstance(node, Function))


def num_arguments(function: Function) -> int:
    """All it takes, but for `self` and `cls`."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    extra = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return len([name for name in names if name not in {"self", "cls"}]) + len(extra)


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, wherever in it."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def hides_errors(handler: ast.ExceptHandler) -> bool:
    """Whether it catches everything and does not end by raising it again."""
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    is_broad = any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"}) for kind in caught
    )
    last = handler.body[-1]
    return is_broad and not (isinstance(last, ast.Raise) and last.exc is None)


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


@each_file
def test_file_is_short_enough(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES_MAX


@each_file
def test_functions_are_short_enough(path: Path) -> None:
    lines = {f"{name_of(path)}:{f.lineno} {f.name}": (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions(path)}
    assert {name: num for name, num in lines.items() if num > FUNCTION_LINES_MAX} == {}


@each_source
def test_functions_take_few_arguments(path: Path) -> None:
    counts = {f"{name_of(path)}:{f.lineno} {f.name}": num_arguments(f) for f in functions(path)}
    assert {name: num for name, num in counts.items() if num > ARGUMENTS_MAX} == {}


@each_source
def test_file_name_says_what_is_in_it(path: Path) -> None:
    assert path.name not in UNDECIDED_NAMES


@each_file
def test_module_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree)


@each_source
def test_environment_is_read_in_config_alone(path: Path) -> None:
    if name_of(path) == "sllm_vllm/config.py":
        return
    names = {"environ", "environb", "getenv", "getenvb"}
    uses = [node.lineno for node in nodes(path) if isinstance(node, ast.Attribute) and node.attr in names]
    imports = [node.lineno for node in nodes(path) if isinstance(node, ast.alias) and node.name in names]
    assert uses + imports == [], f"lines of {name_of(path)}"


@each_source
def test_no_handler_hides_every_error(path: Path) -> None:
    lines = path.read_text().splitlines()
    handlers = [node for node in nodes(path) if isinstance(node, ast.ExceptHandler) and hides_errors(node)]
    assert [f"{name_of(path)}:{h.lineno}" for h in handlers if RUN_LOOP_MARK not in lines[h.lineno - 1]] == []


@pytest.mark.parametrize("package", EDGES)
@each_source
def test_vllm_and_ray_are_imported_at_the_edge_alone(path: Path, package: str) -> None:
    if name_of(path).startswith("sllm_vllm/") and not EDGES[package].fullmatch(name_of(path)):
        assert package not in imported(path)


@each_file
def test_todo_has_a_home_in_the_changelog(path: Path) -> None:
    """A note is written TODO(title), and the title stands in CHANGELOG.md under "Known gaps"."""
    gaps = (ROOT / "CHANGELOG.md").read_text().partition("Known gaps")[2]
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX)\b", token.string):
            title = re.search(r"TODO\((.+?)\)", token.string)
            assert title is not None, f"{name_of(path)}:{token.start[0]}: {token.string}"
            assert title[1] in gaps, f"{name_of(path)}:{token.start[0]}: no known gap called {title[1]!r}"


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
