"""The router's own core in the simulated world: all invariants after every event, whatever fails."""

from __future__ import annotations

from dataclasses import replace

from sllm_vllm.router.core.router import RouterCore
from sllm_vllm.simulate.hardware import FaultRates, HardwareCluster
from sllm_vllm.simulate.presets import HERE, PAPER
from sllm_vllm.simulate.workload import draw_requests
from sllm_vllm.simulate.world import World
from tests.support.cases import every_case

ROUGH = FaultRates(
    start_share=0.1, crashes_per_hour=20.0, losses_per_hour=10.0, leave_share=0.1, outlier_share=0.05, node_back_s=20.0
)


@every_case("crowding", [1, 6])
@every_case("cluster", [PAPER, HERE])
def test_every_request_ends_once_whatever_fails(cluster: HardwareCluster, crowding: int) -> None:
    traffic = replace(cluster.traffic, rate=cluster.traffic.rate * crowding)
    rough = replace(cluster, traffic=traffic, failures=ROUGH)
    for seed in range(3):
        requests = draw_requests(rough.traffic, list(rough.classes()), 200, seed=seed)
        core = RouterCore()
        run = World(rough, core, seed=seed, is_validated=True).run(requests)
        run.validate(len(requests))
        assert core.requests == {}, f"seed {seed}"


def test_same_seed_has_the_same_result() -> None:
    rough = replace(PAPER, failures=ROUGH)
    requests = draw_requests(rough.traffic, list(rough.classes()), 200, seed=5)
    runs = [World(rough, RouterCore(), seed=5).run(requests) for _ in range(2)]
    assert runs[0] == runs[1]
