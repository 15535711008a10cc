"""The router's configuration: every key, with its validation, together with ``settings.py``. Frozen.

Pure, except that ``ModelConfig`` reads the file that its engine arguments name with ``--config``. ``file.py``
reads configuration files and compares two of them; ``values.py`` defines the value types. Paths are relative to
``directory`` in the validation's context, if it is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import (
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
from sllm_vllm.router.config.settings import (
    IngressSettings,
    MigrationSection,
    PoisonSection,
    RaySection,
    Section,
    ServerSection,
)
from sllm_vllm.router.config.values import (
    Count,
    Duration,
    EngineArguments,
    Environment,
    Flag,
    KeepAlive,
    Located,
    MaybeBytes,
    MaybeDuration,
    Text,
    Words,
    located,
    merge_arguments,
    needs_keys,
    wrong_key,
)
from sllm_vllm.router.core.facts import ModelSpec
from sllm_vllm.units import MIB

NAME_CHARS_MAX = 200
QUEUE_S = 120.0
"""Longest wait of a request if its model sets none, and no engine start is expected to end later."""
ARGUMENTS_MAX = 240
"""Most configured arguments of an engine: fewer than a start order may hold, to leave room for those that are added."""
CHANGEABLE_OPTIONS = frozenset(
    {
        "--api-key",
        "--disable-log-stats",
        "--enable-log-requests",
        "--gpu-memory-utilization",
        "--kv-cache-memory-bytes",
        "--max-log-len",
        "--max-num-batched-tokens",
        "--max-num-seqs",
        "--no-enable-log-requests",
        "--served-model-name",
        "--uvicorn-log-level",
    }
)
"""Options of `vllm serve` that affect speed and capacity, but never the content of answers."""


# ---------------------------------------------------------------------------------------------------------- the models


class ModelDefaults(Section):
    """Settings that apply to every model which does not set them itself."""

    accelerators: Count | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="slots that a replica takes; default: the product of its parallel sizes",
    )
    engine_arguments: EngineArguments = Field(
        default=(),
        max_length=ARGUMENTS_MAX,
        description="arguments of `vllm serve`: a list of words, or a mapping like {max-model-len: 512, enforce-eager:"
        " true}; a model's are added to those of `defaults` and win where both set the same option",
    )
    environment: Environment = Field(
        default={},
        max_length=256,
        description="environment variables of the engine's process; numbers are taken as text",
    )
    min_replicas: Count = Field(
        default=0, ge=0, le=1024, description="replicas that are kept running even when idle; 0: scale to zero"
    )
    max_replicas: Count = Field(
        default=1, ge=1, le=1024, description="most replicas at once; 1 is enough for most models"
    )
    keep_alive: KeepAlive = Field(
        default=None,
        description="how long an idle replica is kept: seconds, text like 10m, or auto: as long as that is worth its"
        " memory; default: auto",
    )
    target_ongoing: Count = Field(
        default=8,
        ge=1,
        le=100_000,
        description="concurrent requests that a replica should have, at most ongoing_max; more start another replica",
    )
    ongoing_max: Count = Field(
        default=64, ge=1, le=100_000, description="most concurrent requests of a replica; more wait in the queue"
    )
    priority: Count = Field(
        default=0, ge=-1000, le=1000, description="requests of models with a higher priority are served first"
    )
    queue_max: Count = Field(
        default=256, ge=1, le=100_000, description="most waiting requests of the model; more get 429 at once"
    )
    queue_timeout: MaybeDuration = Field(
        default=None,
        gt=0,
        le=86400,
        description="longest that a request waits for a replica: seconds, or text like 30s, 10m; default: 120 s, or"
        " until an engine that is starting for it is predicted to be ready, whichever is later",
    )
    start_timeout: MaybeDuration = Field(
        default=None,
        gt=5,
        le=86400,
        description="longest that an engine may take to become healthy, from the start of its process: seconds, or"
        " text like 10m; default: the 99th percentile of the prediction, between 120 and 600 s; 600 s for the first"
        " start; doubled after each failed start",
    )


class ModelConfig(ModelDefaults):
    """A model: its name for clients, where its weights are, and how its engines run."""

    _num_slots: int = PrivateAttr(default=1)
    """Slots that follow from the parallel sizes in its arguments, including those of a ``--config`` file."""
    name: str = Field(
        min_length=1, max_length=NAME_CHARS_MAX, description="name that clients use; printable characters"
    )
    source: Text = Field(
        default="",
        description="directory or Hub name, as `vllm serve` takes it; default: the name. A source that begins with ./,"
        " ../ or ~/ is a path; ./ and ../ are relative to the directory of the configuration file",
    )
    revision: Text | None = Field(
        default=None, min_length=1, description="branch, tag or commit on the Hub; default: its main branch"
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
            raise ValueError("must be printable characters without leading or trailing spaces")
        return name

    @field_validator("source")
    @classmethod
    def _resolved(cls, source: str, info: ValidationInfo) -> str:
        if source.startswith("-"):
            raise ValueError("must not begin with '-'")
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


class NodeSection(Section):
    """This machine's agent, which runs the engines. Keys that are left out are detected."""

    slots: Count | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="slots for engines; default: one per GPU, or without GPUs one per processor",
    )
    gpus: Words | None = Field(
        default=None, max_length=64, description="GPUs to use, by index or UUID; default: all that are visible"
    )
    memory: MaybeBytes = Field(
        default=None,
        ge=256 * MIB,
        description="on the CPU: memory for all engines, in bytes or text like 8GiB; default: 90 % of what is"
        " available at start",
    )
    kv_memory: MaybeBytes = Field(
        default=None,
        ge=16 * MIB,
        description="on the CPU: size of a slot's KV cache, in bytes or text like 512MiB; default: an eighth of the"
        " slot's memory, at most 1GiB",
    )
    warm: Flag = Field(
        default=True, description="fork engines from a process that has imported vLLM, so that they start much faster"
    )
    warm_wait: Duration = Field(
        default=120.0,
        ge=0,
        le=3600,
        description="longest that a start waits for that process to finish its imports, if that is predicted to be"
        " faster than a cold start; 0: it never waits",
    )
    engine_command: Words | None = Field(
        default=None,
        max_length=64,
        description="command that runs instead of `vllm serve`, with the same arguments; such engines start cold",
    )
    engine_sockets: Flag | None = Field(
        default=None,
        description="engines listen on Unix sockets, which no other user can reach, instead of loopback ports;"
        " default: true, or false with an engine_command, which may run engines where the sockets can't be reached",
    )
    node_dir: Located | None = Field(
        default=None,
        description="the agent's own directory; default: SLLM_NODE_DIR, else sllm-vllm/node in the user's state"
        " directory",
    )


