"""The files for clusters in configs/: what reads them reads them, and they mean what they are called."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

pytest.importorskip("ray")

from ray import cloudpickle
from ray.serve.schema import ServeDeploySchema

from sllm_vllm.config import child_environment
from sllm_vllm.errors import ConfigError
from sllm_vllm.ray.controller import read_told
from sllm_vllm.ray.serve import Arguments, build, link_of
from sllm_vllm.router.config.file import parse_router_config
from sllm_vllm.router.config.keys import digest_of

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "demo.yaml"


def read(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text())


def assert_serves_the_router(told: Any) -> None:
    """As Serve reads it; what it imports takes the arguments that it gives."""
    (application,) = ServeDeploySchema.model_validate(told).applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is build
    assert Arguments.model_validate(application.args).config == "/etc/sllm/router.yaml"
    assert {one.name for one in application.deployments} <= {"sllm-ingress"}


def test_serves_own_file() -> None:
    assert_serves_the_router(read("ray-serve.yaml"))


def test_the_routers_configuration_on_a_cluster() -> None:
    config = parse_router_config(read("ray-router.yaml"))
    assert [str(one.file) for one in (*config.keys.clients, *config.keys.admin)] == [
        "/etc/sllm-keys/clients",
        "/etc/sllm-keys/admin",
    ]
    assert not config.keys.insecure_no_keys
    assert config.models


def test_kuberays_manifest() -> None:
    manifest = read("ray-service.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    assert_serves_the_router(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    cluster = manifest["spec"]["rayClusterConfig"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    for pod in (one["template"]["spec"] for one in (head, *workers)):
        volumes = {one["name"] for one in pod["volumes"]}
        (container,) = pod["containers"]
        assert {one["name"] for one in container["volumeMounts"]} == volumes
        assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
    assert all(one["minReplicas"] <= one["replicas"] <= one["maxReplicas"] for one in workers)


def test_compose_file() -> None:
    told = read("docker-compose.yaml")
    services, volumes = told["services"], set(told["volumes"])
    named = {one.partition(":")[0] for service in services.values() for one in service.get("volumes", ())}
    assert {one for one in named if not one.startswith(".")} == volumes
    assert {other for service in services.values() for other in service.get("depends_on", ())} <= set(services)
    state = read("ray-router.yaml")["ray"]["state"]
    assert state.removeprefix("redis://").partition(":")[0] in services


def test_serve_build_writes_what_serve_deploy_reads(tmp_path: Path) -> None:
    out = tmp_path / "serve.yaml"
    command = [sys.executable, "-m", "ray.serve.scripts", "build", "sllm_vllm.ray.serve:app", "-o", str(out)]
    done = subprocess.run(
        command,
        env=child_environment(SLLM_ROUTER_CONFIG=str(insecure(tmp_path)), RAY_USAGE_STATS_ENABLED="0"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(out.read_text())).applications
    (deployment,) = application.deployments
    assert (application.import_path, deployment.name) == ("sllm_vllm.ray.serve:app", "sllm-ingress")


def insecure(directory: Path) -> Path:
    path = directory / "router.yaml"
    path.write_text(yaml.safe_dump({**read("demo.yaml"), "keys": {"insecure_no_keys": True}}))
    return path


def test_nobody_is_let_in_without_a_key_unless_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in read("demo.yaml").items() if key != "keys"}))
    with pytest.raises(ConfigError, match="no access is configured"):
        build(Arguments(config=str(path)))


def test_keys_stay_where_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    (tmp_path / "key").write_text("a-secret-that-is-long-enough-1234567890\n")
    (tmp_path / "key").chmod(0o600)
    path.write_text(yaml.safe_dump({**read("demo.yaml"), "keys": {"clients": [{"file": str(tmp_path / "key")}]}}))
    assert b"a-secret-that-is" not in cloudpickle.dumps(build(Arguments(config=str(path))))


def test_every_kind_of_key_reaches_the_controller_as_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kinds = tmp_path / "router.yaml", ("clients", "admin", "metrics")
    for kind in kinds:
        monkeypatch.setenv(f"KEY_OF_{kind}", f"a-key-of-{kind}")
    path.write_text("keys: {" + ", ".join(f"{kind}: [{{env: KEY_OF_{kind}}}]" for kind in kinds) + "}\n")
    told = link_of(str(path))[0]
    keys = read_told(told).keys
    assert [[one.sha256 for one in getattr(keys, kind)] for kind in kinds] == [
        [digest_of(f"a-key-of-{kind}")] for kind in kinds
    ]
    assert "a-key-of" not in told


def test_agents_of_a_cluster_know_which_variables_hold_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their machines may have them, too, and the cluster gets digests in the place of keys."""
    monkeypatch.setenv("ROUTER_KEY", "a-key")
    path = tmp_path / "router.yaml"
    path.write_text("keys: {clients: [{env: ROUTER_KEY}], hidden_variables: [OTHER_KEY]}\n")
    config = read_told(link_of(str(path))[0])
    assert config.node_config().secret_variables == ("OTHER_KEY", "ROUTER_KEY")


def test_a_cluster_does_not_merge_the_defaults_again(tmp_path: Path) -> None:
    """A model may set what is the default of no configuration but this one's, and null removes an argument."""
    path = tmp_path / "router.yaml"
    defaults = "{keep_alive: 60, engine_arguments: {seed: 1, enforce-eager: true}}"
    path.write_text(
        f"keys: {{insecure_no_keys: true}}\ndefaults: {defaults}\n"
        "models: [{name: m, keep_alive: null, engine_arguments: {seed: null}}]\n"
    )
    told = link_of(str(path))[0]
    model = read_told(told).models[0]
    assert (model.keep_alive, model.engine_arguments) == (None, ("--enforce-eager",))


def test_without_a_configuration_it_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLLM_ROUTER_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="no configuration"):
        build(Arguments())
