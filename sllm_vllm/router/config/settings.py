"""The configuration's sections that are also the settings of a running part: server, migration, poison, Ray. Pure.

Durations: seconds, or text like 30s, 10m.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sllm_vllm.router.config.values import Count, Duration, Flag, NumBytes, Text
from sllm_vllm.router.core.facts import PoisonLimits
from sllm_vllm.router.core.migration import MigrationLimits
from sllm_vllm.units import GIB, KIB, MIB

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MIGRATION = MigrationLimits()
_POISON = PoisonLimits()
_STATE_SCHEMES = ("ray", "sqlite", "redis", "rediss")


class Section(BaseModel):
    """One section of the configuration: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ServerSection(Section):
    """The router's address and limits. Durations: seconds, or text like 30s, 10m. Sizes: bytes, or 8MiB."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=253,
        description="address to listen on; without keys it must be loopback",
    )
    port: Count = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    show_paths: Flag = Field(
        default=False, description="let /v1/models show the paths of the weights on the server, not just names"
    )
    body_bytes: NumBytes = Field(
        default=32 * MIB, ge=KIB, le=GIB, description="largest request body; a few images fit into the default"
    )
    bodies_bytes: NumBytes = Field(
        default=GIB, ge=KIB, le=1 << 50, description="largest total size of all request bodies in memory"
    )
    json_depth_max: Count = Field(
        default=256,
        ge=8,
        le=900,
        description="how deep arrays and objects may be nested in a JSON body; deeper ones get 400",
    )
    json_containers_max: Count = Field(
        default=100_000, ge=100, le=10_000_000, description="most arrays and objects in a JSON body; more get 400"
    )
    requests_max: Count = Field(
        default=4096, ge=1, le=1_000_000, description="most concurrent requests, including those that wait"
    )
    waiting_max: Count = Field(
        default=4096, ge=1, le=1_000_000, description="most waiting requests of all models together"
    )
    connections_max: Count = Field(
        default=8192, ge=1, le=1_000_000, description="most concurrent connections of clients"
    )
    body_timeout: Duration = Field(default=60.0, gt=0, description="longest that a client may take to send its body")
    request_timeout: Duration = Field(
        default=3600.0, gt=0, description="longest that a request may take, waiting included"
    )
    slow_client_timeout: Duration = Field(
        default=60.0,
        gt=0,
        description="longest that a client may read nothing while a part of its answer waits; then its connection is"
        " closed",
    )
    idle_timeout: Duration = Field(
        default=300.0, gt=0, description="longest pause between two parts of an engine's answer"
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), max_length=256, description="origins whose pages may read answers; '*' for any; default: none"
    )


class MigrationSection(Section):
    """Moving running requests from one engine to another. Durations: seconds, or text like 30s."""

    enabled: Flag = Field(
        default=True,
        description="start engines so that their requests can be moved; seeded requests then draw other random numbers"
        " than in stock vLLM",
    )
    moves_max: Count = Field(default=4, ge=1, le=1000, description="most concurrent moves of all models together")
    rounds_max: Count = Field(
        default=_MIGRATION.rounds_max,
        ge=0,
        le=100,
        description="rounds in which the target catches up before the switch; 0: it computes everything at the switch",
    )
    round_tokens_max: Count = Field(
        default=_MIGRATION.round_tokens_max,
        ge=16,
        le=1 << 20,
        description="most tokens of one prefill of a round; other requests at the target wait for each prefill",
    )
    round_pause: Duration = Field(
        default=_MIGRATION.round_pause_s, ge=0, le=60, description="pause between two of those prefills"
    )
    switch_timeout: Duration = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="longest that a client waits at the switch; then its request stays on its engine",
    )

    def limits(self) -> MigrationLimits:
        """Return the core's limits of one migration."""
        return MigrationLimits(self.rounds_max, self.round_tokens_max, self.round_pause)


