"""Options that vLLM does not know are found from its source code; those of its own parser are all known."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

from sllm_vllm.node.vllm_options import unknown_options
from tests.support.cases import every_case


def test_every_option_of_vllms_parser_is_known() -> None:
    parsers = importlib.import_module("vllm.utils.argparse_utils")
    try:
        serve = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    except ModuleNotFoundError:
        serve = importlib.import_module("vllm.entrypoints.openai.cli_args")
    parser = serve.make_arg_parser(parsers.FlexibleArgumentParser())
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    assert len(options) > 100
    assert list(unknown_options(options)) == []


@every_case(
    "argument, found",
    [
        ("--max-model-len=5", None),
        ("--max_model_len", None),
        ("--no-enable-prefix-caching", None),
        ("--max-model-le", None),
        ("--compilation-config.mode=3", None),
        ("-tp", None),
        ("512", None),
        ("--max-modle-len", ("--max-modle-len", "--max-model-len")),
        ("--enfore-eager=1", ("--enfore-eager", "--enforce-eager")),
        ("--xyzzy", ("--xyzzy", None)),
    ],
)
def test_one_option(argument: str, found: tuple[str, str | None] | None) -> None:
    assert list(unknown_options([argument])) == ([] if found is None else [found])


def test_vllm_is_not_imported() -> None:
    code = (
        "import sys; from sllm_vllm.node.vllm_options import unknown_options as u; "
        "print(list(u(['--xyzzy'])), 'vllm' in sys.modules, 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "[('--xyzzy', None)] False False\n"


def test_nothing_is_told_of_a_vllm_that_cannot_be_parsed(tmp_path: Path) -> None:
    (tmp_path / "vllm" / "config").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "config" / "model.py").write_text("class A:\n    a: int\n")
    (tmp_path / "vllm" / "config" / "later.py").write_text("a new syntax\n")
    code = "from sllm_vllm.node.vllm_options import unknown_options as u; print(list(u(['--xyzzy'])))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))}
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert told == "[]\n"
    (tmp_path / "vllm" / "config" / "later.py").unlink()
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert told == "[('--xyzzy', None)]\n"
