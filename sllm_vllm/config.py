"""This package's settings and their validation, and the only module that reads the environment. Otherwise pure."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sllm_vllm.errors import ConfigError
from sllm_vllm.units import GIB, KIB, MIB

CHUNK_NBYTES_DEFAULT = 16 * MIB
CHUNK_NBYTES_MIN = 4 * KIB
CHUNK_NBYTES_MAX = GIB
MANIFEST_NBYTES_MAX = 32 * MIB
"""Largest manifest; that of a 1 TB model with 100,000 tensors and chunks of 16 MiB takes 18 MB."""
MANIFEST_MARKS_MAX = 1 << 21
"""Most brackets, braces, commas and colons in a manifest or a header. Their number bounds the number of values that
parsing it creates. The 1 TB model above has 1.8 million."""
HEADER_NBYTES_MAX = MANIFEST_NBYTES_MAX
"""Largest header of a partition: it holds less about each tensor than the manifest does."""
SOURCE_FILES_MAX = 10_000
"""Most entries in one folder of source weights."""
SOURCE_RECORD_NBYTES_MAX = 16 * MIB
"""Largest record of one model's source files."""
STORE_STATE_DIR = ".store"
"""The store daemon's own folder inside the checkpoint directory: socket, lock, calibration, pins."""
ADMIN_KEY_VARIABLE = "SLLM_ADMIN_KEY"
"""Environment variable that holds an operator's key for the router's commands."""
REQUEST_NBYTES_MAX = 256 * KIB
REPLY_NBYTES_MAX = 16 * MIB
"""Largest request to the store's daemon, and largest reply from it."""


def default_store_dir() -> Path:
    """The checkpoint directory: ``SLLM_STORE_DIR``, else ``sllm-vllm/checkpoints`` in the user's cache."""
    if explicit := os.environ.get("SLLM_STORE_DIR"):
        return Path(explicit).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "sllm-vllm" / "checkpoints"


def default_node_dir() -> Path:
    """The node agent's directory: ``SLLM_NODE_DIR``, else ``sllm-vllm/node`` in the user's state directory."""
    if explicit := os.environ.get("SLLM_NODE_DIR"):
        return Path(explicit).expanduser()
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "sllm-vllm" / "node"


def read_variable(name: str) -> str | None:
    """Value of an environment variable that a configuration names; None if it is not set."""
    return os.environ.get(name)


def router_config_path() -> str | None:
    """Value of ``SLLM_ROUTER_CONFIG``: the router's configuration, for a Serve application without arguments."""
    return os.environ.get("SLLM_ROUTER_CONFIG")


def visible_gpus() -> str | None:
    """Value of ``CUDA_VISIBLE_DEVICES``; None if it is not set."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def is_migration_wanted() -> bool:
    """Whether ``SLLM_MIGRATION`` is 1: vLLM is hooked, and seeded requests draw other random numbers than in stock."""
    return os.environ.get("SLLM_MIGRATION") == "1"


def child_environment(**overrides: str) -> dict[str, str]:
    """This process's environment, with ``overrides``, for a child."""
    return {**os.environ, **overrides}


def proxy_for(url: str) -> str | None:
    """The proxy that ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` give for a URL, if any."""
    # Imported here because it takes a third of a second, which only processes that use the network should pay.
    from urllib.request import getproxies, proxy_bypass

    parts, proxies = urlsplit(url), getproxies()
    if not proxies or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")


def engine_environment(secret_variables: Collection[str], **overrides: str) -> dict[str, str]:
    """This process's environment for engines and their warm parent, without the variables that hold our keys.

    Args:
        secret_variables: names of further variables that hold keys.
    """
    hidden = {ADMIN_KEY_VARIABLE, *secret_variables}
    return {name: value for name, value in child_environment(**overrides).items() if name not in hidden}


def default_store_socket(store_dir: Path) -> Path:
    """The store daemon's socket: ``SLLM_STORE_SOCKET``, else one in the private folder inside ``store_dir``."""
    if explicit := os.environ.get("SLLM_STORE_SOCKET"):
        return Path(explicit).expanduser()
    return store_dir / STORE_STATE_DIR / "socket"


def replace_environment(environment: Mapping[str, str]) -> None:
    """Replace this process's whole environment: for a process that was forked to become another program."""
    os.environ.clear()
    os.environ.update(environment)


