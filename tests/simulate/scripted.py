"""A small cluster with round figures, and a policy whose answers a test writes down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sllm_vllm.router.core.events import Event
from sllm_vllm.simulate.hardware import SMOOTH, HardwareCluster, ModelClass, NodeClass, Serving
from sllm_vllm.simulate.policy import Order
from sllm_vllm.simulate.workload import SimulatedRequest, Traffic

KIND = ModelClass(
    name="m",
    nbytes=10_000,
    accelerators=1,
    process_warm_s=1.0,
    process_cold_s=8.0,
    init_s=2.0,
    prefill_rate=100.0,
    tpot_s=0.1,
    prefill_fixed_s=0.5,
    batch_slowdown=0.5,
    stop_s=0.25,
)
NODE = NodeClass(
    num_slots=2,
    host_nbytes=20_000,
    disk_nbytes=40_000,
    remote_bps=1_000.0,
    disk_bps=2_000.0,
    host_bps=10_000.0,
    load_fixed_s=0.0,
)
SMALL = HardwareCluster(
    name="small",
    num_nodes=2,
    node=NODE,
    models=((KIND, 4),),
    traffic=Traffic(rate=1.0),
    failures=SMOOTH,
    serving=Serving(),
)
ONE = replace(SMALL, num_nodes=1)


def asked(
    number: int, at_s: float = 0.0, model: str = "m-0", *, tokens: tuple[int, int] = (50, 20)
) -> SimulatedRequest:
    return SimulatedRequest(f"r{number}", at_s, model, *tokens)


class Scripted:
    """Answers by a function, and remembers what happened when."""

    def __init__(self, answer: Callable[[Event, float], Sequence[Order]]) -> None:
        self._answer = answer
        self.story: list[tuple[float, Event]] = []

    def handle(self, event: Event, now_s: float) -> Sequence[Order]:
        self.story.append((now_s, event))
        return self._answer(event, now_s)

    def times_of(self, kind: type[Event]) -> list[float]:
        return [round(at_s, 9) for at_s, event in self.story if isinstance(event, kind)]

    def all_of(self, kind: type[Event]) -> list[Event]:
        return [event for _, event in self.story if isinstance(event, kind)]
