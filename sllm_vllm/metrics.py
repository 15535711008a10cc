"""Every metric of this package: name, unit, help and labels, in one place. Pure; who exports them fills them in.

Names follow Prometheus: base units (seconds, bytes) as suffix, ``_total`` for what only grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

SERIES_MAX = 1000
"""Most checkpoints that get series of their own."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One name that is exported. It is a counter if it ends in ``_total``, else a gauge."""

    name: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def is_counter(self) -> bool:
        """Whether it only grows, until the daemon starts anew."""
        return self.name.endswith("_total")


class StoreMetric(Enum):
    """What the store's daemon tells of itself."""

    INFO = Metric("sllm_store_info", "", "Always 1; the labels say which daemon this is.", ("version", "policy"))
    UPTIME = Metric("sllm_store_uptime_seconds", "seconds", "Time since the daemon started.")
    POOL_SLOTS = Metric("sllm_store_pool_slots", "slots", "Slots of the pool, by state.", ("state",))
    POOL_KEPT = Metric("sllm_store_pool_kept_slots", "slots", "Ready slots that an engine maps, or that are pinned.")
    POOL_PINNED = Metric("sllm_store_pool_pinned_slots", "slots", "Ready slots that are pinned.")
    POOL_SLOT_NBYTES = Metric("sllm_store_pool_slot_bytes", "bytes", "Size of a slot.")
    TIER_NBYTES = Metric("sllm_store_tier_bytes", "bytes", "Bytes of checkpoints that lie in a tier.", ("tier",))
    TIER_CAPACITY = Metric("sllm_store_tier_capacity_bytes", "bytes", "Bytes a tier may hold, if bounded.", ("tier",))
    TIER_CHECKPOINTS = Metric("sllm_store_tier_checkpoints", "checkpoints", "Checkpoints in a tier.", ("tier",))
    RESIDENT_NBYTES = Metric(
        "sllm_store_checkpoint_resident_bytes", "bytes", "Bytes of a partition that lie in the pool.", ("name", "rank")
    )
    LEASES = Metric("sllm_store_leases", "leases", "Leases that are open.")
    CLIENTS = Metric("sllm_store_clients", "connections", "Connections that are open.")
    HITS = Metric("sllm_store_span_hits_total", "spans", "Spans that a lease found in memory.")
    MISSES = Metric("sllm_store_span_misses_total", "spans", "Spans that had to be read for a lease.")
    EVICTIONS = Metric("sllm_store_evictions_total", "spans", "Spans evicted from memory.")
    READS_FAILED = Metric("sllm_store_reads_failed_total", "reads", "Reads of a span that failed.")
    IN_FLIGHT_NBYTES = Metric("sllm_store_in_flight_bytes", "bytes", "Bytes being read or written right now.")
    HOP_NBYTES = Metric("sllm_store_hop_bytes_total", "bytes", "Bytes that went through a hop.", ("hop",))
    HOP_SECONDS = Metric("sllm_store_hop_seconds_total", "seconds", "Time in which a hop was busy.", ("hop",))
    HOP_LIMIT = Metric(
        "sllm_store_hop_limit_bytes_per_second", "bytes per second", "What a hop can do alone, if measured.", ("hop",)
    )
    JOBS = Metric("sllm_store_jobs", "jobs", "Jobs of the device, by kind and state.", ("kind", "state"))
