"""Selects the vLLM plugins that an engine loads, so that ours for live migration is among them. Reads what is
installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

OURS = "sllm"
_ENDPOINTS = "vllm.endpoint_plugins"


def moving_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to the environment of engines whose requests can be moved.

    vLLM loads plugins that add routes only if ``VLLM_PLUGINS`` names them, and then it loads no other plugins than
    those named. So all plugins that it would load by default are named, too, except for those that add routes.
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