class IngressSettings(ServerSection):
    """What the ingress admits, and its timeouts: the ``server`` section, and what comes from elsewhere."""

    key_digests: tuple[str, ...] = Field(
        default=(), max_length=10_000, description="SHA-256 of each key a client may send, in hexadecimal"
    )
    insecure_no_keys: bool = Field(default=False, description="allow addresses other than loopback without keys")
    moves: MigrationSection | None = Field(
        default=None, description="settings of migration; None: no request is ever moved"
    )
    head_nbytes_max: int = Field(default=64 * KIB, ge=1024, description="largest request line with headers, in bytes")
    head_s_max: float = Field(default=20.0, gt=0, description="seconds that a client may take to send its headers")
    keep_alive_s: int = Field(default=75, ge=1, description="seconds that a client's idle connection is kept open")
    drain_s: int = Field(
        default=30, ge=0, description="seconds that running requests get to finish when the server stops"
    )

    @field_validator("key_digests")
    @classmethod
    def _are_digests(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        if not all(_DIGEST.fullmatch(digest) for digest in digests):
            raise ValueError("each must be 64 lower-case hexadecimal digits, as `sha256sum` prints them")
        return digests


class PoisonSection(Section):
    """Handling of requests that kill their engine. Durations: seconds, or text like 10m."""

    quarantine: Duration = Field(
        default=_POISON.quarantine_s,
        ge=0,
        le=86400,
        description="how long a request that killed its engine, and any with the same body, is refused with 502",
    )
    digests_max: Count = Field(
        default=_POISON.digests_max,
        ge=1,
        le=1_000_000,
        description="most request bodies that are remembered as refused, and most as suspected",
    )
    verdict_timeout: Duration = Field(
        default=_POISON.verdict_s,
        gt=0,
        le=60,
        description="longest that a failed request waits until it is known whether its engine died",
    )
    trial_timeout: Duration = Field(
        default=_POISON.trial_s,
        gt=0,
        le=3600,
        description="a suspected request is cleared if the engine on which it is tried alone survives it for this"
        " long, even without a token",
    )
    last_replica_wait: Duration = Field(
        default=_POISON.last_replica_s,
        ge=0,
        le=3600,
        description="how long a suspected request waits for another replica before it may be tried on the last ready"
        " one, or for its model's only replica to be empty before it is tried there beside other requests",
    )
    resumes_max: Count = Field(
        default=_POISON.resumes_max,
        ge=0,
        le=100,
        description="how often a stream continues on another engine after its engine died; then it ends with an error"
        " event",
    )

    def limits(self) -> PoisonLimits:
        """Return the core's limits."""
        return PoisonLimits(
            quarantine_s=self.quarantine,
            digests_max=self.digests_max,
            verdict_s=self.verdict_timeout,
            trial_s=self.trial_timeout,
            last_replica_s=self.last_replica_wait,
            resumes_max=self.resumes_max,
        )


class RaySection(Section):
    """The router as a Ray Serve application. Durations: seconds, or text like 30s."""

    resource: Text | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="custom Ray resource of the nodes that run engines; default: all nodes with GPUs, or, if there are"
        " none, all with CPUs",
    )
    wide_resource: Text | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="custom Ray resource of the nodes for engines that are larger than one node; the router treats"
        " these nodes as one, `wide`, and vLLM's own Ray executor places the engines' workers",
    )
    copies: Count = Field(
        default=2,
        ge=1,
        le=1000,
        description="most nodes that hold a hot checkpoint, which is copied to them before it is needed; 1: never"
        " copied",
    )
    ingress_min: Count = Field(default=1, ge=1, le=1000, description="least number of ingress replicas")
    ingress_max: Count = Field(default=4, ge=1, le=1000, description="largest number of ingress replicas")
    ingress_ongoing: Count = Field(
        default=100, ge=1, le=100_000, description="concurrent requests per ingress replica; more start another one"
    )
    state: Text = Field(
        default="ray:",
        max_length=1024,
        description="where deployed models and learned estimates are kept: `ray:` for the life of the cluster;"
        " `sqlite:PATH` or `redis://HOST:PORT` beyond it",
    )
    linger: Duration = Field(
        default=60.0, gt=0, le=86400, description="how long agents and engines are kept without an ingress replica"
    )

    @field_validator("state")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value.partition(":")[0] not in _STATE_SCHEMES:
            raise ValueError(f"must begin with one of {', '.join(f'{name}:' for name in _STATE_SCHEMES)}")
        return value
