"""Files of the router's configuration: what is read, how it is refused, keys, schema, and what a change means."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_vllm.errors import ConfigError
from sllm_vllm.router.config.file import (
    FILE_NBYTES_MAX,
    Changes,
    compare,
    parse_router_config,
    read_key_digests,
    read_router_config,
    router_config_schema,
)
from sllm_vllm.router.config.problems import PROBLEMS_MAX
from sllm_vllm.router.config.sections import KeySource, RouterConfig
from sllm_vllm.router.config.text import DEPTH_MAX, parse_yaml, read_json
from tests.support.cases import every_case

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"
SECTIONS = "keys, server, node, store, migration, poison, ray, defaults, models"


def yaml_values(text: str) -> object:
    """The values of a YAML text that has no problem."""
    return parse_yaml(text).require_valid()


def refusal(text: str, path: Path) -> str:
    """What is said of a file, less its name."""
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_router_config(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: ")
    assert said.isprintable()
    return said.removeprefix(f"{path}: ")


# --------------------------------------------------------------------------------------------------------------- files


def test_the_demo_is_three_models_on_two_slots() -> None:
    config = read_router_config(DEMO)
    assert [model.name for model in config.models] == ["llama", "opt", "qwen2"]
    assert [model.source for model in config.models] == [str(DEMO.parent / "models" / m.name) for m in config.models]
    assert config.node_config().slots == 2
    assert "--max-model-len=512" in config.models[2].engine_arguments


@every_case("suffix", [".json", ".yaml", ".yml", ""])
def test_json_and_yaml_say_the_same(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"router{suffix}"
    values = {"models": [{"name": "a", "source": "./a", "engine_arguments": {"enforce-eager": True}}]}
    path.write_text("\ufeff" + json.dumps(values))
    assert read_router_config(path) == parse_router_config(values, directory=tmp_path)


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: it can't be read: No such file or directory"):
        read_router_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="it is not UTF-8: byte 3 is invalid"):
        read_router_config(tmp_path / "binary.yaml")


def test_a_large_file_is_refused(tmp_path: Path) -> None:
    said = refusal("#" * (FILE_NBYTES_MAX + 1), tmp_path / "a.yaml")
    assert said == f"it can't be read: it is larger than {FILE_NBYTES_MAX} bytes"


@every_case("text", ["", "# nothing", "null", "- a", "text"])
def test_a_file_holds_a_mapping_of_sections(text: str, tmp_path: Path) -> None:
    said = f"must be a mapping of sections: {SECTIONS}"
    assert refusal(text, tmp_path / "a.yaml") == said


@every_case(
    "text, problem",
    [
        ("model: []", "model: unknown key; did you mean `models`?"),
        ("models: [{name: a, keepalive: 5}]", "models[0].keepalive: unknown key; did you mean `keep_alive`?"),
        ("defaults: {ongoing: 5}", "defaults.ongoing: unknown key; did you mean `ongoing_max`?"),
        ("server: {prt: 5}", "server.prt: unknown key; did you mean `port`?"),
        (
            "node: {xyz: 5}",
            "node.xyz: unknown key; known: slots, gpus, memory, kv_memory, warm, warm_wait, engine_command,"
            " engine_sockets, node_dir",
        ),
        ("store: {dir: 5}", "store.dir: unknown key; known: directory, socket"),
        ("keys: {client: 5}", "keys.client: unknown key; did you mean `clients`?"),
        ("keys: {clients: [{fil: a, env: A}]}", "keys.clients[0].fil: unknown key; did you mean `file`?"),
        ('"a\\nb": 1', f"a?b: unknown key; known: {SECTIONS}"),
        ("x" * 100 + ": 1", "x" * 80 + f"…: unknown key; known: {SECTIONS}"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(text: str, problem: str, tmp_path: Path) -> None:
    assert refusal(text, tmp_path / "a.yaml") == f"line 1: {problem}"


def test_problems_are_told_up_to_a_bound(tmp_path: Path) -> None:
    keys = "".join(f"key-{number}: 1\n" for number in range(PROBLEMS_MAX + 7))
    said = refusal(keys, tmp_path / "a.yaml")
    assert said.count("unknown key") == PROBLEMS_MAX
    assert said.endswith("; and 7 more")


# ---------------------------------------------------------------------------------------------------------------- YAML


def test_yaml_is_read_as_pyyaml_does() -> None:
    text = "a: [1, -2, 0.5, true, No, ~, '5', \"x\\n\", null]\nb: {c: d e, f: }\ng: |\n  h\n  i\nj:\n- - k\n"
    assert yaml_values(text) == yaml.safe_load(text)


@every_case("text", ["1.10", "007", "+5", "1e10", "1_000", "12:30", "0x10", "2026-01-01", "9" * 19, ".5"])
def test_a_number_that_would_be_printed_otherwise_stays_text(text: str) -> None:
    assert yaml_values(text) == text


@every_case(
    "text, problem",
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", "line 4: b.c: duplicate key 'c'"),
        (
            "a: &x 1",
            "line 1: a: anchors and aliases (& and *) are not supported; write the value out, or use `defaults`",
        ),
        (
            "a: 1\nb: *x",
            "line 2: b: anchors and aliases (& and *) are not supported; write the value out, or use `defaults`",
        ),
        ("a: !!binary aGk=", "line 1: a: tags (!) are not supported; put the value in quotes if it is text"),
        ("a: !x {}", "line 1: a: tags (!) are not supported; put the value in quotes if it is text"),
        ("a: 1\n5: 2", "line 2: 5: a key must be text; put it in quotes"),
        ("? [a]\n: 2", "line 1: a key must be text; put it in quotes"),
        ("a: 1\n---\nb: 1", "line 2: a second document begins here; only one is allowed"),
        ("a: [1", "line 1: not valid YAML (expected ',' or ']', but got '<stream end>')"),
        ("a: 1\n\tb: 1", "line 2: not valid YAML (found character '\\t' that cannot start any token)"),
        ("a: \x01", "not valid YAML (special characters are not allowed)"),
        ('"\\UFFFFFFFF"', "not valid YAML ("),
        ("[" * (DEPTH_MAX + 1), "line 1: it is nested too deeply"),
        ("\n" + "{a: " * 100_000, "line 2: it is nested too deeply"),
    ],
)
def test_wrong_yaml_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        yaml_values(text)
    assert str(raised.value).startswith(problem)


def test_a_bomb_of_aliases_is_refused_at_once() -> None:
    levels = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 30)]
    with pytest.raises(ConfigError, match="line 1: a0: anchors"):
        yaml_values("\n".join(["a0: &a0 [x]", *levels]))


# ---------------------------------------------------------------------------------------------------------------- JSON


def test_json_is_read_as_it_is() -> None:
    values = {"a": [1, 0.5, {"a": '{["a": \\'}], "b": {"a": None, "b": True}, "\U0001f600": "a"}
    assert read_json(json.dumps(values, indent="\t")) == values


@every_case(
    "text, problem",
    [
        ('{"a": 1,\n "b": {"c": 1,\n\n "c" : 2}}', "line 4: b.c: duplicate key 'c'"),
        ('{"a": 1, "\\u0061": 2}', "line 1: a: duplicate key 'a'"),
        ('{"a":\n 1,}', "line 2: not valid JSON ("),
        ('{"a": NaN}', "not valid JSON (NaN is not a number)"),
        (f'{{"a": {"9" * 5000}}}', "not valid JSON ("),
        ("[" * 100_000, "not valid JSON ("),
        ("\n" + "[" * (DEPTH_MAX + 1) + "]" * (DEPTH_MAX + 1), "line 2: it is nested too deeply"),
    ],
)
def test_wrong_json_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_json(text)
    assert str(raised.value).startswith(problem)


# ---------------------------------------------------------------------------------------------------------------- keys


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_keys_are_read_from_where_they_are_and_known_by_their_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTER_KEY", "one\n")
    (tmp_path / "keys").write_text("two\n\n  three  \none\n")
    sources = [KeySource(env="ROUTER_KEY"), KeySource(file=tmp_path / "keys"), KeySource(sha256=digest("four"))]
    assert read_key_digests(sources, "keys.clients") == tuple(map(digest, ["one", "two", "three", "four"]))
    assert read_key_digests([], "keys.clients") == ()


@pytest.mark.parametrize("text", ["", " \n", "secret 1", "sécret", "\x01", "x" * 1025, "good\nbad secret"])
def test_what_is_no_key_is_refused_and_not_shown(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text(text)
    monkeypatch.setenv("ROUTER_KEY", text)
    for source in (KeySource(file=tmp_path / "keys"), KeySource(env="ROUTER_KEY")):
        with pytest.raises(ConfigError) as raised:
            read_key_digests([KeySource(sha256="0" * 64), source], "keys.admin")
        assert str(raised.value).startswith("keys.admin[1]: ")
        assert "secret" not in str(raised.value)


def test_a_key_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROUTER_KEY", raising=False)
    with pytest.raises(ConfigError, match="ROUTER_KEY is empty or not set"):
        read_key_digests([KeySource(env="ROUTER_KEY")], "keys.clients")
    with pytest.raises(ConfigError, match="none: it can't be read: No such file"):
        read_key_digests([KeySource(file=tmp_path / "none")], "keys.clients")


# ------------------------------------------------------------------------------------------------------------- changes


def config_of(*models: dict[str, Any], **sections: Any) -> RouterConfig:
    return parse_router_config({"models": [*models], **sections})


def test_models_come_and_go() -> None:
    old, new = config_of({"name": "b"}, {"name": "a"}, {"name": "c"}), config_of({"name": "d"}, {"name": "c"})
    assert compare(old, new) == Changes(added=(new.models[0],), removed=("a", "b"))
    assert compare(old, old) == Changes()


@every_case(
    "change",
    [
        {"source": "x"},
        {"revision": "v2"},
        {"engine_arguments": ["--seed=1"]},
        {"environment": {"A": 1}},
        {"accelerators": 2},
        {"accelerators": 2, "priority": 1},
    ],
)
def test_what_engines_are_started_with_starts_them_anew(change: dict[str, Any]) -> None:
    new = config_of({"name": "a", **change}, {"name": "b"})
    assert compare(config_of({"name": "a"}, {"name": "b"}), new) == Changes(restarted=(new.models[0],))


@every_case(
    "change",
    [
        {"min_replicas": 1},
        {"max_replicas": 2},
        {"keep_alive": 5},
        {"target_ongoing": 1},
        {"ongoing_max": 1},
        {"priority": 1},
        {"queue_max": 1},
        {"queue_timeout": 1},
        {"accelerators": 1},
    ],
)
def test_what_the_router_decides_leaves_engines_alone(change: dict[str, Any]) -> None:
    new = config_of({"name": "a", **change})
    assert compare(config_of({"name": "a"}), new) == Changes(adjusted=(new.models[0],))


def test_defaults_count_by_what_they_change() -> None:
    old = config_of({"name": "a"}, {"name": "b", "priority": 1})
    new = config_of({"name": "a"}, {"name": "b", "priority": 1}, defaults={"priority": 2})
    assert compare(old, new) == Changes(adjusted=(new.models[0],))


def test_keys_and_limits_change_while_the_router_runs() -> None:
    new = config_of(keys={"clients": [{"env": "KEY"}]}, server={"body_bytes": "1MiB", "waiting_max": 5})
    changes = compare(config_of(), new)
    assert changes == Changes(live=("keys.clients", "server.body_bytes", "server.waiting_max"))
    changes.require_live()


def test_what_needs_a_restart_is_refused_by_name() -> None:
    new = config_of(server={"port": 80, "requests_max": 5}, node={"slots": 1}, store={"directory": "/s"})
    changes = compare(config_of(), new)
    assert changes == Changes(live=("server.requests_max",), fixed=("server.port", "node.slots", "store.directory"))
    with pytest.raises(ConfigError) as raised:
        changes.require_live()
    keys = "server.port, node.slots, store.directory"
    assert str(raised.value) == f"{keys}: can't be changed while the router runs; restart it, or undo the change"


# -------------------------------------------------------------------------------------------------------------- schema


def test_every_key_is_described() -> None:
    schema = router_config_schema()
    objects = {"RouterConfig": schema, **schema["$defs"]}
    fields = {f"{name}.{key}": field for name, found in objects.items() for key, field in found["properties"].items()}
    assert len(fields) > 40
    assert [key for key, field in fields.items() if "description" not in field and "$ref" not in field] == []
    assert [name for name, found in objects.items() if not found.get("description")] == []


SCHEMA = router_config_schema()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
TEXTS = st.text(max_size=8) | st.sampled_from(["auto", "10m", "8GiB", "./m", "0.0.0.0", "KEY", "a" * 64, "1e999", "\0"])
OPTIONS = st.sampled_from(["max-model-len", "seed", "port", "A", "a b"])
SCALARS = {
    "string": TEXTS,
    "integer": st.integers(1, 100) | st.integers(),
    "number": st.floats(1, 100) | st.floats(),
    "boolean": st.booleans(),
    "null": st.none(),
}


def described_by(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a JSON schema admits, by its types; not always by its limits."""
    if "$ref" in schema:
        return st.deferred(lambda: described_by(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]))
    if "anyOf" in schema:
        return st.one_of([described_by(kind) for kind in schema["anyOf"]])
    if schema["type"] == "array":
        return st.lists(described_by(schema["items"]), max_size=3)
    if "properties" in schema:
        fields = {key: described_by(field) for key, field in schema["properties"].items()}
        spoiled = st.fixed_dictionaries({}, optional={key: field | JSON for key, field in fields.items()})
        return st.fixed_dictionaries({}, optional=fields) | spoiled | JSON
    return SCALARS[schema["type"]] if schema["type"] in SCALARS else st.dictionaries(OPTIONS | TEXTS, JSON, max_size=3)


