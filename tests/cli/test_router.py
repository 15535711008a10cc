"""The router's commands, against a real controller behind a real socket in a thread of this process."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest

from sllm_vllm.cli import main as cli
from sllm_vllm.cli import simulate as command
from sllm_vllm.cli.output import command_group
from sllm_vllm.cli.router import add_router_commands
from sllm_vllm.errors import ConfigError
from sllm_vllm.router.admin.client import AdminClient, write_url
from sllm_vllm.router.config.file import FILE_NBYTES_MAX
from sllm_vllm.router.config.sections import ModelConfig
from tests.support.cases import every_case
from tests.support.commands import Run, caller, use_folders
from tests.support.fake_node import ADMIN_KEY, ENGINE_KEY, AdminThread
from tests.support.waiting import wait_until

MODEL = "meta/tiny"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    app = command_group("sllm-vllm", "The router's commands.")
    add_router_commands(app)
    monkeypatch.setattr(cli, "app", app)
    return caller(capfd, monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's folder, with the admin's key in it."""
    monkeypatch.delenv("SLLM_ADMIN_KEY", raising=False)
    monkeypatch.delenv("SLLM_WRONG", raising=False)
    node_dir = use_folders(tmp_path, monkeypatch)
    node_dir.mkdir()
    (node_dir / "admin.key").write_text(ADMIN_KEY + "\n")
    return node_dir


@pytest.fixture
def served(folder: Path) -> Iterator[AdminThread]:
    with AdminThread(folder, (ModelConfig(name=MODEL, min_replicas=1),)) as served:
        wait_until(lambda: served.served.replica_of(MODEL, "ready"), "its replica")
        yield served


def url(served: AdminThread) -> tuple[str, str]:
    return "--url", served.served.url


# -------------------------------------------------------------------------------------------------------------- status


def test_status(run: Run, served: AdminThread) -> None:
    served.answer_request(MODEL)
    code, out, err = run("status", *url(served))
    assert (code, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 100
    for expected in (MODEL, "1 ready", "tiny-1-", "1 of 2 used", "last starts", "start REMOTE warm"):
        assert expected in out


def test_status_as_json(run: Run, served: AdminThread) -> None:
    code, out, _ = run("status", "--json", *url(served))
    facts = json.loads(out)
    assert (code, list(facts)) == (0, ["models", "replicas", "nodes"])
    assert facts["models"][0]["name"] == MODEL
    assert ENGINE_KEY not in out


def test_status_of_a_model_whose_starts_fail(run: Run, served: AdminThread) -> None:
    def deploy(one: object) -> None:
        served.served.node.refusal = "no slot is free"
        served.served.controller.deploy(ModelConfig(name="other", min_replicas=1))

    served.do(deploy)
    core = served.served.controller.core
    wait_until(lambda: core.models["other"].back_off.num_failures, "a failed start")
    assert "no slot is free" in " ".join(run("status", *url(served))[1].split())


def figures_as_text(record: object) -> list[str]:
    """Strings in JSON that are numbers, with a unit or without."""
    if isinstance(record, dict):
        return [text for value in record.values() for text in figures_as_text(value)]
    if isinstance(record, list):
        return [text for value in record for text in figures_as_text(value)]
    is_figure = isinstance(record, str) and re.fullmatch(r"-?\d+(\.\d+)?( (s|min|h|B|[KMG]iB|GB/s))?|-", record)
    return [str(record)] if is_figure else []


def test_numbers_in_json_are_numbers(run: Run, served: AdminThread) -> None:
    served.answer_request(MODEL)
    for words in (("status",), ("requests",), ("explain", MODEL), ("story", MODEL), ("story", "r-1")):
        code, out, _ = run(*words, "--json", *url(served))
        found = json.loads(out)
        for replica in found.get("replicas", ()):
            (replica["report"] or {}).pop("labels", None)  # text by its nature
        assert (code, figures_as_text(found)) == (0, [])


# -------------------------------------------------------------------------------------------------------------- orders


def test_deploy_yaml_and_delete(run: Run, served: AdminThread, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        "defaults: {engine_arguments: {max-model-len: 512}}\n"
        "models:\n- {name: org/a, source: ./weights, keep_alive: auto}\n- {name: b, queue_max: 3, queue_timeout: 30s}\n"
    )
    assert run("deploy", file, *url(served)) == (0, "added: org/a\nadded: b\n", "")
    models = served.served.controller.models
    assert models["org/a"].source == str(tmp_path / "weights")
    assert models["org/a"].engine_arguments == ("--max-model-len=512",)
    assert (models["b"].queue_max, models["b"].queue_timeout) == (3, 30.0)
    assert run("deploy", file, *url(served))[1] == "unchanged: org/a\nunchanged: b\n"
    assert run("delete", "org/a", *url(served)) == (0, "deleted: org/a\n", "")
    assert list(models) == [MODEL, "b"]


def test_deploy_one_model_as_json(run: Run, served: AdminThread, tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text('{"name": "a", "environment": {"A": 1}}')
    code, out, _ = run("deploy", file, "--json", *url(served))
    assert (code, [model["done"] for model in json.loads(out)]) == (0, ["added"])
    assert served.served.controller.models["a"].environment == {"A": "1"}


def test_deploy_from_stdin(run: Run, served: AdminThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"name: a\nmin_replicas: 0\n")))
    assert run("deploy", "-", *url(served)) == (0, "added: a\n", "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: [", "not valid YAML"),
        ("{name: a, nam: b}", "nam: unknown key; did you mean `name`?"),
        ("models: []", "there is no model in it"),
        ("", "must be a mapping"),
        ("models: [{name: a, min_replicas: 5}]", "models[0].max_replicas: 1 is less than min_replicas, 5"),
        ("# " + "x" * FILE_NBYTES_MAX, "it can't be read: it is larger than"),
    ],
    ids=["yaml", "unknown", "empty list", "empty", "order", "large"],
)
def test_deploy_of_a_wrong_file(run: Run, folder: Path, tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    code, out, err = run("deploy", file)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"sllm-vllm: {file}: ")
    assert f": {told}" in err


