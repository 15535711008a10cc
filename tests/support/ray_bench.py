"""The Serve application on a real Ray cluster, as tests ask it: whole streams, ends of others, what is held by whom."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.ray import cluster as ray_cluster
from benchmarks.ray.cluster import ADMIN_KEY, RayCluster, sections_of
from tests.support.router_process import FAKE_ENGINE, Cut, RouterUnderTest, Stream
from tests.support.waiting import DEADLINE_S, wait_until


class RayBench(RayCluster):
    """A cluster that is asked over real sockets."""

    answer_s_max: float = DEADLINE_S

    @property
    def router(self) -> RouterUnderTest:
        """For its questions alone: there is no process behind it."""
        return RouterUnderTest(self.directory, None, self.url, self.answer_s_max, ADMIN_KEY)  # type: ignore[arg-type]

    def node_views(self) -> dict[str, Any]:
        """What the admin API tells of nodes, by name."""
        return {one["id"]: one for one in self.router.admin("nodes").body["nodes"]}

    def replicas(self, model: str | None = None) -> list[dict[str, Any]]:
        """What the admin API tells of them."""
        found = self.router.admin("replicas").body["replicas"]
        return [one for one in found if model in (None, one["model"])]

    def nodes_of(self, model: str) -> set[str]:
        """Those that have a replica of it."""
        return {one["node"] for one in self.replicas(model)}

    def wait_for_nodes(self, *names: str) -> None:
        """Until exactly these have joined."""
        wait_until(lambda: set(self.node_views()) == set(names), f"nodes {names}")

    def assert_nothing_is_held_twice(self) -> None:
        """Ray counts no processor of the nodes as free, and the router no place that a replica has."""
        wait_until(lambda: self.living_nodes() == set(self.nodes), "Ray to know who lives")
        wait_until(lambda: self.num_cpus_free() == 0, "the agents to hold all processors")
        for view in self.node_views().values():
            owners = [slot["replica"] for slot in view["report"]["slots"] if slot["replica"]]
            assert len(owners) <= view["num_slots"] == 2
        pids = [one["report"]["pid"] for one in self.replicas() if one["report"]]
        assert len(set(pids)) == len(pids)


def end_of(stream: Stream) -> str:
    """How it ended: properly, with an error's code, or cut."""
    try:
        last = stream.rest()[-1]
    except Cut:
        return "cut"
    return last if isinstance(last, str) else str(last["error"]["code"])


def fake_sections(directory: Path, models: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A configuration with engines that start in a moment; a model is called as it behaves."""
    node = {"memory": "1GiB", "warm": False, "engine_command": [sys.executable, str(FAKE_ENGINE), "serve"]}
    models = {name: {"source": f"/models/{name}", **values} for name, values in models.items()}
    return sections_of(directory, models, node=node, **more)


@contextmanager
def ray_bench(directory: Path, *names: str, environment: Mapping[str, str] | None = None) -> Iterator[RayBench]:
    """A cluster with nodes of these names."""
    with ray_cluster.ray_cluster(RayBench, directory, *names, environment=environment) as bench:
        yield bench
