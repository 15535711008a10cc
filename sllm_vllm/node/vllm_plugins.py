"""Which plugins of vLLM's an engine loads, so that ours for live migration is among them. Reads what is installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

OURS = "sllm"
_ENDPOINTS = "vllm.endpoint_plugins"


def moving_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of engines whose requests can be moved, beside those they would get.

    vLLM loads plugins that add routes only if ``VLLM_PLUGINS`` names them, and then no other plugin that is not named.
    So all that it would have loaded by itself are named, too; but for such as add routes.
    """
    named = environment.get("VLLM_PLUGINS")
    names = set(named.split(",")) if named is not None else _loaded_by_themselves()
    return {"SLLM_MIGRATION": "1", "VLLM_PLUGINS": ",".join(sorted({*names, OURS} - {""}))}


def _loaded_by_themselves() -> set[str]:
    found = entry_points()
    return {
        one.name
        for group in found.groups
        if group.startswith("vllm.") and group != _ENDPOINTS
        for one in found.select(group=group)
    }
