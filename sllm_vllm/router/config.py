"""The router's configuration: every key, with its validation. Frozen.

Pure, except that ``ModelConfig`` reads the file that its engine arguments name with ``--config``. ``config_file.py``
reads configuration files and compares two of them; ``config_values.py`` defines the value types. Paths are relative to
``directory`` in the validation's context, if it is there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sllm_vllm.config import NodeConfig, default_node_dir, default_store_dir
from sllm_vllm.errors import ConfigError
from sllm_vllm.node.core.launch import num_slots_of
from sllm_vllm.node.engine_config import expand_config
from sllm_vllm.router.config_migration import MigrationSection, lineage_of
from sllm_vllm.router.config_poison import PoisonSection
from sllm_vllm.router.config_ray import RaySection
from sllm_vllm.router.config_values import (
    Count,
    Duration,
    EngineArguments,
    Environment,
    Flag,
    KeepAlive,
    Located,
    MaybeBytes,
    MaybeDuration,
    NumBytes,
    Text,
    Words,
    is_loopback,
    located,
    merge_arguments,
    wrong_key,
)
from sllm_vllm.router.core.facts import ModelSpec
from sllm_vllm.router.settings import IngressSettings
from sllm_vllm.units import GIB, KIB, MIB

NAME_CHARS_MAX = 200
QUEUE_S = 120.0
"""Longest wait of a request if its model sets none, and no engine start is expected to end later."""
ARGUMENTS_MAX = 240
"""Most configured arguments of an engine: fewer than a start order may hold, to leave room for those that are added."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------- the models


class ModelDefaults(_Section):
    """Settings that apply to every model which does not set them itself."""

    accelerators: Count | None = Field(
        default=None, ge=1, le=1024, description="slots of a replica; by itself the product of its parallel sizes"
    )
    engine_arguments: EngineArguments = Field(
        default=(),
        max_length=ARGUMENTS_MAX,
        description="arguments of `vllm serve`: a list of words, or a mapping like {max-model-len: 512,"
        " enforce-eager: true}; a default's are kept, and a model's count where both say something",
    )
    environment: Environment = Field(
        default={}, max_length=256, description="variables of the engine's process; numbers are taken as text"
    )
    min_replicas: Count = Field(
        default=0, ge=0, le=1024, description="replicas that are kept, asked or not; by itself 0: scale to zero"
    )
    max_replicas: Count = Field(default=1, ge=1, le=1024, description="replicas at once; 1 is enough for most")
    keep_alive: KeepAlive = Field(
        default=None,
        description="how long an idle replica stays: seconds, 10m, or auto: as long as that is worth its memory",
    )
    target_ongoing: Count = Field(
        default=8,
        ge=1,
        le=100_000,
        description="requests at once that a replica should have, ongoing_max at most; more start another one",
    )
    ongoing_max: Count = Field(
        default=64, ge=1, le=100_000, description="requests at once that a replica may have; more wait in the queue"
    )
    priority: Count = Field(default=0, ge=-1000, le=1000, description="higher goes first")
    queue_max: Count = Field(default=256, ge=1, le=100_000, description="requests that wait; more get 429 at once")
    queue_timeout: MaybeDuration = Field(
        default=None,
        gt=0,
        le=86400,
        description="longest that a request waits: seconds, or 30s, 10m; default 120 s, or until an engine that starts"
        " for it is predicted to be ready, if that is later",
    )
    start_timeout: MaybeDuration = Field(
        default=None,
        gt=5,
        le=86400,
        description="longest that an engine may take from its process to its health: seconds, or 10m; default the 99th"
        " percentile of what is predicted, between 120 and 600 s; 600 s before its first start, and twice as long after"
        " each that failed",
    )


