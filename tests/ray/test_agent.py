"""The agent's actor without Ray around it: a start that failed leaves nothing in the way of the next."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray")

from sllm_vllm.config import NodeConfig
from sllm_vllm.ray.agent import RayAgent
from sllm_vllm.ray.peer_server import PeerServer


async def test_a_start_that_failed_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = RayAgent(NodeConfig(node_dir=tmp_path / "node", store_dir=tmp_path / "store", slots=1, warm=False))

    async def fail(self: PeerServer) -> None:
        raise OSError("no such address")

    with monkeypatch.context() as patch:
        patch.setattr(PeerServer, "start", fail)
        with pytest.raises(OSError, match="no such address"):
            await agent.report()
    assert (await agent.report()).peer.startswith("http://peer:")
    await agent.close()