class StoreSection(Section):
    """Where checkpoints are stored, and the daemon that keeps them in memory."""

    directory: Located | None = Field(
        default=None,
        description="directory of the checkpoints; default: SLLM_STORE_DIR, else sllm-vllm/checkpoints in the user's"
        " cache directory",
    )
    socket: Located | None = Field(
        default=None,
        description="the store daemon's socket; default: SLLM_STORE_SOCKET, else .store/socket in the directory",
    )


class KeySource(Section):
    """Where a key is found, or its digest: exactly one of the three. A configuration never holds a key itself."""

    env: str | None = Field(
        default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$", description="environment variable that holds the key"
    )
    file: Located | None = Field(default=None, description="file with one key per line")
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, 64 lower-case hexadecimal digits"
    )

    @model_validator(mode="before")
    @classmethod
    def _is_no_key(cls, values: object) -> object:
        if isinstance(values, str):
            raise ValueError("a key must not be written here; use {env: NAME}, {file: PATH} or {sha256: HEX}")
        return values

    @model_validator(mode="after")
    def _says_one(self) -> Self:
        if [self.env, self.file, self.sha256].count(None) != 2:
            raise ValueError("must be exactly one of {env: NAME}, {file: PATH} and {sha256: HEX}")
        return self


class KeysSection(Section):
    """Who may use the router."""

    clients: tuple[KeySource, ...] = Field(
        default=(),
        max_length=10_000,
        description="keys of the API; default: no key is needed, which is allowed on loopback only",
    )
    admin: tuple[KeySource, ...] = Field(
        default=(), max_length=100, description="keys of the admin API, which deploys and deletes models"
    )
    metrics: tuple[KeySource, ...] = Field(
        default=(), max_length=100, description="keys that give access to /metrics only; admin keys do, too"
    )
    hidden_variables: tuple[str, ...] = Field(
        default=(),
        max_length=10_100,
        description="further environment variables that engines must not get; those named by `env` are never passed to"
        " them",
    )
    insecure_no_keys: Flag = Field(
        default=False, description="allow any address without keys: everyone who can reach the port may use the models"
    )

    def secret_variables(self) -> tuple[str, ...]:
        """Return the environment variables to hide from engines: those that hold keys, and ``hidden_variables``."""
        named = (source.env for source in (*self.clients, *self.admin, *self.metrics) if source.env is not None)
        return tuple(sorted({*named, *self.hidden_variables}))


