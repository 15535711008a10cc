"""Copying hot checkpoints to more nodes before they are needed there. Pure; owned by ``Foresight``.

A model whose replicas have half of their target number of requests is likely to get another replica soon. By then its
checkpoint should be on one node more than the model has replicas; otherwise that start waits for remote storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sllm_vllm.router.core.cluster import Cluster
from sllm_vllm.router.core.events import CopyCheckpoint
from sllm_vllm.router.core.limits import CopyLimits
from sllm_vllm.router.core.model_state import ModelState

HOT_SHARE = 0.5
"""A model is hot if its replicas have this share of their target number of requests."""
LOOK_S = 5.0
MODELS_MAX = 64
"""Models examined per look; the others wait for the next look."""


@dataclass(frozen=True, slots=True)
class _Copying:
    source: str
    until_s: float


class Copies:
    """Decides which copies to make. A copy that has not appeared after ``copy_s_max`` counts as failed."""

    def __init__(self, cluster: Cluster, models: Mapping[str, ModelState], limits: CopyLimits) -> None:
        self._cluster = cluster
        self._models = models
        self._limits = limits
        self._asked: dict[str, None] = {}
        """Models that got a request since they were last looked at."""
        self._copying: dict[tuple[str, str], _Copying] = {}
        """By model and target node."""
        self._next_s = 0.0

    def asked(self, model: str) -> None:
        """Note that a request for the model arrived."""
        if self._limits.holders_max > 1 and len(self._cluster.nodes) > 1:
            self._asked[model] = None

    def due(self, now_s: float) -> list[CopyCheckpoint]:
        """Return the copies to begin: at most ``at_once_max`` under way, and one at a time from and to each node."""
        if now_s < self._next_s or not (self._asked or self._copying):
            return []
        self._next_s = now_s + LOOK_S
        self._forget_ended(now_s)
        made = []
        for model in list(self._asked)[:MODELS_MAX]:
            del self._asked[model]
            if len(self._copying) < self._limits.at_once_max and (copy := self._copy_of(model)) is not None:
                self._copying[model, copy.node] = _Copying(copy.source, now_s + self._limits.copy_s_max)
                made.append(copy)
        return made

    def _forget_ended(self, now_s: float) -> None:
        """Forget copies that have arrived, have timed out, or have lost their source or target node."""
        nodes = self._cluster.nodes
        for (model, node), copying in list(self._copying.items()):
            is_there = node in nodes and model in nodes[node].tiers
            if is_there or node not in nodes or copying.source not in nodes or now_s >= copying.until_s:
                del self._copying[model, node]

    def _copy_of(self, model: str) -> CopyCheckpoint | None:
        state = self._models.get(model)
        if state is None:
            return None
        spec, num_replicas = state.spec, len(self._cluster.replicas_of(model))
        if not num_replicas or state.num_ongoing < HOT_SHARE * num_replicas * spec.target_ongoing:
            return None
        nodes = self._cluster.nodes
        holders = {name for name, node in nodes.items() if model in node.tiers}
        receiving = {node for of, node in self._copying if of == model}
        wanted = min(self._limits.holders_max, num_replicas + 1)
        if len(holders) + len(receiving) >= wanted:
            return None
        busy = {node for _, node in self._copying} | {one.source for one in self._copying.values()}
        sources = sorted(holders - busy)
        targets = [
            node
            for name, node in nodes.items()
            if name not in holders | busy and not node.is_cordoned and node.num_slots >= spec.accelerators
        ]
        if not sources or not targets:
            return None
        best = min(targets, key=lambda node: (-node.num_free, len(node.tiers), node.id))
        return CopyCheckpoint(model, sources[0], best.id)
