"""Which of a Ray cluster's nodes get an agent, and what that agent may use. Pure.

A node's agent holds all of the node's accelerators: its GPUs, or, in a cluster without GPUs, its CPUs. Nodes reserved
for engines larger than a node share one agent, which holds none: vLLM's Ray executor takes what each engine needs from
Ray, so these nodes' accelerators must stay free.
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
"""In a path of the configuration, replaced by the node's name; for nodes that share a file system."""
WIDE = "wide"
"""Name of several nodes that share one agent."""
_ID_CHARS, _DIGEST_CHARS = 8, 16


@dataclass(frozen=True, slots=True)
class RayNodeFacts:
    """A node that takes engines. ``id`` is Ray's; ``name`` is shown to operators and stays the same after a restart
    where possible.

    ``address``: the node's IP in the cluster. Its agent holds either ``num_gpus`` or ``num_cpus``. If ``host`` is set,
    this stands for several nodes that the router sees as one, and the numbers are their totals: ``host`` is Ray's id of
    the node that runs the agent, and ``id`` changes whenever one of the nodes joins or leaves.
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
    """The nodes that take engines, out of what ``ray.nodes()`` returns; sorted by name, the group of wide nodes last.

    Args:
        resource: a custom resource that a node must have; None: all that have accelerators.
        wide_resource: a custom resource of the nodes for engines larger than a node.
    """
    alive = [node for node in told if node["Alive"]]
    wide = [node for node in alive if wide_resource is not None and node["Resources"].get(wide_resource, 0) > 0]
    wanted = [node for node in alive if resource is None or node["Resources"].get(resource, 0) > 0]
    return [*_single([node for node in wanted if node not in wide], alive), *_together(wide)]


def _single(wanted: list[Mapping[str, Any]], alive: list[Mapping[str, Any]]) -> list[RayNodeFacts]:
    """Nodes with an agent each."""
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
    """The nodes that share one agent, which runs on the first of them with accelerators; none unless two or more have
    some."""
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
    """The configuration of a node's agent: one slot for each accelerator, and engines that other nodes can reach.

    Args:
        ray_address: address of the cluster, for an agent of several nodes.
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
