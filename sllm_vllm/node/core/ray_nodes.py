"""Which of a Ray cluster's nodes get an agent, and what it may use there. Pure.

A node's agent holds all its accelerators: its GPUs, or, in a cluster that has none, its CPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_vllm.config import NodeConfig

PLACEHOLDER = "{node}"
"""In a path of the configuration: the node's name, where several share a file system."""
_ID_CHARS = 8


@dataclass(frozen=True, slots=True)
class RayNodeFacts:
    """A node that takes engines. ``id`` is Ray's, ``name`` what operators see: the same after a restart, if it can be.

    ``address``: the IP by which the cluster knows it. Either ``num_gpus`` or ``num_cpus`` is what its agent holds.
    """

    id: str
    name: str
    address: str
    num_gpus: int
    num_cpus: int


def nodes_for_agents(told: Iterable[Mapping[str, Any]], *, resource: str | None = None) -> list[RayNodeFacts]:
    """Of what ``ray.nodes()`` tells, those that take engines, by name.

    Args:
        resource: a custom resource that a node must have; None: all that have accelerators.
    """
    alive = [node for node in told if node["Alive"]]
    wanted = [node for node in alive if resource is None or node["Resources"].get(resource, 0) > 0]
    has_gpus = any(_count(node, "GPU") for node in wanted)
    kind = "GPU" if has_gpus else "CPU"
    taken = Counter(_name(node) for node in alive)
    found = [
        RayNodeFacts(
            id=node["NodeID"],
            name=_name(node) if taken[_name(node)] == 1 else f"{_name(node)}-{node['NodeID'][:_ID_CHARS]}",
            address=node["NodeManagerAddress"],
            num_gpus=_count(node, "GPU"),
            num_cpus=0 if has_gpus else _count(node, "CPU"),
        )
        for node in wanted
        if _count(node, kind)
    ]
    return sorted(found, key=lambda node: node.name)


def config_there(config: NodeConfig, node: RayNodeFacts) -> NodeConfig:
    """An agent's configuration on its node: one slot for each accelerator, and engines that others can reach."""
    return config.model_copy(
        update={
            "node_dir": _there(config.node_dir, node),
            "store_dir": _there(config.store_dir, node),
            "store_socket": None if config.store_socket is None else _there(config.store_socket, node),
            "slots": config.slots or node.num_gpus or node.num_cpus,
            "engine_host": node.address,
        }
    )


def _there(path: Path, node: RayNodeFacts) -> Path:
    return Path(str(path).replace(PLACEHOLDER, node.name))


def _name(node: Mapping[str, Any]) -> str:
    return str(node.get("NodeName") or node["NodeManagerAddress"])


def _count(node: Mapping[str, Any], kind: str) -> int:
    return int(node["Resources"].get(kind, 0))