def test_deploy_of_no_file(run: Run, folder: Path) -> None:
    assert run("deploy", "none.yaml") == (
        1,
        "",
        "sllm-vllm: none.yaml: it can't be read: No such file or directory\n",
    )


def test_drain_a_replica_and_a_node(run: Run, served: AdminThread) -> None:
    replica = served.served.replica_of(MODEL, "ready")
    assert replica is not None
    code, out, _ = run("drain", "local", "--json", *url(served))
    assert (code, json.loads(out)) == (0, {"node": "local", "is_drained": True, "replicas": [replica]})
    assert "drained: none" in run("status", *url(served))[1]
    assert run("drain", "local", *url(served))[1].startswith("drained: local takes no starts; ending: ")
    assert run("undrain", "local", *url(served)) == (0, "undrained: local takes starts again\n", "")
    assert "drained" not in run("status", *url(served))[1]
    wait_until(lambda: served.served.replica_of(MODEL, "ready") not in {None, replica}, "the next replica")
    second = served.served.replica_of(MODEL, "ready")
    assert run("drain", second, *url(served))[1] == f"stopping: {second} (0 requests)\n"


def test_undrain_of_nobody(run: Run, served: AdminThread) -> None:
    code, _, err = run("undrain", "nobody", *url(served))
    assert (code, "There is no node `nobody`." in err) == (1, True)


def test_drain_of_what_starts_or_is_unknown(run: Run, served: AdminThread) -> None:
    code, _, err = run("drain", "nobody", *url(served))
    assert (code, "There is no replica `nobody`." in err) == (1, True)

    def hold(one: object) -> None:
        served.served.node.may_be_ready.clear()
        served.served.controller.deploy(ModelConfig(name="slow", min_replicas=1))

    served.do(hold)
    wait_until(lambda: served.served.replica_of("slow", "ordered"), "an order")
    code, _, err = run("drain", served.served.replica_of("slow", "ordered"), *url(served))
    assert (code, "is starting" in err) == (1, True)


