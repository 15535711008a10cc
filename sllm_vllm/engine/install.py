"""Registers all hooks of this package, each to be installed when its vLLM module is imported; called by the plugin."""

from __future__ import annotations

from sllm_vllm.engine.core_hooks import core_installs
from sllm_vllm.engine.front_hooks import front_installs
from sllm_vllm.engine.hook_points import HookPoints
from sllm_vllm.engine.worker_hooks import worker_installs


def register_hooks() -> HookPoints:
    """Register the hooks in this process; imports none of vLLM's modules."""
    points = HookPoints()
    points.register({**front_installs(points), **core_installs(points), **worker_installs()})
    return points