class RouterConfig(Section):
    """The whole configuration of the router."""

    keys: KeysSection = KeysSection()
    server: ServerSection = ServerSection()
    node: NodeSection = NodeSection()
    store: StoreSection = StoreSection()
    migration: MigrationSection = MigrationSection()
    poison: PoisonSection = PoisonSection()
    ray: RaySection = RaySection()
    defaults: ModelDefaults = Field(
        default=ModelDefaults(),
        description="settings of every model, of this file or deployed later, that does not set them itself",
    )
    models: tuple[ModelConfig, ...] = Field(
        default=(), max_length=10_000, description="models to serve; more can be deployed while the router runs"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: object, info: ValidationInfo) -> object:
        is_merged = (info.context or {}).get("is_merged", False)
        return merged_models(values) if isinstance(values, dict) and not is_merged else values

    @field_validator("server")
    @classmethod
    def _is_guarded(cls, server: ServerSection, info: ValidationInfo) -> ServerSection:
        keys = info.data.get("keys")
        if keys is None:  # they are wrong themselves
            return server
        if needs_keys(server.host, has_keys=bool(keys.clients), is_insecure=keys.insecure_no_keys):
            raise wrong_key(f"{server.host!r} is not loopback: set `keys.clients` or `keys.insecure_no_keys`", "host")
        return server

    @field_validator("models")
    @classmethod
    def _are_distinct(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        found: set[str] = set()
        for index, model in enumerate(models):
            if model.name in found:
                raise wrong_key(f"another model has the same name, {model.name!r}", index, "name")
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
        return IngressSettings(
            **dict(self.server),
            key_digests=key_digests,
            insecure_no_keys=self.keys.insecure_no_keys,
            moves=self.migration if self.migration.enabled else None,
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


def lineage_of(source: str, revision: str | None, *, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Return a 31-bit digest of everything that decides what an engine answers.

    Requests move only between engines with the same lineage.
    """
    kept = [words for words in _options(arguments) if words[0] not in CHANGEABLE_OPTIONS]
    said = [source, revision, sorted(kept), sorted(environment.items())]
    return int.from_bytes(hashlib.sha256(json.dumps(said).encode()).digest()[:4], "big") >> 1


def _options(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Yield each option with its values, in one spelling, so that equal options compare equal."""
    option: list[str] = []
    for word in arguments:
        if word.startswith("-"):
            if option:
                yield option
            name, equals, value = word.partition("=")
            option = [name.replace("_", "-"), *([value] if equals else [])]
        elif option:
            option.append(word)
        else:
            yield [word]
    if option:
        yield option