class LoaderConfig(BaseModel):
    """Keys of ``--model-loader-extra-config`` with ``--load-format sllm``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store_dir: Path = Field(
        default_factory=default_store_dir,
        description="directory of the checkpoints; default: SLLM_STORE_DIR, else sllm-vllm/checkpoints in the user's"
        " cache directory",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="threads that read the disk; default: 4, or one per available processor if there are fewer",
    )
    chunk_bytes: int = Field(
        default=CHUNK_NBYTES_DEFAULT,
        description="size in bytes of the chunks of new checkpoints, the unit of reading; a multiple of 4096",
    )
    verify: Literal["always", "first", "never"] = Field(
        default="first",
        description="when chunks are checked against their checksums: on every load, on the first load since the file"
        " changed, or never",
    )
    verify_source: Literal["changed", "always"] = Field(
        default="changed",
        description="when the source weights are read to identify them: if a file has changed since it was last read,"
        " or at every load",
    )
    write_through: bool = Field(default=True, description="write a checkpoint if there is none")
    report_path: Path | None = Field(
        default=None, description="file for the load report, as JSON; rank N > 0 writes NAME.rank-N.json instead"
    )
    store: bool = Field(default=True, description="load checkpoints from this machine's store daemon, if one runs")
    pool: Literal["map", "copy"] = Field(
        default="map", description="on the CPU: map the store's memory copy-on-write, or copy it"
    )
    h2d: Literal["ring", "register"] = Field(
        default="ring",
        description="how the store's memory is copied to a CUDA device: through a ring of page-locked buffers, or by"
        " page-locking it slot by slot; see docs/decisions/0007",
    )

    @field_validator("chunk_bytes")
    @classmethod
    def _aligned(cls, value: int) -> int:
        if not CHUNK_NBYTES_MIN <= value <= CHUNK_NBYTES_MAX or value % CHUNK_NBYTES_MIN:
            raise ValueError(f"must be a multiple of 4096 from {CHUNK_NBYTES_MIN} to {CHUNK_NBYTES_MAX}")
        return value

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any] | None) -> LoaderConfig:
        """Validate vLLM's ``model_loader_extra_config``.

        Raises:
            ConfigError: a key is unknown or has an invalid value; the message names it and the known keys.
        """
        try:
            return cls.model_validate(dict(extra or {}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            known = ", ".join(cls.model_fields)
            problem = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
            raise ConfigError(f"--model-loader-extra-config: {key!r}: {problem}; known keys: {known}") from None


class StoreConfig(BaseModel):
    """Settings of ``sllm-vllm store serve``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store_dir: Path = Field(
        default_factory=default_store_dir,
        description="directory of the checkpoints; default: SLLM_STORE_DIR, else sllm-vllm/checkpoints in the user's"
        " cache directory",
    )
    socket: Path | None = Field(
        default=None,
        description="the daemon's Unix socket; default: SLLM_STORE_SOCKET, else .store/socket in store_dir",
    )
    memory_bytes: int = Field(default=4 * GIB, ge=2 * MIB, description="host memory for checkpoints, in bytes")
    slot_bytes: int = Field(
        default=CHUNK_NBYTES_DEFAULT,
        description="size of the pool's slots in bytes, a multiple of 4096; no chunk may be larger",
    )
    disk_bytes: int | None = Field(
        default=None,
        ge=0,
        description="quota of store_dir in bytes; when a checkpoint does not fit, others that a remote also has are"
        " removed, the least recently used first; default: no quota",
    )
    remotes: tuple[str, ...] = Field(
        default=(), max_length=16, description="URLs from which checkpoints that are not on this machine are fetched"
    )
    redirect_hosts: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="hosts that remotes over http(s) or s3:// may redirect to; `*.example.com` for all its subdomains;"
        " the Hub's own networks are allowed for hf://",
    )
    policy: Literal["cost", "lru"] = Field(
        default="cost", description="eviction policy: cost-aware, or least recently used"
    )
    prefault: bool = Field(default=True, description="allocate the memory at start, not at first use")
    readers: int | None = Field(
        default=None, ge=1, le=64, description="concurrent reads from disk; default: as calibrated, else 4"
    )
    writers: int | None = Field(
        default=None, ge=1, le=16, description="concurrent writes to disk; default: as calibrated, else 1"
    )
    downloads: int = Field(default=8, ge=1, le=256, description="most concurrent ranged requests to remotes")
    pause_fills: bool = Field(
        default=True, description="hold prefetches and writes back while an engine waits for a load"
    )
    starve_s: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="seconds without a prefetch (or a write) after which one starts although loads wait",
    )
    stall_s: float = Field(
        default=20.0, gt=0, le=3600, description="seconds without a byte after which a download is retried"
    )
    retries_max: int = Field(default=5, ge=0, le=100, description="most retries of a failed download of a chunk")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="port of /metrics on loopback; 0: any free port; default: no /metrics"
    )
    clients_max: int = Field(default=1024, ge=1, le=65536, description="most concurrent connections to the daemon")

    @field_validator("slot_bytes")
    @classmethod
    def _aligned(cls, value: int) -> int:
        return LoaderConfig._aligned(value)

    @property
    def socket_path(self) -> Path:
        """The daemon's Unix socket."""
        return self.socket or default_store_socket(self.store_dir)

    @property
    def state_dir(self) -> Path:
        """The daemon's own folder; its mode is 0700."""
        return self.store_dir / STORE_STATE_DIR

    @property
    def num_slots(self) -> int:
        """Number of slots in the pool."""
        return self.memory_bytes // self.slot_bytes


