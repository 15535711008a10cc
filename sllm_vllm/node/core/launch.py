"""Turns an order, its slots and the node's hardware into a process's arguments, environment and processors. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sllm_vllm.node.core.events import ReplicaSpec
from sllm_vllm.units import GIB, MIB, format_nbytes

LOOPBACK = "127.0.0.1"
KV_NBYTES_MAX = GIB
"""Largest default KV cache of a slot on the CPU: vLLM fills it with zeros at each start, at a few GB a second."""
KV_NBYTES_MIN = 16 * MIB
KV_SHARE = 8
"""The KV cache gets one ``KV_SHARE``-th of a slot's memory; the weights get the rest."""
PINNED_CPUS_MIN = 4
"""Slots with fewer processors are not pinned, so that the three processes of an engine's start can run side by side."""
PARALLEL_OPTIONS = (
    ("--tensor-parallel-size", "-tp", "--te"),
    ("--pipeline-parallel-size", "-pp", "--pi"),
    ("--prefill-context-parallel-size", "-pcp", "--prefill-c"),
)
"""Each with its short name and the shortest abbreviation that vLLM's parser accepts; longer ones are accepted, too."""
DATA_PARALLEL = ("--data-parallel-size", "-dp")
LOCAL_DATA_PARALLEL = ("--data-parallel-size-local", "-dpl")
CONFIG_OPTION = "--config"
UNREACHABLE_OPTIONS = ("--headless", "--ssl-certfile", "--ssl-keyfile", "--uds", "--grpc")
"""With these, no server would answer the agent's health checks."""
UNGUARDED_OPTIONS = ("--grpc-port", "--data-parallel-supervisor-port", "--data-parallel-multi-port-external-lb")
"""With these, vLLM opens a second port, which asks for no key."""
GUARD = ("--middleware", "sllm_vllm.engine.guard.EngineGuard")
"""Makes an engine require its key for every path but ``/health``."""
COLD_VARIABLES = (
    "GLIBC_TUNABLES",
    "HF_",
    "HUGGINGFACE_",
    "KMP_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "NCCL_",
    "PYTHON",
    "SLLM_MIGRATION",
    "TORCH",
    "TRANSFORMERS_",
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_LOGGING_",
    "VLLM_PLUGINS",
    "VLLM_TARGET_DEVICE",
    "XDG_CACHE_HOME",
)
"""Prefixes of variables that are read when a process starts or imports: a forked engine would ignore them."""
WARM_VARIABLES = frozenset({"HF_TOKEN"})
"""Variables with such a prefix that are read only when they are used (``huggingface_hub.get_token``)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. ``id`` is an entry of CUDA_VISIBLE_DEVICES."""

    id: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """What engines may use: GPUs, or, if there are none, processors and memory."""

    cpus: tuple[int, ...]
    memory_nbytes: int
    gpus: tuple[Gpu, ...] = ()

    def __post_init__(self) -> None:
        assert self.cpus, "no processor"

    @property
    def platform(self) -> str:
        """``cuda`` or ``cpu``."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True, slots=True)
class LaunchPolicy:
    """The operator's settings for all launches; see ``NodeConfig``."""

    num_slots: int
    kv_nbytes: int | None = None
    pin: bool | None = None
    load_format: str = ""
    ray_address: str | None = None
    """Set where vLLM's Ray executor places engines' workers on several nodes; slots are those nodes' accelerators."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The agent's own environment, which engines inherit."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine runs and listens: its slots, its address, and the key that it asks for.

    The address is a host and a port, or ``socket``, the path of a Unix socket.
    """

    slots: tuple[int, ...]
    port: int | None
    api_key: str
    host: str = LOOPBACK
    socket: str = ""

    @property
    def options(self) -> tuple[str, ...]:
        """Options of ``vllm serve`` that make it listen at this address."""
        return ("--uds", self.socket) if self.socket else ("--host", self.host, "--port", str(self.port))


@dataclass(frozen=True, slots=True)
class Launch:
    """What a process is started with. ``cpus`` is empty if it may run on any; ``num_threads`` is OpenMP's."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    cpus: tuple[int, ...]
    num_threads: int
    api_key: str
    cold_reason: str
    """Why it can't be forked from a warm parent; empty if it can."""


def default_num_slots(hardware: Hardware) -> int:
    """One for each GPU, or for each processor if there is no GPU."""
    return len(hardware.gpus or hardware.cpus)


def cpus_of(slots: Sequence[int], hardware: Hardware, num_slots: int) -> tuple[int, ...]:
    """The processors of some slots: an equal share for each slot, disjoint unless there are more slots than
    processors."""
    cpus = hardware.cpus
    found: set[int] = set()
    for slot in slots:
        begin, end = slot * len(cpus) // num_slots, (slot + 1) * len(cpus) // num_slots
        found.update(cpus[begin:end] or (cpus[begin],))
    return tuple(sorted(found))


def describe_slot(slot: int, hardware: Hardware, policy: LaunchPolicy) -> str:
    """Describe a slot for users."""
    num_slots = policy.num_slots
    if policy.ray_address is not None:
        return f"one of {num_slots} accelerators of several nodes"
    if hardware.gpus:
        gpu = hardware.gpus[slot]
        return f"GPU {gpu.id}, {format_nbytes(gpu.nbytes)}"
    cpus = ",".join(map(str, cpus_of((slot,), hardware, num_slots)))
    return f"cpu {cpus}, {format_nbytes(hardware.memory_nbytes // num_slots)}"


