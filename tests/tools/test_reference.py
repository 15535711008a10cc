"""The generated pages of docs/ are what the code says now."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest

from sllm_vllm.config import LoaderConfig, NodeConfig, StoreConfig
from sllm_vllm.metrics import EngineMetric, RouterMetric, StoreMetric
from sllm_vllm.router.config.sections import ModelConfig, RouterConfig
from tools.reference import pages

PAGES = {path.name: (path, text) for path, text in pages().items()}
SECTIONS: list[Any] = [field.default for name, field in RouterConfig.model_fields.items() if name != "models"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_up_to_date(name: str) -> None:
    path, text = PAGES[name]
    assert path.read_text() == text, "run `make docs`, and commit what it wrote"


def test_every_key_is_in_the_page() -> None:
    models: list[Any] = [LoaderConfig, NodeConfig, StoreConfig, ModelConfig, *(type(section) for section in SECTIONS)]
    keys = [key for model in models for key in model.model_fields]
    assert len(keys) > 100
    assert [key for key in keys if f"\n| `{key}` | " not in PAGES["configuration.md"][1]] == []


def test_every_metric_is_in_the_page() -> None:
    groups: tuple[type[Enum], ...] = (RouterMetric, StoreMetric, EngineMetric)
    names = [metric.value.name for group in groups for metric in group]
    assert [name for name in names if f"\n| `{name}` | " not in PAGES["metrics.md"][1]] == []
