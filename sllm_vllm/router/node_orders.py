"""Turns the core's actions into orders to node agents: start, stop, prefetch and copy checkpoints.

Runs on the controller's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.core.events import CopyCheckpoint, PrefetchModel, StartReplica, StopReplica
from sllm_vllm.router.member import Member

logger = logging.getLogger(__name__)

NodeAction = StartReplica | StopReplica | PrefetchModel | CopyCheckpoint


class NodeOrders:
    """Gives orders to members. The controller keeps both mappings up to date.

    Args:
        directory: the engines' working directory.
    """

    def __init__(self, members: Mapping[str, Member], models: Mapping[str, ModelConfig], directory: Path) -> None:
        self._members = members
        self._models = models
        self.directory = directory

    def give(self, action: NodeAction) -> None:
        """Carry out an action; the member reports the results as events."""
        member = self._members[action.node]
        match action:
            case StartReplica():
                logger.info("event=start replica=%s model=%r node=%s", action.replica, action.model, action.node)
                model = self._models[action.model]
                directory, peer = str(self.directory), self._peer_of(model, member)
                member.engines.start(action.replica, model, directory, timeout_s=action.timeout_s, peer=peer)
            case StopReplica():
                logger.info("event=stop replica=%s reason=%r", action.replica, action.reason)
                member.engines.stop(action.replica)
            case PrefetchModel():
                member.engines.prefetch(self._models[action.model])
                member.watch.prefetch_ordered(action.model)
            case CopyCheckpoint():
                logger.info("event=copy model=%r source=%s node=%s", action.model, action.source, action.node)
                peer = self._members[action.source].checkpoint_url(self._models[action.model])
                if peer is not None:
                    member.engines.copy(peer)

    def _peer_of(self, model: ModelConfig, member: Member) -> str | None:
        """Where a start on the node can pull its checkpoint from; None if the node has it, or no other node does."""
        if member.checkpoint_of(model) is not None:
            return None
        others = (one.checkpoint_url(model) for one in self._members.values() if one is not member)
        return next((url for url in others if url is not None), None)
