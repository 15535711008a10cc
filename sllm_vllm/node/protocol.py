"""Requests to a node agent and its answers, used in one process, over its socket and through Ray. Pure."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

REQUEST_NBYTES_MAX = 256 << 10
"""Largest request to an agent."""
ARGUMENTS_MAX = 256
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


class _AgentMessage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReplicaOrder(_AgentMessage):
    """The order of a replica. ``model`` and ``arguments`` are those of ``vllm serve``."""

    model: str = Field(min_length=1, max_length=4096)
    arguments: tuple[str, ...] = Field(default=(), max_length=ARGUMENTS_MAX)
    environment: dict[str, str] = Field(default={}, max_length=256)
    """Added to the agent's own."""
    directory: str = "/"
    """The engine's working directory, an absolute path."""
    num_slots: int | None = Field(default=None, ge=1, le=1024)
    """None: as many as the arguments' parallel sizes need."""
    start_s: float | None = Field(default=None, gt=5, le=86400, allow_inf_nan=False)
    """Longest time from its process's start until it is healthy. None: the agent's own limit."""
    port: int = Field(default=0, ge=0, le=65535)
    """On loopback. 0: the agent picks one."""
    takes_socket: bool = False
    """Whether the client can connect to a Unix socket of this machine and user: if so, the agent may have the engine
    listen on one, and on no port."""
    waits: bool = False
    """Wait for slots instead of being refused."""
    id: str | None = Field(default=None, pattern=NAME_PATTERN)
    """An order with the id of a living replica changes nothing. None: the agent makes one."""
    reuses_id: bool = False
    """Whether the id may be that of an ended replica, which is then forgotten, together with its log."""
    labels: dict[str, str] = Field(default={}, max_length=16)
    """For the client's own use; the agent only repeats them in its reports."""

    @field_validator("directory")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not value.startswith("/") or "\0" in value or len(value) > 4096:
            raise ValueError("it must be an absolute path")
        return value

    @model_validator(mode="after")
    def _port_or_socket(self) -> ReplicaOrder:
        if self.port and self.takes_socket:
            raise ValueError("an order of a port takes no socket")
        return self


class StartReport(_AgentMessage):
    """How far a replica's start is, and how long each phase took, from the moment it got its slots."""

    phase: str
    """What the engine is doing, for a progress line; ``ready`` at the end."""
    seconds: dict[str, float]
    """By phase, in order; they add up to ``total_s``."""
    total_s: float
    nbytes: int | None
    """Weights loaded by all its workers; None if our loader did not report it."""
    is_warm: bool | None
    """Whether it was forked from the warm parent; None until there is a process."""
    cold_reason: str = ""
    """Why it was not forked; else empty."""
    load: dict[str, str] = {}
    """The fields of the loader's log line: outcome, source, seconds of each part."""


class ReplicaReport(_AgentMessage):
    """A replica as shown to users and to the router."""

    id: str
    model: str
    state: str
    """A value of ``core.replica.State``."""
    reason: str
    """Why it waits, is unwell, stops or has ended; else empty."""
    slots: tuple[int, ...]
    pid: int | None
    status: int | None
    """How its process ended: an exit status, or minus a signal."""
    port: int | None
    """None: it listens on a Unix socket."""
    url: str | None
    """URL of its OpenAI API, as ``http://127.0.0.1:40123`` or ``unix:///path/to/socket``; None until it has one."""
    api_key: str | None
    """The bearer token that it requires."""
    age_s: float
    """Seconds since its order."""
    in_state_s: float
    start: StartReport | None
    """None while it waits for slots."""
    log: str
    """The file with its output; the older part is in ``.1``."""
    tail: tuple[str, ...] = ()
    """The last lines of its output, if it failed."""
    cause: str = ""
    """The last exception in its output that says why it failed, if any."""
    labels: dict[str, str] = {}
    """Those of its order."""

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.state == "ready"

    @property
    def has_ended(self) -> bool:
        """Whether it has stopped or failed."""
        return self.state in {"stopped", "failed"}


class SlotReport(_AgentMessage):
    """One accelerator slot."""

    slot: int
    what: str
    """As ``GPU 0`` or ``cpu 0-3, 10.5 GiB``."""
    replica: str | None


class WarmReport(_AgentMessage):
    """The warm parent."""

    pid: int | None
    problem: str
    """Why there is none; empty if there is one."""
    num_forks: int
    import_s: float | None
    ready_in_s: float | None = None
    """How long a start that arrives now is expected to wait for a parent that is importing. None: starts don't wait."""
    pss_nbytes: int | None = None


class CheckpointReport(_AgentMessage):
    """Where a checkpoint of this node is stored."""

    name: str
    nbytes: int
    resident_nbytes: int
    """The part of it that is in the store's memory."""
    tiers: tuple[str, ...]
    model: str = ""
    """The model as given to ``vllm serve`` when the checkpoint was made; empty if the checkpoint is not on disk."""


class EngineTiming(_AgentMessage):
    """One completed start, with the phases that it took."""

    replica: str
    model: str
    ended_unix_s: float
    start: StartReport


class NodeReport(_AgentMessage):
    """The state of a whole node."""

    version: str
    pid: int
    uptime_s: float
    platform: str
    """``cuda`` or ``cpu``."""
    slots: tuple[SlotReport, ...]
    replicas: tuple[ReplicaReport, ...]
    warm: WarmReport
    checkpoints: tuple[CheckpointReport, ...]
    hops: dict[str, dict[str, Any]]
    """Measured rates by hop, as the store reports them: ``bps``, ``limit_bps``."""
    store: str
    """Why the store's daemon does not answer; empty if it does."""
    timings: tuple[EngineTiming, ...]
    """The last completed starts, oldest first."""
    peer: str = ""
    """URL, including the key, from which other nodes can pull this one's checkpoints; empty if they can't."""
    problem: str = ""
    """Which of the agent's own loops are failing, and why; empty if none is."""
