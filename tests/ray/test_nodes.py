"""Which nodes of a Ray cluster get an agent, what it holds, and how nodes for large engines are put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sllm_vllm.config import NodeConfig
from sllm_vllm.ray.nodes import RayNodeFacts, config_there, nodes_for_agents


def told(name: str, *, node_id: str = "", alive: bool = True, **resources: float) -> dict[str, Any]:
    """As ``ray.nodes()`` tells of one."""
    return {
        "NodeID": node_id or f"id-of-{name}",
        "NodeName": name,
        "NodeManagerAddress": f"10.0.0.{len(name)}",
        "Alive": alive,
        "Resources": {"memory": 1e9, **resources},
    }


def test_nodes_with_gpus_hold_those() -> None:
    found = nodes_for_agents([told("b", CPU=8, GPU=4), told("aa", CPU=8, GPU=2)])
    assert found == [
        RayNodeFacts(id="id-of-aa", name="aa", address="10.0.0.2", num_gpus=2, num_cpus=0),
        RayNodeFacts(id="id-of-b", name="b", address="10.0.0.1", num_gpus=4, num_cpus=0),
    ]


def test_without_any_gpu_processors_are_held_and_a_head_without_is_left_alone() -> None:
    found = nodes_for_agents([told("head", CPU=0), told("a", CPU=2)])
    assert [(one.name, one.num_cpus) for one in found] == [("a", 2)]


def test_where_some_have_gpus_the_others_get_no_agent() -> None:
    assert [one.name for one in nodes_for_agents([told("a", CPU=8), told("b", CPU=8, GPU=1)])] == ["b"]


def test_a_node_that_is_dead_or_lacks_the_resource_gets_none() -> None:
    nodes = [told("a", CPU=2, sllm=1), told("b", CPU=2), told("c", CPU=2, sllm=1, alive=False)]
    assert [one.name for one in nodes_for_agents(nodes, resource="sllm")] == ["a"]


def test_nodes_of_one_name_are_told_apart() -> None:
    found = nodes_for_agents([told("a", node_id="1" * 20, CPU=1), told("a", node_id="2" * 20, CPU=1)])
    assert [one.name for one in found] == ["a-11111111", "a-22222222"]


def test_nodes_for_large_engines_are_one_and_hold_nothing() -> None:
    nodes = [told("a", CPU=8, GPU=8), *(told(name, CPU=8, GPU=8, big=1) for name in ("x", "yy"))]
    single, wide = nodes_for_agents(nodes, wide_resource="big")
    assert (single.name, single.num_gpus, single.is_wide) == ("a", 8, False)
    assert (wide.name, wide.num_gpus, wide.host, wide.address) == ("wide", 16, "id-of-x", "10.0.0.1")
    assert wide.is_wide


def test_what_several_nodes_are_called_changes_with_who_they_are() -> None:
    x, y, z = (told(name, GPU=8, big=1) for name in "xyz")
    ids = {
        tuple(one.id for one in nodes_for_agents(nodes, wide_resource="big")) for nodes in ([x, y], [y, x], [x, y, z])
    }
    assert len(ids) == 2


def test_one_node_alone_is_not_several() -> None:
    assert nodes_for_agents([told("x", GPU=8, big=1)], wide_resource="big") == []


def test_an_agents_configuration_on_its_node() -> None:
    config = NodeConfig(node_dir=Path("/n/{node}"), store_dir=Path("/s/{node}"), store_socket=Path("/s/{node}/socket"))
    node = RayNodeFacts(id="1", name="a", address="10.0.0.1", num_gpus=4, num_cpus=0)
    there = config_there(config, node, "10.0.0.9:6379")
    assert (there.node_dir, there.store_dir, there.store_socket) == (Path("/n/a"), Path("/s/a"), Path("/s/a/socket"))
    assert (there.slots, there.engine_host, there.ray_address) == (4, "10.0.0.1", None)
    assert config_there(config.model_copy(update={"slots": 2}), node, "").slots == 2


def test_an_agent_of_several_nodes_has_all_their_accelerators() -> None:
    nodes = [told(name, GPU=8, big=1) for name in ("x", "y")]
    (wide,) = nodes_for_agents(nodes, wide_resource="big")
    there = config_there(NodeConfig(slots=2), wide, "10.0.0.9:6379")
    assert (there.slots, there.ray_address, there.engine_host) == (16, "10.0.0.9:6379", "10.0.0.1")
