"""All metrics of this package: name, unit, help and labels. Pure; their values come from the modules that export them.

Names follow Prometheus: base units (seconds, bytes) as suffix, ``_total`` for counters.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

SERIES_MAX = 1000
"""Most checkpoints, or models, that get their own time series."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric: a counter if its name ends in ``_total``, a histogram if it has buckets, else a gauge."""

    name: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, in its unit."""

    @property
    def is_counter(self) -> bool:
        """Whether the value only grows until the daemon restarts."""
        return self.name.endswith("_total")


class StoreMetric(Enum):
    """Metrics of the store's daemon."""

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


class EngineMetric(Enum):
    """Metrics of an engine, in addition to vLLM's own."""

    RESUME_SUPPORTED = Metric(
        "sllm_engine_resume_supported", "", "1 if requests can be moved here and away exactly, 0 if not."
    )


REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class RouterMetric(Enum):
    """Metrics of the router. Those that vLLM has, too, keep vLLM's names and are summed over a model's engines."""

    RUNNING = Metric("vllm:num_requests_running", "requests", "Requests that replicas have now.", ("model_name",))
    WAITING = Metric("vllm:num_requests_waiting", "requests", "Requests that wait for a replica.", ("model_name",))
    PROMPT_TOKENS = Metric("vllm:prompt_tokens_total", "tokens", "Prompt tokens, as engines told.", ("model_name",))
    OUTPUT_TOKENS = Metric(
        "vllm:generation_tokens_total", "tokens", "Tokens that were generated, as engines told.", ("model_name",)
    )
    INFO = Metric("sllm_router_info", "", "Always 1; the label says which router this is.", ("version",))
    MODELS = Metric("sllm_router_models", "models", "Models that are deployed.")
    REPLICAS = Metric("sllm_router_replicas", "replicas", "Replicas of a model, by state.", ("model_name", "state"))
    REQUESTS = Metric(
        "sllm_router_requests_total", "requests", "Requests that a replica had, by outcome.", ("model_name", "outcome")
    )
    REJECTIONS = Metric("sllm_router_rejections_total", "requests", "Requests that got no replica.", ("reason",))
    TTFT = Metric(
        "vllm:time_to_first_token_seconds",
        "seconds",
        "From a request's arrival until the first byte of its answer, waiting included.",
        ("model_name",),
        buckets=REQUEST_BUCKETS,
    )
    DURATION = Metric(
        "vllm:e2e_request_latency_seconds",
        "seconds",
        "From a request's arrival until the end of its answer.",
        ("model_name",),
        buckets=REQUEST_BUCKETS,
    )
    QUEUE_WAIT = Metric(
        "vllm:request_queue_time_seconds",
        "seconds",
        "How long a request waited for a replica.",
        ("model_name",),
        buckets=REQUEST_BUCKETS,
    )
    CONNECTIONS = Metric("sllm_router_connections", "connections", "Clients' connections that are open.")
    CONNECTIONS_REFUSED = Metric(
        "sllm_router_connections_refused_total", "connections", "Connections over the limit, closed at once."
    )
    SLOW_CLIENTS = Metric(
        "sllm_router_slow_clients_total", "connections", "Connections ended because their client took nothing."
    )
    STARTS = Metric("sllm_router_starts_total", "starts", "Starts of replicas, by how they ended.", ("outcome",))
    START_SECONDS = Metric(
        "sllm_router_start_seconds",
        "seconds",
        "Startup time: from the order until the replica was ready.",
        ("start",),
        buckets=(0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
    )
    START_FAILURES = Metric(
        "sllm_router_start_failures", "starts", "Failed starts of a model in a row.", ("model_name",)
    )
    MOVES = Metric("sllm_router_moves_total", "moves", "Live migrations of requests, by how they ended.", ("outcome",))
    MOVE_TOKENS = Metric("sllm_router_move_tokens_total", "tokens", "Tokens that targets computed anew in rounds.")
    MOVE_HELD_SECONDS = Metric(
        "sllm_router_move_held_seconds",
        "seconds",
        "How long a moved request's client got nothing while its target took over.",
        buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    )
    PREDICTED = Metric(
        "sllm_router_last_start_predicted_seconds",
        "seconds",
        "What the last start of a model was expected to take, from the decision to its first answer.",
        ("model_name",),
    )
    ACTUAL = Metric(
        "sllm_router_last_start_actual_seconds",
        "seconds",
        "What the last start of a model took, from the decision to its first answer.",
        ("model_name",),
    )
    SLOTS = Metric("sllm_router_slots", "slots", "Accelerator slots of a node.", ("node",))
    FREE_SLOTS = Metric("sllm_router_free_slots", "slots", "Slots of a node that no replica has.", ("node",))
