"""Settings of the ingress: keys, limits and timeouts. Frozen; the router's configuration fills them in."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sllm_vllm.units import GIB, MIB

_DIGEST = re.compile(r"[0-9a-f]{64}")


class MoveSettings(BaseModel):
    """How running requests are moved between engines."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds_max: int = Field(default=6, ge=0, le=100, description="rounds in which a target catches up; 0: none")
    round_tokens_max: int = Field(
        default=2048,
        ge=16,
        description="tokens of one prefill of a round, at most; others there wait for it",
    )
    round_pause_s: float = Field(default=0.0, ge=0, le=60, description="between two of them")
    round_s_max: float = Field(default=120.0, gt=0, description="longest for one of them")
    switch_s_max: float = Field(default=10.0, gt=0, description="longest that a stream is held for its target")
    move_s_max: float = Field(default=600.0, gt=0, description="longest for a whole move")


class IngressSettings(BaseModel):
    """What the ingress admits, and its timeouts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_digests: tuple[str, ...] = Field(
        default=(), max_length=10_000, description="SHA-256 of each key a client may send, in hexadecimal"
    )
    insecure_no_keys: bool = Field(
        default=False, description="without keys, listen on other addresses than loopback too"
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), max_length=256, description="origins whose pages may read answers; '*' for any"
    )

    show_paths: bool = Field(
        default=False, description="/v1/models shows where weights are on this machine, not only names"
    )

    body_nbytes_max: int = Field(default=32 * MIB, ge=1024, description="largest body of a request")
    bodies_nbytes_max: int = Field(default=1 * GIB, ge=1024, description="bodies of all requests together")
    json_depth_max: int = Field(
        default=256, ge=8, le=900, description="how deep arrays and objects of a JSON body may be nested"
    )
    json_containers_max: int = Field(
        default=100_000, ge=100, le=10_000_000, description="arrays and objects that a JSON body may have"
    )
    head_nbytes_max: int = Field(default=64 * 1024, ge=1024, description="request line and headers of a request")
    requests_max: int = Field(default=4096, ge=1, description="requests at once")
    connections_max: int = Field(default=8192, ge=1, description="clients' connections at once")

    head_s_max: float = Field(default=20.0, gt=0, description="longest for a client to send its headers")
    body_s_max: float = Field(default=60.0, gt=0, description="longest for a client to send its body")
    keep_alive_s: int = Field(default=75, ge=1, description="how long a client's idle connection stays")
    request_s_max: float = Field(default=3600.0, gt=0, description="longest for a request, waiting included")
    first_byte_s_max: float | None = Field(
        default=None, gt=0, description="longest from an engine's choice to its first byte; by itself no limit"
    )
    idle_s_max: float = Field(default=300.0, gt=0, description="longest between two pieces of an answer")
    slow_client_s_max: float = Field(
        default=60.0, gt=0, description="longest for a client to take nothing while a part of its answer waits"
    )
    connect_s_max: float = Field(default=5.0, gt=0, description="longest to connect to an engine")
    engine_keep_alive_s: float = Field(
        default=3.0, gt=0, description="how long an idle connection to an engine stays; less than vLLM's 5 s"
    )
    moves: MoveSettings | None = Field(default=None, description="None: no request is ever moved")
    drain_s: int = Field(default=30, ge=0, description="what requests get to end when the server stops")

    @field_validator("key_digests")
    @classmethod
    def _are_digests(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        if not all(_DIGEST.fullmatch(digest) for digest in digests):
            raise ValueError("each has to be 64 lower-case hexadecimal digits, as `sha256sum` prints them")
        return digests