class ModelConfig(ModelDefaults):
    """A model: its name for clients, where its weights are, and how its engines run."""

    _num_slots: int = PrivateAttr(default=1)
    """Slots that follow from the parallel sizes in its arguments, including those of a ``--config`` file."""
    name: str = Field(min_length=1, max_length=NAME_CHARS_MAX, description="what clients say; printable characters")
    source: Text = Field(
        default="",
        description="directory or Hub name, as `vllm serve` takes it; by itself the name. What begins with ./, ../ or"
        " ~/ is a path, the first two relative to the file",
    )
    revision: Text | None = Field(
        default=None, min_length=1, description="branch, tag or commit on the Hub; by itself its main branch"
    )

    @model_validator(mode="before")
    @classmethod
    def _named_source(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("source") in (None, "") and isinstance(values.get("name"), str):
            return {**values, "source": values["name"]}
        return values

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable() or name != name.strip():
            raise ValueError("it has to be printable characters, without a space at its ends")
        return name

    @field_validator("source")
    @classmethod
    def _resolved(cls, source: str, info: ValidationInfo) -> str:
        if source.startswith("-"):
            raise ValueError("it may not begin with '-'")
        is_path = source in {".", ".."} or source.startswith(("./", "../", "~/"))
        return str(located(Path(source), info)) if is_path else source

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise wrong_key(f"{self.max_replicas} is less than min_replicas, {self.min_replicas}", "max_replicas")
        return self

    @model_validator(mode="after")
    def _sized(self, info: ValidationInfo) -> Self:
        """Compute the slots from the arguments. Reads their ``--config`` file here, so that errors show at once."""
        try:
            words = expand_config(self.engine_arguments, (info.context or {}).get("directory", ""))
        except ConfigError as error:
            raise wrong_key(str(error), "engine_arguments") from None
        self._num_slots = num_slots_of(words)
        return self

    @property
    def num_accelerators(self) -> int:
        """Slots of a replica."""
        return self.accelerators or self._num_slots

    @property
    def generation(self) -> int:
        """A 31-bit digest of what its engines are started with; stable over restarts of the router."""
        said = [self.source, self.engine_order_arguments(), sorted(self.environment.items()), self.num_accelerators]
        digest = hashlib.sha256(json.dumps(said).encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def engine_order_arguments(self) -> tuple[str, ...]:
        """Return the arguments after ``vllm serve SOURCE``."""
        revision = () if self.revision is None else (f"--revision={self.revision}",)
        return (*self.engine_arguments, f"--served-model-name={self.name}", *revision)

    def spec(self, generation: int) -> ModelSpec:
        """Return the model as a spec for the router's core."""
        return ModelSpec(
            name=self.name,
            generation=generation,
            lineage=lineage_of(
                self.source, self.revision, arguments=self.engine_arguments, environment=self.environment
            ),
            accelerators=self.num_accelerators,
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            keep_alive_s=self.keep_alive,
            target_ongoing=min(self.target_ongoing, self.ongoing_max),
            ongoing_max=self.ongoing_max,
            priority=self.priority,
            queue_max=self.queue_max,
            queue_s_max=QUEUE_S if self.queue_timeout is None else self.queue_timeout,
            waits_for_start=self.queue_timeout is None,
            start_s_max=self.start_timeout,
        )


# -------------------------------------------------------------------------------------------------- the other sections


class NodeSection(_Section):
    """This machine's agent, which runs the engines. Keys that are left out are detected."""

    slots: Count | None = Field(default=None, ge=1, le=1024, description="engines' places; by itself one a GPU, or CPU")
    gpus: Words | None = Field(
        default=None, max_length=64, description="GPUs to use, by index or UUID; by itself all that are visible"
    )
    memory: MaybeBytes = Field(
        default=None, ge=256 * MIB, description="on the CPU: bytes of all engines, or 8GiB; by itself 0.9 of the free"
    )
    kv_memory: MaybeBytes = Field(
        default=None,
        ge=16 * MIB,
        description="on the CPU: bytes of a slot's KV cache; by itself 1/8 of it, 1GiB at most",
    )
    warm: Flag = Field(default=True, description="fork engines from a process that has imported vLLM: seconds faster")
    warm_wait: Duration = Field(
        default=120.0,
        ge=0,
        le=3600,
        description="longest that a start waits for that process to import, where that is sooner than to start cold",
    )
    engine_command: Words | None = Field(
        default=None,
        max_length=64,
        description="what runs instead of `vllm serve`, with the same arguments; such engines start cold",
    )
    engine_sockets: Flag | None = Field(
        default=None,
        description="engines listen on Unix sockets, which no other user reaches, instead of ports of the loopback; "
        "default: true, or false with an engine_command, which may run them where sockets can't be reached",
    )
    node_dir: Located | None = Field(
        default=None, description="the agent's own folder; by itself SLLM_NODE_DIR, else in the user's state directory"
    )


class StoreSection(_Section):
    """Where checkpoints are stored, and the daemon that keeps them in memory."""

    directory: Located | None = Field(
        default=None, description="directory of the checkpoints; by itself SLLM_STORE_DIR, else in the user's cache"
    )
    socket: Located | None = Field(default=None, description="the store daemon's socket; by itself in the directory")


class ServerSection(_Section):
    """The router's address and limits. Durations: seconds, or text like 30s, 10m. Sizes: bytes, or 8MiB."""

    host: str = Field(
        default="127.0.0.1", min_length=1, max_length=253, description="address to listen on; loopback without keys"
    )
    port: Count = Field(default=8000, ge=0, le=65535, description="as `vllm serve` has it; 0: a free one")
    show_paths: Flag = Field(
        default=False, description="let /v1/models show where weights are on the server; default: names alone"
    )
    body_bytes: NumBytes = Field(
        default=32 * MIB, ge=KIB, le=GIB, description="largest body of a request; a few images fit"
    )
    bodies_bytes: NumBytes = Field(default=GIB, ge=KIB, le=1 << 50, description="bodies of all requests together")
    json_depth_max: Count = Field(
        default=256, ge=8, le=900, description="how deep arrays and objects of a JSON body may be nested; more get 400"
    )
    json_containers_max: Count = Field(
        default=100_000, ge=100, le=10_000_000, description="arrays and objects that a JSON body may have; more get 400"
    )
    requests_max: Count = Field(default=4096, ge=1, le=1_000_000, description="requests at once, those that wait too")
    waiting_max: Count = Field(default=4096, ge=1, le=1_000_000, description="requests that wait, of all models")
    connections_max: Count = Field(default=8192, ge=1, le=1_000_000, description="clients' connections at once")
    body_timeout: Duration = Field(default=60.0, gt=0, description="longest for a client to send its body")
    request_timeout: Duration = Field(default=3600.0, gt=0, description="longest for a request, waiting included")
    slow_client_timeout: Duration = Field(
        default=60.0,
        gt=0,
        description="longest for a client to take nothing while a part of its answer waits; then its connection ends",
    )
    idle_timeout: Duration = Field(default=300.0, gt=0, description="longest between two pieces of an answer")
    cors_origins: tuple[str, ...] = Field(
        default=(), max_length=256, description="origins whose pages may read answers; '*' for any; by itself none"
    )


class KeySource(_Section):
    """Where a key is found, or its digest: exactly one of the three. A configuration never holds a key itself."""

    env: str | None = Field(
        default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$", description="environment variable that holds the key"
    )
    file: Located | None = Field(default=None, description="file with one key a line")
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, 64 lower-case hexadecimal digits"
    )

    @model_validator(mode="before")
    @classmethod
    def _is_no_key(cls, values: object) -> object:
        if isinstance(values, str):
            raise ValueError("no key may stand here; write {env: NAME}, {file: PATH} or {sha256: HEX}")
        return values

    @model_validator(mode="after")
    def _says_one(self) -> Self:
        if [self.env, self.file, self.sha256].count(None) != 2:
            raise ValueError("it has to be one of {env: NAME}, {file: PATH} and {sha256: HEX}")
        return self


class KeysSection(_Section):
    """Who may use the router."""

    clients: tuple[KeySource, ...] = Field(
        default=(), max_length=10_000, description="keys of the API; by itself none is asked for, on loopback alone"
    )
    admin: tuple[KeySource, ...] = Field(
        default=(), max_length=100, description="keys of the orders that deploy and remove models"
    )
    metrics: tuple[KeySource, ...] = Field(
        default=(), max_length=100, description="keys that open /metrics and nothing else; admin keys open it, too"
    )
    hidden_variables: tuple[str, ...] = Field(
        default=(),
        max_length=10_100,
        description="more environment variables that engines must not get; those of `env` are never theirs",
    )
    insecure_no_keys: Flag = Field(
        default=False, description="listen on every address without keys: whoever reaches the port may use the models"
    )

    def secret_variables(self) -> tuple[str, ...]:
        """Return the environment variables to hide from engines: those that hold keys, and ``hidden_variables``."""
        named = (source.env for source in (*self.clients, *self.admin, *self.metrics) if source.env is not None)
        return tuple(sorted({*named, *self.hidden_variables}))


class RouterConfig(_Section):
    """The whole configuration of the router."""

    keys: KeysSection = KeysSection()
    server: ServerSection = ServerSection()
    node: NodeSection = NodeSection()
    store: StoreSection = StoreSection()
    migration: MigrationSection = MigrationSection()
    poison: PoisonSection = PoisonSection()
    ray: RaySection = RaySection()
    defaults: ModelDefaults = Field(default=ModelDefaults(), description="merged under each model of this file")
    models: tuple[ModelConfig, ...] = Field(
        default=(), max_length=10_000, description="models to serve; more can be deployed while the router runs"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: object) -> object:
        return merged_models(values) if isinstance(values, dict) else values

    @field_validator("server")
    @classmethod
    def _is_guarded(cls, server: ServerSection, info: ValidationInfo) -> ServerSection:
        keys = info.data.get("keys")
        is_open = keys is not None and not keys.clients and not keys.insecure_no_keys
        if is_open and not is_loopback(server.host):
            raise wrong_key(f"{server.host!r} is not loopback: give `keys.clients`, or say `insecure_no_keys`", "host")
        return server

    @field_validator("models")
    @classmethod
    def _are_distinct(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        found: set[str] = set()
        for index, model in enumerate(models):
            if model.name in found:
                raise wrong_key(f"another model is called {model.name!r}", index, "name")
            found.add(model.name)
        return models

    def node_config(self) -> NodeConfig:
        """Return the agent's settings."""
        node, store = self.node, self.store
        return NodeConfig(
            node_dir=(node.node_dir or default_node_dir()).absolute(),
            store_dir=(store.directory or default_store_dir()).absolute(),
            store_socket=None if store.socket is None else store.socket.absolute(),
            slots=node.slots,
            gpus=node.gpus,
            memory_bytes=node.memory,
            kv_bytes=node.kv_memory,
            warm=node.warm,
            warm_wait_s=node.warm_wait,
            engine_command=node.engine_command,
            engine_sockets=node.engine_sockets,
            migration=self.migration.enabled,
            secret_variables=self.keys.secret_variables(),
        )

    def ingress_settings(self, key_digests: tuple[str, ...]) -> IngressSettings:
        """Return the ingress's settings. ``key_digests``: those of ``keys.clients``."""
        server = self.server
        return IngressSettings(
            key_digests=key_digests,
            insecure_no_keys=self.keys.insecure_no_keys,
            cors_origins=server.cors_origins,
            show_paths=server.show_paths,
            body_nbytes_max=server.body_bytes,
            bodies_nbytes_max=server.bodies_bytes,
            json_depth_max=server.json_depth_max,
            json_containers_max=server.json_containers_max,
            requests_max=server.requests_max,
            connections_max=server.connections_max,
            body_s_max=server.body_timeout,
            request_s_max=server.request_timeout,
            idle_s_max=server.idle_timeout,
            slow_client_s_max=server.slow_client_timeout,
            moves=self.migration.settings(),
        )


def merged_models(values: dict[str, Any]) -> dict[str, Any]:
    """Return a file's values with its defaults merged into each model; unchanged if the defaults are invalid."""
    defaults, models = values.get("defaults"), values.get("models")
    if isinstance(defaults, dict) and isinstance(models, list) and _is_valid(defaults):
        return {**values, "models": [_merged(defaults, model) for model in models]}
    return values


def _is_valid(defaults: dict[Any, Any]) -> bool:
    """Whether the defaults are valid. If not, their own errors suffice; merging would repeat them for each model."""
    try:
        ModelDefaults.model_validate(defaults)
    except ValidationError:
        return False
    return True


def _merged(defaults: dict[str, Any], model: object) -> object:
    """Return a model's values over the defaults: variables and arguments merge one by one, other values replace."""
    if not isinstance(model, dict):
        return model
    merged = {**defaults, **model}
    both = defaults.keys() & model.keys()
    if "environment" in both and isinstance(model["environment"], dict):
        merged["environment"] = {**defaults["environment"], **model["environment"]}
    if "engine_arguments" in both:
        merged["engine_arguments"] = merge_arguments(defaults["engine_arguments"], model["engine_arguments"])
    return merged