def test_reload(run: Run, served: AdminThread) -> None:
    served.served.reloads += ["added 1", ConfigError("router.yaml: it is wrong")]
    assert run("reload", *url(served)) == (0, "reloaded: added 1\n", "warning: a warning\n")
    code, _, err = run("reload", *url(served))
    assert (code, err.count("\n"), "router.yaml: it is wrong" in err) == (1, 1, True)


# ----------------------------------------------------------------------------------------------------------------- why


def test_story(run: Run, served: AdminThread) -> None:
    served.answer_request(MODEL)
    code, out, _ = run("story", "r-1", *url(served))
    assert code == 0
    assert [line.split()[3] for line in out.splitlines()] == ["RequestArrived", "Dispatch", "FirstByte", "RequestEnded"]
    assert "model=meta/tiny" in out
    code, out, _ = run("story", "r-1", "--json", *url(served))
    assert json.loads(out)["events"][1]["fields"]["attempt"] == 1


def test_explain(run: Run, served: AdminThread) -> None:
    served.answer_request(MODEL)
    code, out, _ = run("explain", MODEL, *url(served))
    assert code == 0
    replica = served.served.replica_of(MODEL, "ready")
    for expected in (f"a request now: replica  {replica}", "plans for one more replica", f"last start: {replica}"):
        assert expected in out
    weights = next(line.split() for line in out.splitlines() if line.startswith("weights"))
    assert weights[2] == "2.00"
    assert float(weights[3]) == pytest.approx(2.0 - float(weights[1]), abs=0.02)
    assert json.loads(run("explain", MODEL, "--json", *url(served))[1])["model"] == MODEL


def test_explain_a_start_under_way(run: Run, served: AdminThread) -> None:
    def hold(one: object) -> None:
        served.served.node.may_be_ready.clear()
        served.served.controller.deploy(ModelConfig(name="slow", min_replicas=1))

    served.do(hold)
    wait_until(lambda: served.served.replica_of("slow", "ordered"), "an order")
    out = run("explain", "slow", *url(served))[1]
    assert f"under way: {served.served.replica_of('slow', 'ordered')}" in out
    assert "ordered" in run("status", *url(served))[1]


# ------------------------------------------------------------------------------------------------- reaching the router


def test_the_key_comes_from_a_file_or_a_variable(
    run: Run, served: AdminThread, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "admin.key").unlink()
    code, _, err = run("status", *url(served))
    assert (code, err.count("\n")) == (1, 1)
    assert "give --key-file, or set SLLM_ADMIN_KEY" in err
    monkeypatch.setenv("SLLM_ADMIN_KEY", ADMIN_KEY)
    assert run("status", *url(served))[0] == 0
    monkeypatch.setenv("SLLM_ADMIN_KEY", "wrong")
    (tmp_path / "key").write_text(f"\n{ADMIN_KEY}\nanother\n")
    assert run("status", "--key-file", tmp_path / "key", *url(served))[0] == 0