class NodeConfig(BaseModel):
    """Settings of ``sllm-vllm node serve``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    node_dir: Path = Field(
        default_factory=default_node_dir,
        description="directory of the agent's socket, lock and logs; default: SLLM_NODE_DIR, else sllm-vllm/node in"
        " the user's state directory",
    )
    store_dir: Path = Field(
        default_factory=default_store_dir,
        description="directory of the checkpoints; default: SLLM_STORE_DIR, else sllm-vllm/checkpoints in the user's"
        " cache directory",
    )
    store_socket: Path | None = Field(
        default=None,
        description="the store daemon's socket; default: SLLM_STORE_SOCKET, else .store/socket in store_dir",
    )
    slots: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="slots for engines; default: one per GPU, or without GPUs one per processor",
    )
    gpus: tuple[str, ...] | None = Field(
        default=None, max_length=64, description="GPUs to use, by index or UUID; default: all that are visible"
    )
    memory_bytes: int | None = Field(
        default=None,
        ge=256 * MIB,
        description="on the CPU: memory for all engines, in bytes; default: 90 % of what is available at the agent's"
        " start",
    )
    kv_bytes: int | None = Field(
        default=None,
        ge=16 * MIB,
        description="on the CPU: size of a slot's KV cache in bytes; default: an eighth of the slot's memory, at most"
        " 1 GiB",
    )
    pin: bool | None = Field(
        default=None,
        description="on the CPU: pin each engine to processors of its own; default: true if it gets 4 or more",
    )
    warm: bool = Field(default=True, description="fork engines from a parent that has imported vLLM")
    warm_wait_s: float = Field(
        default=120.0,
        ge=0,
        le=3600,
        description="seconds that a start waits at most for a warm parent that is still importing, if that is"
        " predicted to be faster than a cold start; 0: it never waits",
    )
    forks_max: int = Field(default=500, ge=1, description="forks after which the warm parent is replaced")
    engine_command: tuple[str, ...] | None = Field(
        default=None,
        max_length=64,
        description="command that runs instead of `vllm serve`, with the same arguments; such engines start cold",
    )
    migration: bool = Field(
        default=False, description="let running requests be migrated between engines, where vLLM allows it"
    )
    engine_host: str = Field(
        default="127.0.0.1",
        max_length=253,
        description="address that engines listen on; set another than loopback only if their router is on another"
        " machine",
    )
    engine_sockets: bool | None = Field(
        default=None,
        description="engines of a router in this process listen on Unix sockets, not on ports; default: true, or false"
        " with an engine_command, which may run engines where the sockets can't be reached",
    )
    secret_variables: tuple[str, ...] = Field(
        default=(),
        max_length=10_100,
        description="environment variables that engines do not get because they hold keys of the router",
    )
    ray_address: str | None = Field(
        default=None,
        max_length=1024,
        description="address of a Ray cluster on whose nodes vLLM's Ray executor places the engines' workers; default:"
        " no cluster",
    )
    load_format: str = Field(
        default="sllm", description="--load-format of engines whose arguments set none; '' for vLLM's default"
    )
    start_s: float = Field(
        default=600.0,
        gt=5,
        le=86400,
        description="seconds that an engine may take to become healthy, from the start of its process",
    )
    stop_s: float = Field(
        default=20.0, gt=5, le=3600, description="seconds from SIGTERM to SIGKILL when an engine is stopped"
    )
    health_s: float = Field(
        default=5.0, gt=0, le=600, description="seconds between two health checks, and timeout of each"
    )
    unwell_max: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="consecutive failed health checks after which an engine counts as hung and is ended",
    )
    orders_max: int = Field(
        default=64, ge=0, le=10_000, description="most orders that may wait for slots; more are refused"
    )
    ended_max: int = Field(
        default=64, ge=1, le=10_000, description="most ended replicas that are remembered and whose logs are kept"
    )
    log_bytes: int = Field(
        default=4 * MIB, ge=64 * KIB, description="largest size in bytes of a log file; an engine's log has two files"
    )

    @property
    def has_engine_sockets(self) -> bool:
        """Whether engines listen on Unix sockets where the router can reach those."""
        return self.engine_command is None if self.engine_sockets is None else self.engine_sockets

    @property
    def socket_path(self) -> Path:
        """The agent's Unix socket."""
        return self.node_dir / "socket"

    @property
    def log_dir(self) -> Path:
        """Directory of the engines' logs."""
        return self.node_dir / "logs"

    @property
    def imports_path(self) -> Path:
        """Record of how long warm parents' imports and cold starts took."""
        return self.node_dir / "imports.json"

    @property
    def record_path(self) -> Path:
        """Record of the running engines, so that they can be ended if the agent dies."""
        return self.node_dir / "engines"
