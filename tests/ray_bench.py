"""A Ray cluster of several nodes on this machine, with the router as its Serve application; asked over real sockets."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import HTTPOptions, ProxyLocation

from sllm_vllm.node.client import NodeClient
from sllm_vllm.node.ray_agent import NAMESPACE
from sllm_vllm.router.keys import digest_of
from sllm_vllm.router.ray_serve import CONTROLLER, Arguments, build
from tests.router.router_process import FAKE_ENGINE, RouterUnderTest
from tests.waiting import wait_until

ADMIN_KEY = "the-operators-own-key"
OBJECTS_NBYTES = 80 << 20
RESOURCE = "sllm"
"""What nodes have that take engines; the head has none."""


@dataclass
class RayBench:
    """A cluster, and the application's address once it is deployed."""

    directory: Path
    cluster: Cluster
    port: int
    nodes: dict[str, Any] = field(default_factory=dict)
    """By name: those with an agent."""
    answer_s_max: float = 60.0

    @property
    def url(self) -> str:
        """Of the application."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def router(self) -> RouterUnderTest:
        """For its questions alone: there is no process behind it."""
        return RouterUnderTest(self.directory, None, self.url, self.answer_s_max, ADMIN_KEY)  # type: ignore[arg-type]

    def add_node(self, name: str, *, num_cpus: int = 2) -> None:
        """A node that takes engines."""
        self.nodes[name] = self.cluster.add_node(
            node_name=name,
            num_cpus=num_cpus,
            resources={RESOURCE: 1},
            object_store_memory=OBJECTS_NBYTES,
            include_dashboard=False,
        )

    def kill_node(self, name: str) -> None:
        """SIGKILL to its raylet: the machine is gone."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)

    def agent(self, name: str) -> NodeClient:
        """The agent's own socket."""
        return NodeClient(self.directory / "nodes" / name / "socket")

    def kill_agent(self, name: str) -> None:
        """SIGKILL to the actor's process."""
        os.kill(self.agent(name).report().pid, signal.SIGKILL)

    def kill_controller(self) -> None:
        """End the actor's process as a crash does."""
        actor = ray.get_actor(CONTROLLER, namespace=NAMESPACE)
        ray.kill(actor, no_restart=False)

    def kill_ingress(self) -> None:
        """SIGKILL to the process of one of them."""
        actors = ray._private.state.actors().values()  # the public way asks the dashboard
        living = [one for one in actors if one["State"] == "ALIVE" and "sllm-ingress" in one["Name"]]
        os.kill(living[0]["Pid"], signal.SIGKILL)

    def deploy(self, **sections: Any) -> None:
        """Write the configuration, and deploy the application, or deploy it otherwise; returns when it is up."""
        path = self.directory / "router.yaml"
        path.write_text(json.dumps(sections))  # JSON is YAML
        serve.run(build(Arguments(config=str(path))), name="sllm", route_prefix="/")

    def node_views(self) -> dict[str, Any]:
        """What the admin API tells of nodes, by name."""
        return {one["id"]: one for one in self.router.admin("nodes").body["nodes"]}

    def wait_for_nodes(self, *names: str) -> None:
        """Until exactly these have joined."""
        wait_until(lambda: set(self.node_views()) == set(names), f"nodes {names}")


def fake_sections(directory: Path, *models: str, **more: Any) -> dict[str, Any]:
    """A configuration with engines that start in a moment; a model is called as it behaves."""
    return {
        "server": {"requests_max": 1000},
        "keys": {"insecure_no_keys": True, "admin": [{"sha256": digest_of(ADMIN_KEY)}]},
        "node": {
            "memory": "1GiB",
            "warm": False,
            "node_dir": str(directory / "nodes" / "{node}"),
            "engine_command": [sys.executable, str(FAKE_ENGINE), "serve"],
        },
        "store": {"directory": str(directory / "stores" / "{node}")},
        "ray": {"resource": RESOURCE, "state": f"sqlite:{directory / 'state.sqlite'}"},
        "models": [{"name": name, "source": f"/models/{name}"} for name in models],
        **more,
    }


@contextmanager
def ray_cluster(directory: Path, *names: str, num_cpus: int = 2) -> Iterator[RayBench]:
    """A head that takes no engines, and nodes of these names; Serve listens at the head."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:  # sockets' paths have to be short
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": OBJECTS_NBYTES,
                "temp_dir": temporary,
            },
        )
        try:
            ray.init(address=cluster.address, namespace="tests", log_to_driver=False)
            port = free_port()
            serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host="127.0.0.1", port=port))
            bench = RayBench(directory, cluster, port)
            for name in names:
                bench.add_node(name, num_cpus=num_cpus)
            yield bench
        finally:
            ray.shutdown()
            cluster.shutdown()


def free_port() -> int:
    """One that nobody listens on now."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
