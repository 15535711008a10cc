"""Every mistake of a configuration at once: with its key and line, on this machine, and by every way in."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from sllm_vllm.errors import ConfigError
from sllm_vllm.node.core.launch import Gpu, Hardware
from sllm_vllm.router.config import places as config_places
from sllm_vllm.router.config.file import check_router_config
from sllm_vllm.router.config.places import check_on_this_machine, read_checked_config, require_model
from sllm_vllm.router.config.problems import InvalidConfig
from sllm_vllm.router.config.sections import ModelConfig, NodeSection
from sllm_vllm.units import GIB
from tests.support.cases import every_case
from tests.support.commands import Run, caller

FILE = """\
servr: {}
server:
  port: "80"
node:
  slots: 2
  slots: 3
keys:
  clients:
  - env: SLLM_TEST_KEY
  - fil: /x
defaults:
  queue_timout: 5
models:
- name: a
  keep_alive: soon
  source: ./lama
  min_replicas: 4
  max_replicas: 1
  engine_arguments:
    port: 8000
    max model len: 1
- name: a
  source: org/x
- name: b
  accelerators: 8
  environment: {VLLM_API_KEY: x, A: [], B: c}
"""
JSON_FILE = """{
 "models": [
  {"name": "a"},
  {"name": "b",
   "keep_alive": "x",
   "engine_arguments":
    ["--seed=1",
     "--port=1"]}
 ],
 "servr": 1
}"""
EXPECTED = {
    (1, "servr"): "unknown key; did you mean `server`?",
    (3, "server.port"): "must be a whole number",
    (6, "node.slots"): "duplicate key 'slots'",
    (9, "keys.clients[0]"): "SLLM_TEST_KEY is empty or not set; it must hold a key",
    (10, "keys.clients[1].fil"): "unknown key; did you mean `file`?",
    (12, "defaults.queue_timout"): "unknown key; did you mean `queue_timeout`?",
    (15, "models[0].keep_alive"): "must be seconds, or text like 30s, 10m or 2h, at most 30 days; or `auto`",
    (16, "models[0].source"): "there is no FOLDER/lama; did you mean FOLDER/llama?",
    (18, "models[0].max_replicas"): "1 is less than min_replicas, 4",
    (20, "models[0].engine_arguments.port"): "--port is not allowed here; leave it out: the node picks one",
    (21, "models[0].engine_arguments.max model len"): "a key must be the name of an option of `vllm serve`, such as"
    " max-model-len",
    (22, "models[1].name"): "models[0] has the same name, 'a'",
    (25, "models[2].accelerators"): "each of its engines takes 8 slots, but this node has 2",
    (26, "models[2].environment.VLLM_API_KEY"): "VLLM_API_KEY is set by the node for each engine; leave it out",
    (26, "models[2].environment.A"): "must be text or a number; put it in quotes",
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SLLM_TEST_KEY", raising=False)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    path = tmp_path / "router.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("SLLM_NODE_DIR", str(tmp_path / "node"))
    return caller(capfd, monkeypatch)


def expected_lines(file: Path) -> list[str]:
    lines = [f"{file}: line {line}: {key}: {problem}" for (line, key), problem in EXPECTED.items()]
    return [line.replace("FOLDER", str(file.parent)) for line in lines]


# ---------------------------------------------------------------------------------------------------------- everything


def test_every_mistake_is_found_at_once(file: Path) -> None:
    found = check_on_this_machine(file)
    assert [(problem.line, problem.key) for problem in found.problems] == [*EXPECTED]
    told = [problem.problem.replace(str(file.parent), "FOLDER") for problem in found.problems]
    assert told == [*EXPECTED.values()]
    assert found.config is None


def test_json_has_lines_too(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    path.write_text(JSON_FILE)
    found = check_router_config(path).problems
    assert [(problem.line, problem.key) for problem in found] == [
        (5, "models[1].keep_alive"),
        (8, "models[1].engine_arguments[1]"),
        (10, "servr"),
    ]


def test_a_mistake_without_a_line_has_that_of_the_nearest_key(file: Path) -> None:
    file.write_text("defaults: {min_replicas: 2}\nmodels:\n- name: a\n\n- name: b\n  max_replicas: 3\n")
    (problem,) = check_router_config(file).problems
    assert (problem.line, problem.key) == (3, "models[0].max_replicas")


def test_a_host_that_is_open_to_all_is_found_beside_other_mistakes(file: Path) -> None:
    file.write_text("server: {host: 0.0.0.0}\nmodles: []\n")
    assert [problem.key for problem in check_router_config(file).problems] == ["server.host", "modles"]
    file.write_text("server: {host: 0.0.0.0}\nkeys: {clients: [5]}\n")
    assert [problem.key for problem in check_router_config(file).problems] == ["keys.clients[0]"]


def test_what_is_valid_is_valid(file: Path) -> None:
    file.write_text("models: [{name: a, source: ./llama}]\n")
    config, problems = read_checked_config(file)
    assert (config.models[0].source, problems) == (str(file.parent / "llama"), [])


# -------------------------------------------------------------------------------------------------------- this machine


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("./none/llama", "there is no FOLDER/none/llama, nor FOLDER/none"),
        ("./empty", "FOLDER/empty holds no model: it has neither config.json nor params.json"),
        ("./llama", None),
        ("./file.gguf", None),
        ("org/llama", None),
    ],
)
def test_sources_that_are_paths(file: Path, source: str, problem: str | None) -> None:
    (file.parent / "empty").mkdir()
    (file.parent / "file.gguf").touch()
    file.write_text(f"models: [{{name: a, source: {source}}}]\n")
    told = [found.problem.replace(str(file.parent), "FOLDER") for found in check_on_this_machine(file).problems]
    assert told == ([] if problem is None else [problem])


def test_a_name_that_is_a_directory_beside_the_file_is_a_warning(file: Path) -> None:
    file.write_text("models: [{name: a, source: llama}]\n")
    config, problems = read_checked_config(file)
    assert config.models[0].source == "llama"
    assert [(problem.is_warning, "write ./llama" in problem.problem) for problem in problems] == [(True, True)]


def test_options_that_vllm_does_not_have_are_warnings_once_each(file: Path) -> None:
    file.write_text(
        "defaults: {engine_arguments: {enfore-eager: true}}\n"
        "models:\n- {name: a, source: org/a, engine_arguments: {max-modle-len: 512}}\n- {name: b, source: org/b}\n"
    )
    problems = check_on_this_machine(file).problems
    assert [str(problem) for problem in problems] == [
        "line 1: defaults.engine_arguments: vLLM has no option --enfore-eager; did you mean --enforce-eager?",
        "line 3: models[0].engine_arguments: vLLM has no option --max-modle-len; did you mean --max-model-len?",
    ]
    assert all(problem.is_warning for problem in problems)


def test_sources_of_another_engine_are_its_own_matter(file: Path) -> None:
    file.write_text("node: {engine_command: [fake]}\nmodels: [{name: a, source: /no/where}]\n")
    assert check_on_this_machine(file).problems == []


def test_slots_are_those_of_the_gpus(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (Gpu("GPU-0", GIB), Gpu("GPU-1", GIB))
    monkeypatch.setattr(config_places, "detect_hardware", lambda *_: Hardware((0, 1, 2, 3), GIB, gpus))
    file.write_text(
        "models:\n- {name: a, source: org/a, engine_arguments: {tensor-parallel-size: 4}}\n"
        "- {name: b, source: org/b, min_replicas: 3, max_replicas: 3}\n"
    )
    wrong, warning = sorted(check_on_this_machine(file).problems, key=lambda problem: problem.is_warning)
    assert (wrong.line, wrong.key) == (2, "models[0].engine_arguments")
    assert wrong.problem == "each of its engines takes 4 slots, but this node has 2"
    assert (warning.key, "take 3 slots in total" in warning.problem) == ("models", True)
    file.write_text("node: {slots: 3}\n")
    assert [problem.key for problem in check_on_this_machine(file).problems] == ["node.slots"]


def test_a_gpu_that_is_not_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Hardware:
        raise ConfigError("there is no GPU '9'; nvidia-smi lists 2")

    monkeypatch.setattr(config_places, "detect_hardware", refuse)
    file.write_text("node: {gpus: [9]}\n")
    assert [problem.key for problem in check_on_this_machine(file).problems] == ["node.gpus"]


@every_case("values", [{"source": "/no/where"}, {"accelerators": 3}])
def test_a_model_that_is_deployed_is_checked_alike(values: dict[str, object]) -> None:
    require_model(NodeSection(slots=2), ModelConfig(name="a", source="org/a"))
    with pytest.raises(InvalidConfig) as raised:
        require_model(NodeSection(slots=2), ModelConfig.model_validate({"name": "a", "source": "org/a", **values}))
    assert str(raised.value).startswith(f"{next(iter(values))}: ")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = {"pipe": tmp_path / "pipe", "device": Path("/dev/zero"), "folder": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(InvalidConfig, match=r"it is not a regular file|Is a directory"):
        read_checked_config(path)


# ------------------------------------------------------------------------------------------------------------- ways in


def test_config_check(run: Run, file: Path) -> None:
    code, out, err = run("config", "check", file)
    assert (code, out.splitlines(), err) == (1, expected_lines(file), "")
    file.write_text("models: [{name: a, source: llama}]\n")
    code, out, _ = run("config", "check", file)
    assert code == 0
    assert re.fullmatch(rf"{file}: warning: line 1: .*\n{file}: valid, 1 model\n", out)


def test_config_check_as_json(run: Run, file: Path) -> None:
    code, out, _ = run("config", "check", file, "--json")
    found = json.loads(out)
    assert (code, found["is_valid"]) == (1, False)
    assert [(problem["line"], problem["key"]) for problem in found["problems"]] == [*EXPECTED]
    assert {problem["severity"] for problem in found["problems"]} == {"error"}
    file.write_text("models: []\n")
    code, out, _ = run("config", "check", file, "--json")
    assert (code, json.loads(out)) == (0, {"file": str(file), "is_valid": True, "problems": []})


def test_serve_says_the_same(run: Run, file: Path) -> None:
    code, out, err = run("serve", file)
    assert (code, out) == (1, "")
    assert err.splitlines() == [f"sllm-vllm: {line}" for line in expected_lines(file)]


def test_deploy_says_all_of_a_file(run: Run, file: Path) -> None:
    file.write_text("nam: a\nkeep_alive: soon\n")
    code, out, err = run("deploy", file)
    assert (code, out) == (1, "")
    told = [line.removeprefix(f"sllm-vllm: {file}: ").partition(": ")[::2] for line in err.splitlines()]
    assert [line for line, _ in told] == ["line 1", "line 1", "line 2"]
    assert {text.partition(":")[0] for _, text in told} == {"nam", "name", "keep_alive"}
