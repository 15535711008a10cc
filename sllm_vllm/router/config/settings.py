"""Settings of the ingress: keys, limits and timeouts. Frozen; the router's configuration fills them in."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sllm_vllm.units import GIB, MIB

_DIGEST = re.compile(r"[0-9a-f]{64}")


class MoveSettings(BaseModel):
    """How running requests are moved between engines."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds_max: int = Field(
        default=6, ge=0, le=100, description="rounds in which the target catches up before the switch; 0: none"
    )
    round_tokens_max: int = Field(
        default=2048,
        ge=16,
        description="most tokens of one prefill of a round; other requests at the target wait for each prefill",
    )
    round_pause_s: float = Field(default=0.0, ge=0, le=60, description="seconds between two of those prefills")
    round_s_max: float = Field(default=120.0, gt=0, description="timeout of one of those prefills, in seconds")
    switch_s_max: float = Field(
        default=10.0, gt=0, description="longest that a stream is held until its target continues, in seconds"
    )
    move_s_max: float = Field(default=600.0, gt=0, description="timeout of a whole move, in seconds")


class IngressSettings(BaseModel):
    """What the ingress admits, and its timeouts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_digests: tuple[str, ...] = Field(
        default=(), max_length=10_000, description="SHA-256 of each key a client may send, in hexadecimal"
    )
    insecure_no_keys: bool = Field(default=False, description="allow addresses other than loopback without keys")
    cors_origins: tuple[str, ...] = Field(
        default=(), max_length=256, description="origins whose pages may read answers; '*' for any"
    )

    show_paths: bool = Field(
        default=False, description="let /v1/models show the paths of the weights on this machine, not just names"
    )

    body_nbytes_max: int = Field(default=32 * MIB, ge=1024, description="largest request body, in bytes")
    bodies_nbytes_max: int = Field(
        default=1 * GIB, ge=1024, description="largest total size of all request bodies in memory, in bytes"
    )
    json_depth_max: int = Field(
        default=256, ge=8, le=900, description="how deep arrays and objects may be nested in a JSON body"
    )
    json_containers_max: int = Field(
        default=100_000, ge=100, le=10_000_000, description="most arrays and objects in a JSON body"
    )
    head_nbytes_max: int = Field(default=64 * 1024, ge=1024, description="largest request line with headers, in bytes")
    requests_max: int = Field(default=4096, ge=1, description="most concurrent requests, including those that wait")
    connections_max: int = Field(default=8192, ge=1, description="most concurrent connections of clients")

    head_s_max: float = Field(default=20.0, gt=0, description="seconds that a client may take to send its headers")
    body_s_max: float = Field(default=60.0, gt=0, description="seconds that a client may take to send its body")
    keep_alive_s: int = Field(default=75, ge=1, description="seconds that a client's idle connection is kept open")
    request_s_max: float = Field(default=3600.0, gt=0, description="seconds that a request may take, waiting included")
    first_byte_s_max: float | None = Field(
        default=None,
        gt=0,
        description="longest time from the choice of an engine to its first byte, in seconds; default: no limit",
    )
    idle_s_max: float = Field(
        default=300.0, gt=0, description="longest pause between two parts of an engine's answer, in seconds"
    )
    slow_client_s_max: float = Field(
        default=60.0, gt=0, description="seconds that a client may read nothing while a part of its answer waits"
    )
    connect_s_max: float = Field(default=5.0, gt=0, description="timeout of connecting to an engine, in seconds")
    engine_keep_alive_s: float = Field(
        default=3.0, gt=0, description="seconds that an idle connection to an engine is kept open; less than vLLM's 5 s"
    )
    moves: MoveSettings | None = Field(default=None, description="settings of moves; None: no request is ever moved")
    drain_s: int = Field(
        default=30, ge=0, description="seconds that running requests get to finish when the server stops"
    )

    @field_validator("key_digests")
    @classmethod
    def _are_digests(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        if not all(_DIGEST.fullmatch(digest) for digest in digests):
            raise ValueError("each must be 64 lower-case hexadecimal digits, as `sha256sum` prints them")
        return digests
