"""A Ray cluster of several nodes on this machine, with the router as its Serve application, and ways to kill its parts.

Every node is its own raylet; all share processors, loopback and disk. The head node takes no engines.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import serve
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster
from ray.serve.config import HTTPOptions, ProxyLocation

from sllm_vllm.node.client import NodeClient
from sllm_vllm.ray.agent import NAMESPACE
from sllm_vllm.ray.serve import CONTROLLER, Arguments, build
from sllm_vllm.router.config.keys import digest_of

ADMIN_KEY = "the-operators-own-key"
OBJECTS_NBYTES = 80 << 20
RESOURCE = "sllm"
"""The Ray resource of nodes that take engines."""

Sections = dict[str, Any]
C = TypeVar("C", bound="RayCluster")


@dataclass
class RayCluster:
    """A cluster, and the application's address once it is deployed. ``directory`` contains all nodes' directories."""

    directory: Path
    cluster: Cluster
    port: int
    environment: Mapping[str, str]
    """Environment variables that nodes' processes get in addition to this process's."""
    nodes: dict[str, Any] = field(default_factory=dict)
    """The nodes that take engines, by name."""

    @property
    def url(self) -> str:
        """URL of the application."""
        return f"http://127.0.0.1:{self.port}"

    def add_node(self, name: str, *, num_cpus: int = 2) -> None:
        """Add a node that takes engines, one for each of its processors."""
        self.nodes[name] = self.cluster.add_node(
            node_name=name,
            num_cpus=num_cpus,
            resources={RESOURCE: 1},
            object_store_memory=OBJECTS_NBYTES,
            include_dashboard=False,
            env_vars=dict(self.environment),
        )

    def kill_node(self, name: str) -> None:
        """Send SIGKILL to a node's raylet, as if the machine were lost."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)

    def agent(self, name: str) -> NodeClient:
        """A client for the socket of a node's agent."""
        return NodeClient(self.directory / "nodes" / name / "socket")

    def kill_agent(self, name: str) -> None:
        """Send SIGKILL to the process of a node's agent."""
        os.kill(self.agent(name).report().pid, signal.SIGKILL)

    def kill_controller(self) -> None:
        """End the controller actor's process as a crash would."""
        actor = ray.get_actor(CONTROLLER, namespace=NAMESPACE)
        ray.kill(actor, no_restart=False)

    def ingresses(self) -> list[int]:
        """Process ids of the living ingresses."""
        actors = ray._private.state.actors().values()  # the public API needs the dashboard
        return [one["Pid"] for one in actors if one["State"] == "ALIVE" and "sllm-ingress" in one["Name"]]

    def kill_ingress(self) -> None:
        """Send SIGKILL to the process of one ingress."""
        os.kill(self.ingresses()[0], signal.SIGKILL)

    def living_nodes(self) -> set[str]:
        """Names of the living nodes that take engines, according to Ray."""
        return {one["NodeName"] for one in ray.nodes() if one["Alive"] and RESOURCE in one["Resources"]}

    def num_cpus_free(self) -> float:
        """Processors that Ray would give to other work: 0 while every living node's agent holds its processors."""
        return float(ray.available_resources().get("CPU", 0.0))

    def deploy(self, sections: Sections) -> None:
        """Write the configuration and deploy the application, or redeploy it; returns when it is up."""
        path = self.directory / "router.yaml"
        path.write_text(json.dumps(sections))  # JSON is YAML
        serve.run(build(Arguments(config=str(path))), name="sllm", route_prefix="/")


def sections_of(directory: Path, models: dict[str, dict[str, Any]], **more: dict[str, Any]) -> Sections:
    """A configuration for the cluster; everything is below ``directory``, separate for each node.

    Args:
        models: the configuration of each model, by name.
        more: keys of the sections ``server``, ``node``, ``ray`` and ``defaults``, as mappings.
    """
    return {
        "server": {"requests_max": 1000, **more.get("server", {})},
        "keys": {"insecure_no_keys": True, "admin": [{"sha256": digest_of(ADMIN_KEY)}]},
        "node": {"node_dir": str(directory / "nodes" / "{node}"), **more.get("node", {})},
        "store": {"directory": str(directory / "stores" / "{node}")},
        "ray": {"resource": RESOURCE, "state": f"sqlite:{directory / 'state.sqlite'}", **more.get("ray", {})},
        "defaults": more.get("defaults", {}),
        "models": [{"name": name, **values} for name, values in models.items()],
    }


@contextmanager
def ray_cluster(
    kind: type[C], directory: Path, *names: str, environment: Mapping[str, str] | None = None
) -> Iterator[C]:
    """Run a head node without engines, and nodes with these names; Serve listens on the head. Yields a ``kind``."""
    Path(get_ray_address_file(None)).parent.mkdir(exist_ok=True)  # Cluster writes there, but does not create it
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:  # sockets' paths have to be short
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": OBJECTS_NBYTES,
                "temp_dir": temporary,
                "env_vars": dict(environment or {}),
            },
        )
        try:
            ray.init(address=cluster.address, namespace="tests", log_to_driver=False)
            port = free_port()
            serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host="127.0.0.1", port=port))
            made = kind(directory, cluster, port, {"RAY_worker_niceness": "0", **(environment or {})})
            for name in names:
                made.add_node(name)
            yield made
        finally:
            ray.shutdown()
            cluster.shutdown()


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port
