"""Weights that are overwritten in place, in a folder that is named as a content-addressed cache's: a real server."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import ModelDir
from tests.e2e.test_serve import answers, outcome_of, sllm_arguments
from tests.support.vllm_server import vllm_server
from tests.support.waiting import wait_until


@pytest.mark.e2e_long
def test_overwritten_weights_of_an_object_store_download_are_served(model_dir: ModelDir, tmp_path: Path) -> None:
    model = tmp_path / "models--s3---bucket--model" / "snapshots" / ("0" * 40)  # as Ray names every download
    shutil.copytree(model_dir("llama"), model)
    store, report = tmp_path / "store", tmp_path / "report.json"
    with vllm_server(model, tmp_path, "--enforce-eager", *sllm_arguments(store, report)) as ours:
        before = answers(ours)
        wait_until(lambda: list(store.glob("[!.]*/manifest.json")), "the checkpoint")
    weights = model / "model.safetensors"
    times = weights.stat()
    shutil.copyfile(model_dir("llama", seed=1) / "model.safetensors", weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.stat().st_size == times.st_size
    with vllm_server(model, tmp_path, "--enforce-eager", *sllm_arguments(store, report)) as ours:
        after, log = answers(ours), ours.log.read_text()
    with vllm_server(model, tmp_path, "--enforce-eager") as stock:
        assert after == answers(stock) != before
    assert outcome_of(report) == "converted"
    assert log.count("event=source_changed") == 1
