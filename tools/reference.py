"""Writes the pages of docs/ that follow from the code: every key of every configuration, and every metric.

python -m tools.reference       `make docs` calls it; a test fails if a page is out of date
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from sllm_vllm.config import LoaderConfig, NodeConfig, StoreConfig
from sllm_vllm.metrics import EngineMetric, Metric, RouterMetric, StoreMetric
from sllm_vllm.router.config.sections import ModelDefaults, RouterConfig
from sllm_vllm.units import GIB, KIB, MIB

ROOT = Path(__file__).resolve().parent.parent
Schema = Mapping[str, Any]

_GENERATED = "<!-- Written by `python -m tools.reference`: change the descriptions in the code instead. -->"
_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "array": "list"}
_KEY_COLUMNS = "| key | value | default | meaning |\n|---|---|---|---|"
_OVERRIDE = (
    'Options on the command line override it. Keys that end in `_bytes` take a number, or text such as `"16GiB"`.'
)
_METRIC_COLUMNS = "| metric | kind | labels | meaning |\n|---|---|---|---|"


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text)


def pages() -> dict[Path, str]:
    """Each generated page's text."""
    return {ROOT / "docs/configuration.md": configuration_page(), ROOT / "docs/metrics.md": metrics_page()}


# ------------------------------------------------------------------------------------------------------ configuration


def configuration_page() -> str:
    """The page of all keys."""
    parts = [
        f"# Configuration\n\n{_GENERATED}",
        "Every key of the four configurations. An unknown key is an error. If a key has no default here, its meaning"
        " says what happens without it.",
        "## The router\n\nA YAML or JSON file for `sllm-vllm serve`; on Ray, `SLLM_ROUTER_CONFIG` names it."
        " `sllm-vllm config check FILE` finds its mistakes, and `sllm-vllm config schema` prints a JSON schema.",
        *_router_sections(RouterConfig.model_json_schema()),
        "## The loader\n\nKeys of vLLM's `--model-loader-extra-config`, a JSON object, with `--load-format sllm`.",
        _table(LoaderConfig.model_json_schema()),
        f"## The store\n\nA JSON file for `sllm-vllm store serve --config FILE`. {_OVERRIDE}",
        _table(StoreConfig.model_json_schema()),
        f"## The node agent\n\nA JSON file for `sllm-vllm node serve --config FILE`. {_OVERRIDE} A router makes these"
        " settings from its own file.",
        _table(NodeConfig.model_json_schema()),
    ]
    return "\n\n".join(parts) + "\n"


def _router_sections(schema: Schema) -> Iterator[str]:
    """The router's sections, with those that they refer to."""
    for name, field in schema["properties"].items():
        section = _section_of(field, schema)
        intro = section["description"]
        if name == "models":
            shared = ModelDefaults.model_fields
            own = {key: value for key, value in section["properties"].items() if key not in shared}
            told = f"A list. {_sentence(field['description'])} {intro} Each also takes every key of `defaults`."
            yield f"### models\n\n{told}\n\n{_rows(own)}"
        else:
            yield f"### {name}\n\n{intro}\n\n{_table(section)}"
    yield f"### A key\n\n{schema['$defs']['KeySource']['description']}\n\n{_table(schema['$defs']['KeySource'])}"


def _section_of(field: Schema, schema: Schema) -> Schema:
    """The definition that a key refers to, itself or as an item of its list."""
    refers = field if "$ref" in field else field["items"]
    name: str = refers["$ref"].rpartition("/")[2]
    found: Schema = schema["$defs"][name]
    return found


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _table(schema: Schema) -> str:
    return _rows(schema["properties"])


def _rows(properties: Schema) -> str:
    rows = [_row(name, field) for name, field in properties.items()]
    return "\n".join([_KEY_COLUMNS, *rows])


def _row(name: str, field: Schema) -> str:
    has_bytes = name.endswith("_bytes")
    cells = [f"`{name}`", _value_of(field, has_bytes), _default_of(field, has_bytes), str(field["description"])]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _value_of(field: Schema, has_bytes: bool) -> str:
    """What may be written: types, choices and range."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    words = dict.fromkeys(_kind_in_words(kind, has_bytes) for kind in kinds)
    return " or ".join(words)


def _kind_in_words(kind: Schema, has_bytes: bool) -> str:
    if "enum" in kind:
        return ", ".join(f"`{choice}`" for choice in kind["enum"])
    if "$ref" in kind:
        return "a key, see below"
    if kind.get("type") == "array" and "$ref" in kind.get("items", {}):
        return "list of keys, see below"
    if kind.get("type") == "object":
        return "mapping"
    return _TYPES[kind["type"]] + _range_of(kind, has_bytes)


def _range_of(kind: Schema, has_bytes: bool) -> str:
    least, over = kind.get("minimum"), kind.get("exclusiveMinimum")
    most = kind.get("maximum")
    bounds = [
        f"above {_number(over, has_bytes)}" if over is not None else "",
        f"at least {_number(least, has_bytes)}" if least is not None else "",
        f"at most {_number(most, has_bytes)}" if most is not None else "",
    ]
    told = ", ".join(filter(None, bounds))
    return f", {told}" if told else ""


def _default_of(field: Schema, has_bytes: bool) -> str:
    default = field.get("default")
    if default is None or default in ([], {}, ""):
        return ""
    if isinstance(default, bool | str):
        return f"`{json.dumps(default)}`" if isinstance(default, bool) else f"`{default}`"
    return _number(default, has_bytes)


def _number(value: float, has_bytes: bool) -> str:
    """A number; one of bytes also in a binary unit, if it is a multiple of that."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if has_bytes and value and value % size == 0:
            return f"{int(value)} ({int(value) // size} {unit})"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------ metrics


def metrics_page() -> str:
    """The page of all metrics."""
    parts = [
        f"# Metrics\n\n{_GENERATED}",
        "In Prometheus' text format. The router's are at `/metrics` of its port, with an admin key or a key of"
        " `keys.metrics`; the store's at `/metrics` of `--metrics-port`; an engine's beside vLLM's own, with its key.",
        *_metric_sections({"The router": RouterMetric, "The store": StoreMetric, "An engine": EngineMetric}),
    ]
    return "\n\n".join(parts) + "\n"


def _metric_sections(groups: Mapping[str, Iterable[Enum]]) -> Iterator[str]:
    for title, metrics in groups.items():
        rows = [_metric_row(member.value) for member in metrics]
        yield "\n".join([f"## {title}\n", _METRIC_COLUMNS, *rows])


def _metric_row(metric: Metric) -> str:
    kind = "counter" if metric.is_counter else "histogram" if metric.buckets else "gauge"
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {kind} | {labels} | {metric.help} |"


if __name__ == "__main__":
    main()
