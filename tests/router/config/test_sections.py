"""The router's configuration: values, defaults, what contradicts itself, and what is made of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sllm_vllm.errors import ConfigError
from sllm_vllm.node.core.launch import option_value
from sllm_vllm.node.protocol import ReplicaOrder
from sllm_vllm.router.config.file import parse_router_config
from sllm_vllm.router.config.sections import ARGUMENTS_MAX, ModelConfig, RouterConfig
from sllm_vllm.router.config.values import merge_arguments, parse_duration
from sllm_vllm.router.core.facts import ModelSpec
from sllm_vllm.units import GIB, MIB
from tests.support.cases import every_case


def model(**values: Any) -> ModelConfig:
    return parse_router_config({"models": [{"name": "m", **values}]}).models[0]


def refusal(values: object) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_router_config(values)
    return str(raised.value)


def model_refusal(**values: Any) -> str:
    return refusal({"models": [{"name": "m", **values}]})


# -------------------------------------------------------------------------------------------------------------- values


@every_case(
    "written, seconds",
    [
        (0, 0.0),
        (1.5, 1.5),
        ("7", 7.0),
        ("250ms", 0.25),
        ("30s", 30.0),
        (" 10 m ", 600.0),
        ("1.5h", 5400.0),
        ("2d", 172800),
    ],
)
def test_duration_is_seconds_or_text(written: object, seconds: float) -> None:
    assert parse_duration(written) == seconds


@every_case("written", [True, None, -1, "", "-1s", "soon", "1y", "31d", 31 * 86400, float("nan"), "٣s", []])
def test_anything_else_is_no_duration(written: object) -> None:
    with pytest.raises(ValueError, match="seconds"):
        parse_duration(written)


@every_case("written, keep_alive", [("auto", None), (None, None), ("10m", 600.0), (0, 0.0)])
def test_keep_alive_is_auto_or_a_duration(written: object, keep_alive: float | None) -> None:
    assert model(keep_alive=written).keep_alive == keep_alive


def test_wrong_keep_alive_says_what_may_be_written() -> None:
    said = model_refusal(keep_alive="soon")
    assert said == ("models[0].keep_alive: must be seconds, or text like 30s, 10m or 2h, at most 30 days; or `auto`")


@every_case("written", [-1, "-1", "forever", "Forever", "infinite"])
def test_a_keep_alive_without_end_points_to_min_replicas(written: object) -> None:
    said = model_refusal(keep_alive=written)
    assert said.startswith("models[0].keep_alive: must not be unlimited")
    assert said.endswith("write `min_replicas: 1` to keep a replica running")


@every_case("written", ["much", "9" * 400, True, 1.5])
def test_size_is_bytes_or_text(written: object) -> None:
    assert parse_router_config({"node": {"memory": "8GiB", "kv_memory": 64 * MIB}}).node.memory == 8 * GIB
    assert refusal({"node": {"memory": written}}) == "node.memory: must be bytes, or text like 8GiB or 500MB"


def test_size_below_its_least_is_refused() -> None:
    assert refusal({"node": {"memory": "1MiB"}}).startswith("node.memory: must be at least 268435456")
    assert refusal({"server": {"body_bytes": None}}).startswith("server.body_bytes: must be a whole number")


@every_case("key", ["min_replicas", "max_replicas", "priority", "ongoing_max", "accelerators"])
@every_case("value", [True, "3", 1.5, 10**30])
def test_counts_are_integers_within_bounds(key: str, value: object) -> None:
    assert model_refusal(**{key: value}).startswith(f"models[0].{key}: ")


# ---------------------------------------------------------------------------------------------------- engine arguments


@every_case(
    "written, words",
    [
        (["--max-model-len", 512, "--enforce-eager"], ("--max-model-len", "512", "--enforce-eager")),
        ({"max-model-len": 512, "enforce-eager": True}, ("--max-model-len=512", "--enforce-eager")),
        ({"max_model_len": "1k", "--dtype": "auto"}, ("--max-model-len=1k", "--dtype=auto")),
        ({"enable-prefix-caching": False}, ("--no-enable-prefix-caching",)),
        ({"lora-modules": ["a=b", "c=d"]}, ("--lora-modules", "a=b", "c=d")),
        ({"hf-overrides": {"a": [1]}, "swap_space": None}, ('--hf-overrides={"a": [1]}',)),
        ({"compilation_config.a_b": "NONE", "x.y": False}, ("--compilation-config.a_b=NONE", "--x.y=false")),
        ({"seed": -1, "gpu-memory-utilization": 0.5}, ("--seed=-1", "--gpu-memory-utilization=0.5")),
        ([], ()),
    ],
)
def test_engine_arguments_are_words_or_a_mapping(written: object, words: tuple[str, ...]) -> None:
    assert model(engine_arguments=written).engine_arguments == words


@every_case(
    "written, problem",
    [
        ("--max-model-len 512", ": must be a list"),
        ([True], ": must be text or a number; put it in quotes"),
        (["a\0b"], ": must not contain a character that arguments and paths can't have"),
        (["x" * 65_537], ": must have at most 65536 characters"),
        (["\ud800"], ": must not contain a character that arguments and paths can't have"),
        (
            {"max model len": 1},
            ".max model len: a key must be the name of an option of `vllm serve`, such as max-model-len",
        ),
        ({5: 1}, ".5: a key must be the name of an option of `vllm serve`, such as max-model-len"),
        ({"hf-overrides": {"a": {1}}}, ".hf-overrides: --hf-overrides: its value can't be written as JSON"),
        (["--port=80"], "[0]: --port is not allowed here; leave it out: the node picks one"),
        ({"served_model_name": "x"}, ".served_model_name: --served-model-name is not allowed here; write `name`"),
        (["--revision", "main"], "[0]: --revision is not allowed here; write `revision`"),
    ],
)
def test_wrong_engine_arguments_are_refused(written: object, problem: str) -> None:
    assert model_refusal(engine_arguments=written) == f"models[0].engine_arguments{problem}"


def test_an_order_takes_as_many_arguments_as_a_model_may_have() -> None:
    config = model(engine_arguments=["--a"] * ARGUMENTS_MAX, revision="main", source="org/m")
    order = ReplicaOrder(model=config.source, arguments=config.engine_order_arguments())
    assert len(order.arguments) == ARGUMENTS_MAX + 2
    assert "must have at most 240 entries" in model_refusal(engine_arguments=["--a"] * (ARGUMENTS_MAX + 1))


def test_engines_know_the_model_by_the_name_that_clients_say() -> None:
    arguments = model(name="-x y", source="org/m", revision="v1", engine_arguments=["--a"]).engine_order_arguments()
    assert arguments == ("--a", "--served-model-name=-x y", "--revision=v1")
    assert option_value(arguments, "--served-model-name") == "-x y"
    assert model().engine_order_arguments() == ("--served-model-name=m",)


@every_case(
    "environment, problem",
    [
        ({"A": True}, ".A: must be text or a number; put it in quotes"),
        ({"A": None}, ".A: must be text or a number; put it in quotes"),
        ({"A B": "1"}, ".A B: a variable's name must consist of letters, digits and underscores"),
        ({1: "1"}, ".1: a variable's name must consist of letters, digits and underscores"),
        ({"VLLM_API_KEY": "1"}, ".VLLM_API_KEY: VLLM_API_KEY is set by the node for each engine; leave it out"),
        ([], ": must be a mapping"),
    ],
)
def test_wrong_environment_is_refused(environment: object, problem: str) -> None:
    assert model(environment={"A": 1, "_b": "x"}).environment == {"A": "1", "_b": "x"}
    assert model_refusal(environment=environment) == f"models[0].environment{problem}"


# -------------------------------------------------------------------------------------------------------------- models


def test_a_model_is_as_the_core_knows_it() -> None:
    config = model(engine_arguments={"tensor-parallel-size": 2}, keep_alive="10m", ongoing_max=4, queue_timeout=5)
    expected = ModelSpec("m", 7, accelerators=2, keep_alive_s=600.0, target_ongoing=4, ongoing_max=4, queue_s_max=5.0)
    assert replace(config.spec(7), lineage=0) == expected
    assert replace(model().spec(0), lineage=0) == ModelSpec("m", waits_for_start=True)
    assert model(start_timeout="10m").spec(0).start_s_max == 600.0


def test_accelerators_that_are_said_count_more_than_the_arguments() -> None:
    assert model(accelerators=3, engine_arguments=["-tp", 2]).num_accelerators == 3
    assert model(engine_arguments=["-tp", 2, "-pp", 2]).num_accelerators == 4


@every_case("name", ["", " ", "a\n", " a", "a\ud800", "x" * 201, 5, None])
def test_name_is_printable_and_short(name: object) -> None:
    assert model_refusal(name=name).startswith("models[0].name: ")
    assert model(name="x" * 200).name == "x" * 200


def test_name_is_needed_once_each() -> None:
    assert refusal({"models": [{}]}) == "models[0].name: it is missing"
    two = [{"name": "a"}, {"name": "b"}, {"name": "a"}]
    assert refusal({"models": two}) == "models[2].name: models[0] has the same name, 'a'"


@pytest.mark.parametrize(
    ("written", "source"),
    [
        ({}, "m"),
        ({"source": None}, "m"),
        ({"source": ""}, "m"),
        ({"source": "org/model"}, "org/model"),
        ({"source": "models/llama"}, "models/llama"),
        ({"source": "/models/llama"}, "/models/llama"),
        ({"source": "./models/llama"}, "/etc/sllm/models/llama"),
        ({"source": "../llama"}, "/etc/sllm/../llama"),
        ({"source": "."}, "/etc/sllm"),
        ({"source": "~/llama"}, "/users/a/llama"),
        ({"source": "s3://bucket/llama"}, "s3://bucket/llama"),
    ],
)
def test_source_is_a_name_or_a_path(written: dict[str, object], source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/a")
    config = parse_router_config({"models": [{"name": "m", **written}]}, directory=Path("/etc/sllm"))
    assert config.models[0].source == source


@every_case("source", ["-x", "a\0b", "x" * 5000, 5, []])
def test_wrong_source_is_refused(source: object) -> None:
    assert model_refusal(source=source).startswith("models[0].source: ")


def test_a_relative_source_stays_without_a_directory() -> None:
    assert model(source="../llama").source == "../llama"


def test_more_replicas_at_least_than_at_most_are_refused() -> None:
    said = model_refusal(min_replicas=2)
    assert said == "models[0].max_replicas: 1 is less than min_replicas, 2"


def test_a_model_of_another_kind_is_refused() -> None:
    assert refusal({"defaults": {}, "models": [5]}) == "models[0]: must be a mapping"
    assert model_refusal(revision=1.5) == "models[0].revision: must be text; put it in quotes"
    with pytest.raises(ValidationError):
        RouterConfig.model_validate(5)


# ------------------------------------------------------------------------------------------------------------ defaults


def test_defaults_are_merged_under_each_model() -> None:
    config = parse_router_config(
        {
            "defaults": {"keep_alive": "5m", "priority": 3, "environment": {"A": "1", "B": "2"}},
            "models": [{"name": "a"}, {"name": "b", "priority": 1, "environment": {"B": "3"}}],
        }
    )
    a, b = config.models
    assert (a.keep_alive, a.priority, a.environment) == (300.0, 3, {"A": "1", "B": "2"})
    assert (b.keep_alive, b.priority, b.environment) == (300.0, 1, {"A": "1", "B": "3"})


@every_case(
    "defaults, own, merged",
    [
        ({"max_model_len": 1, "seed": 2}, {"max-model-len": 3, "dtype": "auto"}, "max-model-len=3 seed=2 dtype=auto"),
        ({"seed": 2, "dtype": "auto"}, {"seed": None}, "dtype=auto"),
        (["--seed=2"], ["--seed=3"], "seed=2 seed=3"),
        ({"seed": 2}, ["--seed=3"], "seed=2 seed=3"),
        (["--seed", "2", "--dtype=auto"], {"seed": None}, "dtype=auto"),
        (["--max_model_len=1", "--no-enforce-eager"], {"max-model-len": 3, "enforce-eager": None}, "max-model-len=3"),
    ],
)
def test_engine_arguments_of_defaults_are_merged(defaults: object, own: object, merged: str) -> None:
    config = parse_router_config(
        {"defaults": {"engine_arguments": defaults}, "models": [{"name": "m", "engine_arguments": own}]}
    )
    assert config.models[0].engine_arguments == tuple(f"--{word}" for word in merged.split())


@every_case("own", [5, None, {"a b": 1}, [True]])
def test_what_can_not_be_merged_is_left_to_its_own_check(own: object) -> None:
    assert merge_arguments(["--seed=2"], own) is own
    values = {"defaults": {"engine_arguments": {"a": 1}}, "models": [{"name": "m", "engine_arguments": own}]}
    assert refusal(values).startswith("models[0].engine_arguments")


def test_an_environment_that_can_not_be_merged_is_left_to_its_own_check() -> None:
    values = {"defaults": {"environment": {"A": 1}}, "models": [{"name": "m", "environment": 5}]}
    assert refusal(values) == "models[0].environment: must be a mapping"


def test_wrong_defaults_are_told_once() -> None:
    values = {"defaults": {"priority": "high"}, "models": [{"name": "a"}, {"name": "b"}]}
    assert refusal(values) == "defaults.priority: must be a whole number"


def test_a_contradiction_with_the_defaults_is_found() -> None:
    values = {"defaults": {"min_replicas": 2}, "models": [{"name": "a", "max_replicas": 3}, {"name": "b"}]}
    assert refusal(values).startswith("models[1].max_replicas: ")


# ---------------------------------------------------------------------------------------------------------- generation


def test_generation_is_the_same_for_ever() -> None:
    """A number of another release, or of another process, would start every engine anew."""
    config = model(source="org/m", revision="v1", engine_arguments=["--seed=1"], environment={"B": "2", "A": "1"})
    assert config.generation == 1917858727


@every_case(
    "change",
    [
        {"source": "b"},
        {"revision": "v2"},
        {"engine_arguments": ["--a"]},
        {"environment": {"A": 1}},
        {"accelerators": 2},
        {"name": "n", "source": "m"},
    ],
)
def test_what_engines_are_started_with_changes_the_generation(change: dict[str, Any]) -> None:
    assert model(**change).generation != model().generation


def test_nothing_else_changes_the_generation() -> None:
    softly = model(max_replicas=5, keep_alive=1, priority=2, queue_max=1, queue_timeout=1, target_ongoing=2)
    assert softly.generation == model().generation == model(accelerators=1, source="m").generation
    assert model(environment={"A": 1, "B": 2}).generation == model(environment={"B": 2, "A": 1}).generation


@given(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=20))
def test_generation_has_31_bits(name: str) -> None:
    assert 0 <= model(name=name).generation < 1 << 31


# -------------------------------------------------------------------------------------------------- the other sections


def test_node_and_store_become_the_agents_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    node = {"slots": 2, "gpus": [0, "GPU-1"], "memory": "8GiB", "kv_memory": "64MiB", "warm": False, "node_dir": "n"}
    values = {"node": node, "store": {"directory": "s", "socket": "/run/store"}}
    found = parse_router_config(values).node_config()
    assert (found.slots, found.gpus, found.warm) == (2, ("0", "GPU-1"), False)
    assert (found.memory_bytes, found.kv_bytes) == (8 * GIB, 64 * MIB)
    assert (found.node_dir, found.store_dir, found.store_socket) == (tmp_path / "n", tmp_path / "s", Path("/run/store"))


def test_what_is_left_out_is_as_the_agent_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_NODE_DIR", "/n")
    monkeypatch.setenv("SLLM_STORE_DIR", "/s")
    found = RouterConfig().node_config()
    assert (found.node_dir, found.store_dir, found.store_socket) == (Path("/n"), Path("/s"), None)
    assert (found.slots, found.gpus, found.memory_bytes) == (None, None, None)


@every_case(
    "node, has_sockets",
    [
        ({}, True),
        ({"engine_sockets": False}, False),
        ({"engine_command": ["docker", "run"]}, False),
        ({"engine_command": ["vllm", "serve"], "engine_sockets": True}, True),
    ],
)
def test_engines_listen_on_sockets_unless_a_command_may_not_reach_them(node: dict[str, Any], has_sockets: bool) -> None:
    assert parse_router_config({"node": node}).node_config().has_engine_sockets is has_sockets


def test_server_and_keys_become_the_ingress_settings() -> None:
    server = {"body_bytes": "1MiB", "requests_max": 5, "request_timeout": "1m", "cors_origins": ["*"]}
    found = parse_router_config({"server": server}).ingress_settings(("0" * 64,))
    assert (found.body_bytes, found.requests_max, found.request_timeout) == (MIB, 5, 60.0)
    said = parse_router_config({"server": {"json_depth_max": 9, "json_containers_max": 101}}).ingress_settings(())
    assert (said.json_depth_max, said.json_containers_max) == (9, 101)
    assert refusal({"server": {"json_depth_max": 901}}).startswith("server.json_depth_max: ")
    assert (found.cors_origins, found.key_digests, found.insecure_no_keys) == (("*",), ("0" * 64,), False)


@every_case("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert parse_router_config({"server": {"host": host}}).server.host == host


@every_case("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"])
def test_other_hosts_need_keys(host: str) -> None:
    said = refusal({"server": {"host": host}})
    assert said == f"server.host: {host!r} is not loopback: set `keys.clients` or `keys.insecure_no_keys`"
    for keys in ({"clients": [{"env": "KEY"}]}, {"insecure_no_keys": True}):
        assert parse_router_config({"server": {"host": host}, "keys": keys}).server.host == host
    assert refusal({"server": {"host": host}, "keys": {"admin": [{"env": "KEY"}]}}).startswith("server.host: ")
    assert refusal({"server": {"host": host}, "keys": 5}).startswith("keys: ")


def test_a_key_itself_is_refused_and_not_repeated() -> None:
    said = refusal({"keys": {"clients": ["secret-1"]}})
    assert said == "keys.clients[0]: a key must not be written here; use {env: NAME}, {file: PATH} or {sha256: HEX}"


@every_case(
    "source",
    [
        {},
        {"env": "A", "file": "b"},
        {"env": "secret-1"},
        {"sha256": "secret-1"},
        {"sha256": "A" * 64},
        {"env": "A\n"},
        5,
    ],
)
def test_wrong_source_of_a_key_is_refused_and_not_repeated(source: object) -> None:
    said = refusal({"keys": {"admin": [source]}})
    assert said.startswith("keys.admin[0]")
    assert "secret-1" not in said


def test_path_of_a_key_is_relative_to_the_file() -> None:
    config = parse_router_config({"keys": {"clients": [{"file": "k"}]}}, directory=Path("/etc/sllm"))
    assert config.keys.clients[0].file == Path("/etc/sllm/k")
    assert refusal({"keys": {"clients": [{"file": "k\0"}]}}).startswith("keys.clients[0].file: ")


def test_digest_of_a_key_is_taken_as_it_is() -> None:
    digest = hashlib.sha256(b"k").hexdigest()
    assert parse_router_config({"keys": {"clients": [{"sha256": digest}]}}).keys.clients[0].sha256 == digest
