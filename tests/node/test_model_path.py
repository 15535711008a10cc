"""Models that are written as paths: those that are not there are refused before vLLM is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllm_vllm.errors import ConfigError, OrderRefused
from sllm_vllm.node.model_path import problem_with, require_model
from sllm_vllm.router.daemon import serve
from tests.support.cases import every_case


@pytest.mark.parametrize("model", ["{}/nope", "./nope", "../nope/x", "~/nope", "./model.gguf", "{}/model/\0"])
def test_a_path_that_is_not_there_is_a_problem(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert problem_with(model.format(tmp_path), tmp_path)
    with pytest.raises(OrderRefused, match="give a directory that exists"):
        require_model(model.format(tmp_path), tmp_path)


@pytest.mark.parametrize("model", ["{}/model", "./model", "../{name}/model", "~/model", ".", "./model/x.gguf"])
def test_a_path_that_is_there_is_none(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x.gguf").touch()
    assert problem_with(model.format(tmp_path, name=tmp_path.name), tmp_path) == ""


@every_case("model", ["facebook/opt-125m", "gpt2", "s3://bucket/model", "org/repo:Q4_K_M", "a/b/c.gguf"])
def test_what_may_be_a_name_on_the_hub_or_a_url_is_left_to_vllm(model: str, tmp_path: Path) -> None:
    assert problem_with(model, tmp_path) == ""


def test_a_router_does_not_start_with_a_source_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(f"node: {{node_dir: {tmp_path}/node}}\nmodels: [{{name: m, source: ./nope}}]\n")
    with pytest.raises(ConfigError, match=rf"router.yaml: line 2: models\[0\].source: there is no {tmp_path}/nope"):
        serve(path)
    assert not (tmp_path / "node").exists()