@pytest.mark.parametrize("key", ["wrong-key", "wrong key", "wrong\u00e9key", "wrong\x01key"])
def test_a_wrong_key_is_not_shown(run: Run, served: AdminThread, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_ADMIN_KEY", key)
    code, out, err = run("status", *url(served))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "SLLM_ADMIN_KEY" in err
    assert "wrong" not in err.replace("missing or wrong", "")


def test_an_unknown_model(run: Run, served: AdminThread) -> None:
    code, out, err = run("delete", "no/body", *url(served))
    assert (code, out) == (1, "")
    assert err.endswith("There is no model `no/body`.\n")


def test_the_address_comes_from_a_variable(run: Run, served: AdminThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_URL", served.served.url)
    assert run("status")[0] == 0
    assert run("requests", "--url", "http://127.0.0.1:1")[0] == 1
    monkeypatch.setenv("SLLM_URL", "localhost:8000")
    code, _, err = run("status")
    assert (code, err.startswith("sllm-vllm: SLLM_URL: must be a URL like")) == (1, True)


def test_the_address_comes_from_this_machines_router(
    run: Run, served: AdminThread, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on another port than the default; never from what another process has left."""
    monkeypatch.delenv("SLLM_URL", raising=False)
    host, port = urlsplit(served.served.url).hostname, urlsplit(served.served.url).port
    assert host is not None
    assert port is not None
    write_url(folder, host, port)
    code, _, err = run("status")
    assert (code, "no router is running on this machine (the last one listened at http://" in err) == (1, True)
    with socket.socket(socket.AF_UNIX) as listener:  # as the router's process has it
        listener.bind(str(folder / "socket"))
        listener.listen()
        assert run("status")[0] == 0
        (folder / "router.url").write_text(f"{served.served.url} {os.getpid() + 1}\n")
        assert run("status")[0] == 1


@pytest.mark.parametrize("command", ["status", "requests", "reload"])
def test_where_no_router_ever_ran(run: Run, folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLLM_URL", raising=False)
    (folder / "admin.key").unlink()
    code, out, err = run(command)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("sllm-vllm: no router has run here yet")
    assert "start one with `sllm-vllm serve CONFIG`" in err


def test_no_router(run: Run, folder: Path) -> None:
    with AdminThread(folder) as gone:
        address = gone.served.url
    code, out, err = run("status", "--url", address)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "no router answers (Connection refused); start one with `sllm-vllm serve CONFIG`" in err


@every_case("address", ["ftp://a", "localhost:8000", "http://me:secret@a", "http://a:x", "http://a?b=c"])
def test_a_wrong_url(run: Run, folder: Path, address: str) -> None:
    code, _, err = run("status", "--url", address)
    assert (code, err.startswith("sllm-vllm: --url: must be a URL like")) == (1, True)
    assert "secret" not in err


def test_something_else_at_the_url(served: AdminThread) -> None:
    client = AdminClient(served.served.url + "/elsewhere/", ADMIN_KEY)
    with pytest.raises(Exception, match="Unknown path: /elsewhere/sllm/v1/models"):
        client.get("models")


# --------------------------------------------------------------------------------------- serve, config, simulate, help


def test_serve_hands_the_file_to_the_process(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[Path] = []

    def serve(path: Path) -> int:
        paths.append(path)
        return 5

    module = ModuleType("sllm_vllm.router.daemon")
    monkeypatch.setattr(module, "serve", serve, raising=False)
    monkeypatch.setitem(sys.modules, "sllm_vllm.router.daemon", module)
    assert run("serve", tmp_path / "router.yaml")[0] == 5
    assert paths == [tmp_path / "router.yaml"]


def test_config_schema(run: Run) -> None:
    code, out, _ = run("config", "schema")
    found = json.loads(out)
    assert (code, found["$schema"]) == (0, "https://json-schema.org/draft/2020-12/schema")
    assert {"keys", "server", "models"} <= found["properties"].keys()


def test_simulate_takes_every_option(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[command.Options] = []

    def run_simulation(options: command.Options) -> int:
        given.append(options)
        return 1

    monkeypatch.setattr(command, "run_simulation", run_simulation)
    policies = ("--policy", "ours", "--policy", "random")
    figures = ("--preset", "p", "--seeds", 2, "--requests", 10, "--rate", 0.5)
    files = ("--trace", tmp_path / "t.csv", "--png", tmp_path / "p.png")
    assert run("simulate", *policies, *figures, *files, "--json", "--validate", "--decisions")[0] == 1
    assert given == [
        command.Options(
            preset="p",
            policies=("ours", "random"),
            seeds=2,
            requests=10,
            rate=0.5,
            trace=tmp_path / "t.csv",
            json=True,
            png=tmp_path / "p.png",
            validate=True,
            decisions=True,
        )
    ]
    assert run("simulate")[0] == 1
    assert given[1] == command.Options()


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in ("serve", "status", "deploy", "delete", "story", "explain", "drain", "reload", "config", "simulate"):
        assert name in out


def test_commands_load_little_until_they_run() -> None:
    loaded = "print(sorted({'aiohttp', 'pydantic', 'yaml', 'http.client'} & set(sys.modules)))"
    script = f"import sys, sllm_vllm.cli.router; {loaded}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"[]\n"
