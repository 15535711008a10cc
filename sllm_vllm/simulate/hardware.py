"""The simulated machines, models and failures; times follow from bytes and rates. Pure, frozen records."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sllm_vllm.router.core.facts import ModelSpec, Tier
from sllm_vllm.simulate.workload import Traffic


@dataclass(frozen=True, slots=True)
class ModelClass:
    """A kind of model, of which many may be deployed. ``batch_slowdown``: what each further request in a batch adds to
    the time per output token of a single one (``tpot_s``), as a fraction of it. ``prefill_rate``: tokens a second."""

    name: str
    nbytes: int
    accelerators: int
    process_warm_s: float
    process_cold_s: float
    init_s: float
    prefill_rate: float
    tpot_s: float
    prefill_fixed_s: float = 0.02
    batch_slowdown: float = 0.03
    stop_s: float = 0.5

    def process_s(self, is_warm: bool) -> float:
        """Seconds until its workers run."""
        return self.process_warm_s if is_warm else self.process_cold_s

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds until the first token, alone on a replica."""
        return self.prefill_fixed_s + num_tokens / self.prefill_rate

    def token_s(self, num_requests: int) -> float:
        """Seconds between two tokens of a request, in a batch of ``num_requests``."""
        return self.tpot_s * (1 + self.batch_slowdown * (num_requests - 1))


@dataclass(frozen=True, slots=True)
class NodeClass:
    """A kind of machine. Each rate is that of one hop alone. ``host_bps`` is for one accelerator; accelerators load in
    parallel."""

    num_slots: int
    host_nbytes: int
    disk_nbytes: int
    remote_bps: float
    disk_bps: float
    host_bps: float
    load_fixed_s: float = 0.05
    is_warm: bool = True

    def rate_bps(self, tier: Tier, accelerators: int = 1) -> float:
        """The rate from a tier to the devices: that of the slowest hop, since all hops work at the same time."""
        host_bps = self.host_bps * accelerators
        below = {Tier.HOST: host_bps, Tier.DISK: self.disk_bps, Tier.REMOTE: self.remote_bps}
        return min(host_bps, below[tier])

    def weights_s(self, model: ModelClass, tier: Tier) -> float:
        """Seconds of one load, without waiting for others."""
        return self.load_fixed_s + model.nbytes / self.rate_bps(tier, model.accelerators)


@dataclass(frozen=True, slots=True)
class FaultRates:
    """What fails, and how often. ``noise_sigma``: sigma of the logarithm of a start's durations; ``outlier_share`` of
    them take ``outlier_factor`` times as long. ``leave_share`` of the clients leave after up to ``leave_s_max``."""

    start_share: float = 0.0
    crashes_per_hour: float = 0.0
    """For each replica."""
    losses_per_hour: float = 0.0
    """For each node."""
    node_back_s: float = 120.0
    noise_sigma: float = 0.05
    outlier_share: float = 0.01
    outlier_factor: float = 5.0
    leave_share: float = 0.0
    leave_s_max: float = 20.0

    def noise(self, rng: random.Random) -> float:
        """A random factor for one duration."""
        factor = self.outlier_factor if rng.random() < self.outlier_share else 1.0
        return factor * rng.lognormvariate(0.0, self.noise_sigma)


SMOOTH = FaultRates(noise_sigma=0.0, outlier_share=0.0)
"""No failures, and every start takes exactly its nominal time."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How each model is deployed; the names are ``ModelSpec``'s."""

    max_replicas: int = 4
    target_ongoing: int = 4
    ongoing_max: int = 8
    queue_max: int = 1024
    queue_s_max: float = 300.0


@dataclass(frozen=True, slots=True)
class HardwareCluster:
    """Everything that a run needs except its requests. ``on_disk``: how many nodes have each model on disk at first."""

    name: str
    num_nodes: int
    node: NodeClass
    models: tuple[tuple[ModelClass, int], ...]
    traffic: Traffic
    failures: FaultRates = SMOOTH
    serving: Serving = Serving()
    on_disk: int = 1_000_000
    is_in_memory: bool = False
    """Every node has every model in memory at first, as far as it fits."""

    def classes(self) -> dict[str, ModelClass]:
        """The class of each model, by its name."""
        return {f"{kind.name}-{number}": kind for kind, count in self.models for number in range(count)}

    def spec(self, model: str, kind: ModelClass) -> ModelSpec:
        """The model's deployment."""
        serving = self.serving
        return ModelSpec(
            name=model,
            accelerators=kind.accelerators,
            max_replicas=serving.max_replicas,
            target_ongoing=serving.target_ongoing,
            ongoing_max=serving.ongoing_max,
            queue_max=serving.queue_max,
            queue_s_max=serving.queue_s_max,
            nbytes=kind.nbytes,
        )
