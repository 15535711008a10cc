"""What is said to a node agent and what it answers, in one process, over its socket or through Ray. Pure."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

REQUEST_NBYTES_MAX = 256 << 10
"""Largest request to an agent."""
ARGUMENTS_MAX = 256
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReplicaOrder(_Message):
    """What is to run. ``model`` and ``arguments`` are those of ``vllm serve``."""

    model: str = Field(min_length=1, max_length=4096)
    arguments: tuple[str, ...] = Field(default=(), max_length=ARGUMENTS_MAX)
    environment: dict[str, str] = Field(default={}, max_length=256)
    """Added to the agent's own."""
    directory: str = "/"
    """The engine's working directory, an absolute path."""
    num_slots: int | None = Field(default=None, ge=1, le=1024)
    """None: as many as the arguments' parallel sizes say."""
    start_s: float | None = Field(default=None, gt=5, le=86400, allow_inf_nan=False)
    """Longest from its process to its health. None: the agent's own limit."""
    port: int = Field(default=0, ge=0, le=65535)
    """On loopback. 0: the agent picks one."""
    takes_socket: bool = False
    """Whether whoever orders can connect to a Unix socket of this machine and user: then the agent may have the engine
    listen on one, and on no port."""
    waits: bool = False
    """Rather wait for slots than be refused."""
    id: str | None = Field(default=None, pattern=NAME_PATTERN)
    """An order with the id of a replica that is alive changes nothing. None: the agent makes one."""
    reuses_id: bool = False
    """Whether the id may be that of a replica that has ended: that one, with its log, is forgotten."""
    labels: dict[str, str] = Field(default={}, max_length=16)
    """Whatever whoever orders wants to find in its reports; the agent does not look at them."""

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


class StartReport(_Message):
    """How far a replica's start is, and what it spent its time on, from its order's turn (slots given) on."""

    phase: str
    """What it is doing, for a progress line; ``ready`` at the end."""
    seconds: dict[str, float]
    """By phase, in order; they add up to ``total_s``."""
    total_s: float
    nbytes: int | None
    """Weights loaded by all its workers; None if our loader did not say."""
    is_warm: bool | None
    """Forked from the warm parent; None as long as there is no process."""
    cold_reason: str = ""
    """Why it was not forked."""
    load: dict[str, str] = {}
    """The loader's report, as its log line has it: outcome, source, seconds of each part."""


class ReplicaReport(_Message):
    """A replica as people and the router see it."""

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
    """Of its OpenAI API, as ``http://127.0.0.1:40123`` or ``unix:///path/to/socket``, from the moment it has one."""
    api_key: str | None
    """What it wants as bearer token."""
    age_s: float
    """Seconds since its order."""
    in_state_s: float
    start: StartReport | None
    """None while it waits for slots."""
    log: str
    """File with what it prints; the older part in ``.1``."""
    tail: tuple[str, ...] = ()
    """The last lines that it printed, if it failed."""
    cause: str = ""
    """The last exception in all that it printed that says why it failed, if there was one."""
    labels: dict[str, str] = {}
    """Of its order."""

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.state == "ready"

    @property
    def has_ended(self) -> bool:
        """Whether its life is over."""
        return self.state in {"stopped", "failed"}


class SlotReport(_Message):
    """One accelerator slot."""

    slot: int
    what: str
    """As ``GPU 0`` or ``cpu 0-3, 10.5 GiB``."""
    replica: str | None


class WarmReport(_Message):
    """The warm parent."""

    pid: int | None
    problem: str
    """Why there is none; empty if there is."""
    num_forks: int
    import_s: float | None
    ready_in_s: float | None = None
    """Of one that imports: a start that comes now is expected to wait so long for it. None: no start waits."""
    pss_nbytes: int | None = None


class CheckpointReport(_Message):
    """Where a checkpoint of this node lies."""

    name: str
    nbytes: int
    resident_nbytes: int
    """Of it in the store's memory."""
    tiers: tuple[str, ...]
    model: str = ""
    """As it was given to ``vllm serve`` when the checkpoint was made; empty where the disk does not have it."""


class EngineTiming(_Message):
    """One start that came to its end: for whoever learns from it."""

    replica: str
    model: str
    ended_unix_s: float
    start: StartReport


class NodeReport(_Message):
    """Everything an agent knows of its node."""

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
    """Measured rates by hop, as the store tells them: ``bps``, ``limit_bps``."""
    store: str
    """Empty if the store's daemon answers, else why not."""
    timings: tuple[EngineTiming, ...]
    """The last starts, oldest first."""
    peer: str = ""
    """Where other nodes can pull this one's checkpoints from, with the key to it; empty if they can't."""
    problem: str = ""
    """Which of the agent's own loops do not work now, and why; empty if all do."""
