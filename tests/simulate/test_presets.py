"""The clusters that are simulated by name, and what follows from their figures."""

from __future__ import annotations

import pytest

from sllm_vllm.errors import ConfigError
from sllm_vllm.router.core.events import NodeReported
from sllm_vllm.router.core.facts import Tier
from sllm_vllm.simulate.presets import A40_NODE, OPT_30, OPT_67, PRESETS, preset
from sllm_vllm.simulate.world import World
from tests.simulate.scripted import Scripted
from tests.support.cases import every_case

NAMES = sorted(PRESETS)


@every_case("name", NAMES)
def test_every_model_fits_a_node(name: str) -> None:
    cluster = preset(name)
    for kind, count in cluster.models:
        assert count > 0
        assert kind.accelerators <= cluster.node.num_slots
        assert kind.nbytes <= min(cluster.node.host_nbytes, cluster.node.disk_nbytes)


@every_case("name", NAMES)
def test_model_names_are_distinct_and_deployed_as_they_are(name: str) -> None:
    cluster = preset(name)
    classes = cluster.classes()
    assert len(classes) == sum(count for _, count in cluster.models)
    for model, kind in list(classes.items())[:100]:
        spec = cluster.spec(model, kind)
        assert (spec.name, spec.accelerators, spec.nbytes) == (model, kind.accelerators, kind.nbytes)


def test_paper_s_models_fit_one_disk_and_not_its_memory() -> None:
    """So where a model is in memory matters, and no node has to fetch one."""
    cluster = preset("paper")
    total = sum(kind.nbytes * count for kind, count in cluster.models)
    assert cluster.node.host_nbytes < total <= cluster.node.disk_nbytes


def test_bound_never_reads_a_disk() -> None:
    cluster = preset("paper-in-memory")
    models = list(cluster.classes())
    policy = Scripted(lambda event, now_s: [])
    World(cluster, policy, seed=0).run([])
    for report in policy.all_of(NodeReported):
        assert isinstance(report, NodeReported)
        assert report.residency == dict.fromkeys(models, Tier.HOST)
    assert cluster.models == preset("paper").models


def test_load_takes_bytes_over_the_slowest_hop() -> None:
    assert A40_NODE.weights_s(OPT_67, Tier.DISK) == pytest.approx(0.05 + 13.4 / 6.0)
    assert A40_NODE.weights_s(OPT_67, Tier.HOST) == pytest.approx(0.05 + 13.4 / 24.0)
    assert A40_NODE.weights_s(OPT_67, Tier.REMOTE) == pytest.approx(0.05 + 13.4 / 1.25)
    assert A40_NODE.weights_s(OPT_30, Tier.HOST) == pytest.approx(0.05 + 60 / 48.0)


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="paper"):
        preset("huge")