def check(config: RouterConfig) -> None:
    assert [model.spec(model.generation).name for model in config.models] == [model.name for model in config.models]
    assert config.node_config().socket_path
    assert config.ingress_settings(()).requests_max == config.server.requests_max
    assert compare(config, config) == Changes()


@settings(max_examples=200, deadline=None)
@given(described_by(SCHEMA))
def test_nothing_but_a_config_error_escapes(values: object) -> None:
    said = ""
    try:
        check(parse_router_config(values, directory=Path("/etc")))
    except ConfigError as error:
        said = str(error)
    assert said.isprintable()


@settings(max_examples=200, deadline=None)
@given(described_by(SCHEMA["$defs"]["ModelDefaults"]), described_by(SCHEMA["$defs"]["ModelConfig"]))
def test_nothing_but_a_config_error_escapes_a_model(defaults: object, model: object) -> None:
    said = ""
    try:
        check(parse_router_config({"defaults": defaults, "models": [model]}))
    except ConfigError as error:
        said = str(error)
    assert said.isprintable()


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("{}[]:,-?&*!|>#%@'\"\\\n\t ~ab01.\ufeff\x01\ud800")) | st.text(st.characters()))
def test_no_text_makes_anything_but_a_config_error(text: str) -> None:
    for read in (yaml_values, read_json):
        said = ""
        try:
            read(text)
        except ConfigError as error:
            said = str(error)
        assert "\n" not in said
