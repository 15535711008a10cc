"""Which of a Ray cluster's nodes get an agent, and what it may use there. Pure.

A node's agent holds all its accelerators: its GPUs, or, in a cluster that has none, its CPUs. Nodes that are meant for
engines larger than a node have one agent together, which holds nothing: vLLM's Ray executor takes what it needs from
Ray, for each engine, and these nodes' accelerators are left to it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_vllm.config import NodeConfig

PLACEHOLDER = "{node}"
"""In a path of the configuration: the node's name, where several share a file system."""
WIDE = "wide"
"""What several nodes with one agent are called."""
_ID_CHARS, _DIGEST_CHARS = 8, 16


@dataclass(frozen=True, slots=True)
class RayNodeFacts:
    """A node that takes engines. ``id`` is Ray's, ``name`` what operators see: the same after a restart, if it can be.

    ``address``: the IP by which the cluster knows it. Either ``num_gpus`` or ``num_cpus`` is what its agent holds; or,
    where ``host`` is set, what the nodes have that are one to the router: ``host`` is Ray's id of the one with the
    agent, and ``id`` is another as soon as one of them comes or goes.
    """

    id: str
    name: str
    address: str
    num_gpus: int
    num_cpus: int
    host: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether it stands for several nodes."""
        return bool(self.host)


def nodes_for_agents(
    told: Iterable[Mapping[str, Any]], *, resource: str | None = None, wide_resource: str | None = None
) -> list[RayNodeFacts]:
    """Of what ``ray.nodes()`` tells, those that take engines, by name; nodes that are one to the router come last.

    Args:
        resource: a custom resource that a node must have; None: all that have accelerators.
        wide_resource: a custom resource of the nodes for engines larger than a node.
    """
    alive = [node for node in told if node["Alive"]]
    wide = [node for node in alive if wide_resource is not None and node["Resources"].get(wide_resource, 0) > 0]
    wanted = [node for node in alive if resource is None or node["Resources"].get(resource, 0) > 0]
    return [*_single([node for node in wanted if node not in wide], alive), *_together(wide)]


def _single(wanted: list[Mapping[str, Any]], alive: list[Mapping[str, Any]]) -> list[RayNodeFacts]:
    """With an agent each."""
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


def _together(wide: list[Mapping[str, Any]]) -> list[RayNodeFacts]:
    """With one agent, on the first of them that has accelerators; none if no two have."""
    num_gpus, num_cpus = (sum(_count(node, kind) for node in wide) for kind in ("GPU", "CPU"))
    with_some = sorted(
        (node for node in wide if _count(node, "GPU" if num_gpus else "CPU")), key=lambda node: node["NodeID"]
    )
    if len(with_some) < 2:
        return []
    host, members = with_some[0], "".join(node["NodeID"] for node in with_some)
    return [
        RayNodeFacts(
            id=f"{WIDE}-{hashlib.sha256(members.encode()).hexdigest()[:_DIGEST_CHARS]}",
            name=WIDE,
            address=host["NodeManagerAddress"],
            num_gpus=num_gpus,
            num_cpus=0 if num_gpus else num_cpus,
            host=host["NodeID"],
        )
    ]


def config_there(config: NodeConfig, node: RayNodeFacts, ray_address: str) -> NodeConfig:
    """An agent's configuration on its node: one slot for each accelerator, and engines that others can reach.

    Args:
        ray_address: of the cluster, for an agent of several nodes.
    """
    over_several = {"slots": node.num_gpus or node.num_cpus, "ray_address": ray_address} if node.is_wide else {}
    return config.model_copy(
        update={
            "node_dir": _there(config.node_dir, node),
            "store_dir": _there(config.store_dir, node),
            "store_socket": None if config.store_socket is None else _there(config.store_socket, node),
            "slots": config.slots or node.num_gpus or node.num_cpus,
            "engine_host": node.address,
            **over_several,
        }
    )


def _there(path: Path, node: RayNodeFacts) -> Path:
    return Path(str(path).replace(PLACEHOLDER, node.name))


def _name(node: Mapping[str, Any]) -> str:
    return str(node.get("NodeName") or node["NodeManagerAddress"])


def _count(node: Mapping[str, Any], kind: str) -> int:
    return int(node["Resources"].get(kind, 0))