def num_slots_of(arguments: Sequence[str]) -> int:
    """How many accelerators an engine with these arguments uses on this node: the product of its parallel sizes.

    Decode context parallelism is left out: it shares the accelerators of tensor parallelism.
    """
    product = _size(option_value(arguments, *LOCAL_DATA_PARALLEL) or option_value(arguments, *DATA_PARALLEL))
    for name, short, shortest in PARALLEL_OPTIONS:
        product *= _size(option_value(arguments, name, short, shortest=shortest))
    return product


def _size(said: str | None) -> int:
    return max(1, int(said)) if said is not None and said.isdecimal() and len(said) <= 4 else 1


def config_path_of(arguments: Sequence[str]) -> str | None:
    """The configuration file that vLLM would read; None if there is none. vLLM does not read ``--config=FILE``."""
    places = [index for index, word in enumerate(arguments) if word == CONFIG_OPTION]
    return arguments[places[0] + 1] if places and places[0] + 1 < len(arguments) else None


def with_config(arguments: Sequence[str], values: Mapping[str, object]) -> tuple[str, ...]:
    """Put a configuration file's options before the arguments, as vLLM does, so that the command line takes
    precedence."""
    words: list[str] = []
    for key, value in values.items():
        if value is True:
            words.append(f"--{key}")
        elif isinstance(value, dict):
            words += [f"--{key}", json.dumps(value, default=str)]
        elif value is not False and value != []:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return (*words, *arguments)


def has_option(arguments: Sequence[str], name: str) -> bool:
    """Whether an option is given, with or without a value."""
    return option_value(arguments, name) is not None


def option_value(arguments: Sequence[str], *names: str, shortest: str = "") -> str | None:
    """The last value of an option, in vLLM's spellings ``--a-b c`` and ``--a_b=c``; None if it is not given.

    ``shortest``: the shortest abbreviation of the first name that is accepted; empty: none.
    """
    found = None
    for index, word in enumerate(arguments):
        name, has_value, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        if name in names or (shortest and name.startswith(shortest) and names[0].startswith(name)):
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            found = value if has_value else following
    return found


def plan_launch(spec: ReplicaSpec, place: Place, *, hardware: Hardware, policy: LaunchPolicy) -> Launch:
    """Plan the launch of an order.

    The order's arguments are kept, except for host and port: the place's address comes last and so takes precedence,
    and with a socket vLLM ignores both. The guard is added to any middleware that the order names. Options that are not
    given are filled in, unless the order names a configuration file, whose settings they would override.
    """
    added: list[str] = []
    arguments, environment, slots = spec.arguments, dict(spec.environment), place.slots
    fills_in = option_value(arguments, "--config") is None
    if fills_in and policy.load_format and option_value(arguments, "--load-format") is None:
        added += ["--load-format", policy.load_format]
    whole = {**policy.environment, **environment, "VLLM_API_KEY": place.api_key}
    whole.pop("VLLM_USE_RUST_FRONTEND", None)  # that frontend runs no middleware, so it would answer without the key
    cpus: tuple[int, ...] = ()
    if policy.ray_address is not None:
        whole.pop("CUDA_VISIBLE_DEVICES", None)  # Ray sets it for each worker
        whole["RAY_ADDRESS"] = policy.ray_address
        num_threads = len(hardware.cpus)
        if fills_in and option_value(arguments, "--distributed-executor-backend") is None:
            added += ["--distributed-executor-backend", "ray"]
    elif hardware.gpus:
        whole["CUDA_VISIBLE_DEVICES"] = ",".join(hardware.gpus[slot].id for slot in slots)
        num_threads = max(1, len(hardware.cpus) * len(slots) // policy.num_slots)
    else:
        share = cpus_of(slots, hardware, policy.num_slots)
        num_threads = len(share)
        cpus = share if _is_pinned(share, policy) else ()
        whole["VLLM_CPU_OMP_THREADS_BIND"] = environment.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        whole["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", str(num_threads))
        if fills_in and "VLLM_CPU_KVCACHE_SPACE" not in whole and _says_no_kv_size(arguments):
            added += ["--kv-cache-memory-bytes", str(_kv_nbytes(hardware, policy))]
    return Launch(
        arguments=(spec.model, *arguments, *added, *GUARD, *place.options),
        environment=whole,
        cpus=cpus,
        num_threads=num_threads,
        api_key=option_value(arguments, "--api-key") or place.api_key,
        cold_reason=_cold_reason(environment),
    )


def _is_pinned(share: Sequence[int], policy: LaunchPolicy) -> bool:
    return len(share) >= PINNED_CPUS_MIN if policy.pin is None else policy.pin


def _says_no_kv_size(arguments: Sequence[str]) -> bool:
    names = ("--kv-cache-memory-bytes", "--kv-cache-memory", "--num-gpu-blocks-override", "--gpu-memory-utilization")
    return all(option_value(arguments, name) is None for name in names)


def _kv_nbytes(hardware: Hardware, policy: LaunchPolicy) -> int:
    """Size for one slot: vLLM takes it for each worker, and each slot has one worker."""
    if policy.kv_nbytes is not None:
        return policy.kv_nbytes
    share = hardware.memory_nbytes // policy.num_slots // KV_SHARE
    return max(KV_NBYTES_MIN, min(KV_NBYTES_MAX, share) // MIB * MIB)


def _cold_reason(environment: Mapping[str, str]) -> str:
    found = sorted(name for name in environment if name.startswith(COLD_VARIABLES) and name not in WARM_VARIABLES)
    return f"{', '.join(found)} would be read too late" if found else ""
