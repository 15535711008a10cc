"""What an engine is launched with: arguments in the order that counts, its processors, environment, cold or not."""

from __future__ import annotations

from collections.abc import Mapping

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.node.core.events import ReplicaSpec
from sllm_vllm.node.core.launch import (
    COLD_VARIABLES,
    GUARD,
    KV_NBYTES_MAX,
    KV_NBYTES_MIN,
    Gpu,
    Hardware,
    Launch,
    LaunchPolicy,
    Place,
    config_path_of,
    cpus_of,
    default_num_slots,
    describe_slot,
    num_slots_of,
    option_value,
    plan_launch,
    with_config,
)
from sllm_vllm.units import GIB, MIB
from tests.support.cases import every_case

CPU = Hardware(cpus=(0, 1, 2, 3, 8, 9, 10, 11), memory_nbytes=32 * GIB)
CUDA = Hardware(CPU.cpus, CPU.memory_nbytes, gpus=(Gpu("GPU-a", 80 * GIB), Gpu("GPU-b", 80 * GIB)))
POLICY = LaunchPolicy(num_slots=2)
LAST = (*GUARD, "--host", "127.0.0.1", "--port", "4000")
KV = ("--kv-cache-memory-bytes", str(GIB))


def launch(
    *arguments: str,
    hardware: Hardware = CPU,
    policy: LaunchPolicy = POLICY,
    slots: tuple[int, ...] = (0,),
    environment: Mapping[str, str] | None = None,
) -> Launch:
    spec = ReplicaSpec("m-1", "org/m", arguments, tuple((environment or {}).items()), len(slots))
    return plan_launch(spec, Place(slots, 4000, "secret"), hardware=hardware, policy=policy)


def test_an_engine_listens_where_its_place_is() -> None:
    place = Place((0,), 4000, "secret", host="10.0.0.7")
    spec = ReplicaSpec("a", "m", (), (), 1)
    hardware = Hardware(cpus=(0,), memory_nbytes=GIB)
    arguments = plan_launch(spec, place, hardware=hardware, policy=LaunchPolicy(1)).arguments
    assert arguments[-4:] == ("--host", "10.0.0.7", "--port", "4000")
    on_socket = plan_launch(spec, Place((0,), None, "secret", socket="/n/s"), hardware=hardware, policy=LaunchPolicy(1))
    assert on_socket.arguments[-2:] == ("--uds", "/n/s")
    assert not {"--host", "--port"} & set(on_socket.arguments)


# ------------------------------------------------------------------------------------------------------- arguments


@every_case(
    "said",
    [
        (),
        ("--host", "0.0.0.0", "--port", "1"),
        ("--host=0.0.0.0", "--port=1"),
        ("--hos", "0.0.0.0", "--por=1"),
        ("--enforce-eager",),
    ],
)
@every_case("hardware", [CPU, CUDA])
def test_the_model_comes_first_and_our_host_and_port_come_last(said: tuple[str, ...], hardware: Hardware) -> None:
    arguments = launch(*said, hardware=hardware).arguments
    assert arguments[: 1 + len(said)] == ("org/m", *said)
    assert arguments[-len(LAST) :] == LAST


@every_case(
    "said, filled_in",
    [
        ((), True),
        (("--load", "x"), True),  # something else, or an abbreviation: the last of the two counts
        (("--load_format=dummy",), False),
        (("--load-format", "dummy"), False),
        (("--config", "f.yaml"), False),
        (("--config=f.yaml",), False),
    ],
)
def test_the_load_format_is_filled_in_where_nothing_says_it(said: tuple[str, ...], filled_in: bool) -> None:
    arguments = launch(*said, hardware=CUDA, policy=LaunchPolicy(2, load_format="sllm")).arguments
    assert arguments == ("org/m", *said, *(("--load-format", "sllm") if filled_in else ()), *LAST)


def test_vllms_own_load_format_is_left_alone() -> None:
    assert "--load-format" not in launch(policy=LaunchPolicy(2, load_format="")).arguments


@every_case(
    "said",
    [
        ("--kv-cache-memory-bytes", "5"),
        ("--kv_cache_memory_bytes=5",),
        ("--kv-cache-memory", "5"),
        ("--num-gpu-blocks-override=5",),
        ("--gpu-memory-utilization", "0.1"),
        ("--config", "f.yaml"),
    ],
)
def test_the_size_of_the_kv_cache_is_left_alone_where_something_says_it(said: tuple[str, ...]) -> None:
    assert launch(*said).arguments == ("org/m", *said, *LAST)


@every_case("of_the_order", [False, True])
def test_a_variable_may_say_the_size_of_the_kv_cache(of_the_order: bool) -> None:
    said = {"VLLM_CPU_KVCACHE_SPACE": "3"}
    policy = LaunchPolicy(2, environment={} if of_the_order else said)
    planned = launch(policy=policy, environment=said if of_the_order else {})
    assert planned.arguments == ("org/m", *LAST)
    assert planned.environment["VLLM_CPU_KVCACHE_SPACE"] == "3"


@every_case(
    "memory_nbytes, num_slots, nbytes",
    [
        (32 * GIB, 2, KV_NBYTES_MAX),
        (8 * GIB, 2, GIB // 2),
        (8 * GIB + 17 * MIB, 3, 342 * MIB),
        (256 * MIB, 8, KV_NBYTES_MIN),
    ],
)
def test_on_the_cpu_the_kv_cache_gets_an_eighth_of_a_slots_memory(
    memory_nbytes: int, num_slots: int, nbytes: int
) -> None:
    hardware = Hardware(CPU.cpus, memory_nbytes)
    planned = launch(hardware=hardware, policy=LaunchPolicy(num_slots))
    assert option_value(planned.arguments, "--kv-cache-memory-bytes") == str(nbytes)


def test_the_operator_may_say_the_size_of_the_kv_cache() -> None:
    planned = launch(policy=LaunchPolicy(2, kv_nbytes=99 * MIB))
    assert planned.arguments == ("org/m", "--kv-cache-memory-bytes", str(99 * MIB), *LAST)


def test_on_a_gpu_the_kv_cache_is_vllms_business() -> None:
    planned = launch(hardware=CUDA, policy=LaunchPolicy(2, kv_nbytes=99 * MIB))
    assert planned.arguments == ("org/m", *LAST)


@every_case(
    "arguments, value",
    [
        ((), None),
        (("--a-b", "c"), "c"),
        (("--a_b", "c"), "c"),
        (("--a_b=c",), "c"),
        (("--a-b=c=d_e",), "c=d_e"),
        (("--a-b=",), ""),
        (("--a-b",), ""),
        (("--a-b", "c", "--a-b", "d"), "d"),
        (("--a-bc", "c"), None),
        (("a-b", "c"), None),
        (("-x", "c"), "c"),
        (("-x=c",), "c"),
    ],
)
def test_an_option_is_found_in_vllms_spellings(arguments: tuple[str, ...], value: str | None) -> None:
    assert option_value(arguments, "--a-b", "-x") == value


@every_case(
    "arguments, num_slots",
    [
        ((), 1),
        (("--tensor-parallel-size", "2"), 2),
        (("-tp", "4"), 4),
        (("-tp=4",), 4),
        (("--tensor_parallel_size=2", "-pp", "3", "--data-parallel-size", "5"), 30),
        (("-tp", "8", "-tp", "2"), 2),
        (("-tp", "0"), 1),
        (("-tp", "-2"), 1),
        (("-tp", "two"), 1),
        (("-tp", "1e3"), 1),
        (("-tp", "²"), 1),
        (("-tp", "10000"), 1),
        (("-tp",), 1),
        (("--prefill-context-parallel-size", "2", "-tp", "2"), 4),
        (("-pcp=3",), 3),
        (("--prefill_context_parallel_size=2", "--decode-context-parallel-size", "2"), 2),
        (("--tensor-par", "4"), 4),
        (("--pipeline-parallel=2",), 2),
        (("--tokenizer", "4"), 1),
        (("-dp", "8", "--data-parallel-size-local", "2"), 2),
    ],
)
def test_the_parallel_sizes_say_how_many_slots_are_wanted(arguments: tuple[str, ...], num_slots: int) -> None:
    assert num_slots_of(arguments) == num_slots


# ----------------------------------------------------------------------------------------------------------- slots


def test_there_is_a_slot_for_each_gpu_or_for_each_processor() -> None:
    assert default_num_slots(CUDA) == 2
    assert default_num_slots(CPU) == 8


def test_a_machine_without_a_processor_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Hardware(cpus=(), memory_nbytes=GIB)


def test_the_platform_is_what_there_is() -> None:
    assert (CPU.platform, CUDA.platform) == ("cpu", "cuda")


@every_case("slots, gpus", [((0,), "GPU-a"), ((1,), "GPU-b"), ((0, 1), "GPU-a,GPU-b")])
def test_slots_are_gpus(slots: tuple[int, ...], gpus: str) -> None:
    planned = launch(hardware=CUDA, slots=slots, environment={"CUDA_VISIBLE_DEVICES": "7"})
    assert planned.environment["CUDA_VISIBLE_DEVICES"] == gpus
    assert planned.cpus == ()
    assert planned.num_threads == 4 * len(slots)
    assert "OMP_NUM_THREADS" not in planned.environment


def test_an_engine_has_a_thread_where_there_are_more_slots_than_processors() -> None:
    hardware = Hardware((0,), GIB, gpus=CUDA.gpus)
    assert launch(hardware=hardware).num_threads == 1


@every_case("slots, cpus", [((0,), (0, 1, 2, 3)), ((1,), (8, 9, 10, 11)), ((0, 1), (0, 1, 2, 3, 8, 9, 10, 11))])
def test_slots_are_processors(slots: tuple[int, ...], cpus: tuple[int, ...]) -> None:
    planned = launch(slots=slots)
    assert planned.cpus == cpus
    assert planned.num_threads == len(cpus)
    assert "CUDA_VISIBLE_DEVICES" not in planned.environment


processors = st.lists(st.integers(0, 1023), min_size=1, max_size=200, unique=True).map(lambda cpus: tuple(sorted(cpus)))


@given(processors, st.data())
def test_shares_are_disjoint_equal_and_all_there_is(cpus: tuple[int, ...], data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, len(cpus)))
    shares = [cpus_of((slot,), Hardware(cpus, GIB), num_slots) for slot in range(num_slots)]
    assert tuple(cpu for share in shares for cpu in share) == cpus
    assert {len(share) - len(cpus) // num_slots for share in shares} <= {0, 1}


@given(processors, st.integers(1, 500), st.data())
def test_a_slot_has_a_processor_however_many_slots_there_are(
    cpus: tuple[int, ...], num_slots: int, data: st.DataObject
) -> None:
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), min_size=1, max_size=9, unique=True))
    share = cpus_of(slots, Hardware(cpus, GIB), num_slots)
    assert share
    assert set(share) <= set(cpus)


@every_case(
    "num_slots, pin, is_pinned",
    [(2, None, True), (3, None, False), (8, None, False), (2, False, False), (8, True, True)],
)
def test_a_slot_is_pinned_where_it_has_processors_enough(num_slots: int, pin: bool | None, is_pinned: bool) -> None:
    planned = launch(policy=LaunchPolicy(num_slots, pin=pin))
    assert planned.cpus == (cpus_of((0,), CPU, num_slots) if is_pinned else ())
    assert planned.num_threads == len(cpus_of((0,), CPU, num_slots))


def test_a_slot_is_described_by_what_it_has() -> None:
    assert describe_slot(1, CUDA, LaunchPolicy(2)) == "GPU GPU-b, 80.00 GiB"
    assert describe_slot(1, CPU, LaunchPolicy(4)) == "cpu 2,3, 8.00 GiB"
    assert describe_slot(9, CUDA, LaunchPolicy(16, ray_address="r:1")) == "one of 16 accelerators of several nodes"


def test_an_engine_over_several_nodes_leaves_its_workers_to_rays_executor() -> None:
    policy = LaunchPolicy(16, ray_address="r:1", environment={"CUDA_VISIBLE_DEVICES": ""})
    planned = launch("--tensor-parallel-size", "16", slots=tuple(range(16)), hardware=CUDA, policy=policy)
    assert option_value(planned.arguments, "--distributed-executor-backend") == "ray"
    assert planned.environment["RAY_ADDRESS"] == "r:1"
    assert "CUDA_VISIBLE_DEVICES" not in planned.environment
    said = launch("--distributed-executor-backend=mp", slots=(0,), hardware=CUDA, policy=policy)
    assert option_value(said.arguments, "--distributed-executor-backend") == "mp"


# ----------------------------------------------------------------------------------------------------- environment


def test_the_orders_variables_overrule_the_agents_and_the_key_overrules_both() -> None:
    policy = LaunchPolicy(2, environment={"A": "agent", "B": "agent", "VLLM_API_KEY": "agent"})
    planned = launch(policy=policy, environment={"B": "order", "VLLM_API_KEY": "order"}).environment
    assert planned == {
        "A": "agent",
        "B": "order",
        "VLLM_API_KEY": "secret",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "4",
    }
    assert policy.environment["B"] == "agent"


def test_an_order_may_choose_its_threads_and_the_agents_own_number_is_not_theirs() -> None:
    policy = LaunchPolicy(2, environment={"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "all"})
    said = {"OMP_NUM_THREADS": "3", "VLLM_CPU_OMP_THREADS_BIND": "0-2"}
    names = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
    assert [launch(policy=policy, environment=said).environment[name] for name in names] == ["3", "0-2"]
    assert [launch(policy=policy).environment[name] for name in names] == ["4", "nobind"]


@every_case("said", [("--api-key", "mine"), ("--api-key=mine",), ("--api_key", "mine")])
def test_a_key_among_the_arguments_is_the_one_that_counts(said: tuple[str, ...]) -> None:
    assert launch(*said).api_key == "mine"
    assert launch().api_key == "secret"


def test_the_guard_stands_beside_an_orders_own_middleware_and_under_a_file_of_settings() -> None:
    for said in (("--middleware", "a.B"), ("--config", "settings.yaml")):
        arguments = launch(*said).arguments
        assert arguments[1:3] == said
        assert arguments[-len(LAST) :] == LAST
    assert "VLLM_USE_RUST_FRONTEND" not in launch(environment={"VLLM_USE_RUST_FRONTEND": "1"}).environment


@every_case("prefix", COLD_VARIABLES)
def test_a_variable_that_is_read_early_needs_a_cold_start(prefix: str) -> None:
    name = f"{prefix}X"
    assert launch(environment={name: "1"}).cold_reason == f"{name} would be read too late"
    assert launch(policy=LaunchPolicy(2, environment={name: "1"})).cold_reason == ""  # the warm parent has it, too


def test_a_token_of_the_hub_and_what_is_read_when_it_is_used_start_warm() -> None:
    assert launch(environment={"HF_TOKEN": "hf_x", "HUGGING_FACE_HUB_TOKEN": "hf_x"}).cold_reason == ""
    assert launch(environment={"HF_TOKEN_PATH": "/x"}).cold_reason == "HF_TOKEN_PATH would be read too late"


def test_the_token_of_the_hub_is_read_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_first")
    assert huggingface_hub.get_token() == "hf_first"
    monkeypatch.setenv("HF_TOKEN", "hf_second")
    assert huggingface_hub.get_token() == "hf_second"


def test_a_file_of_arguments_stands_before_the_command_line() -> None:
    assert config_path_of(("--config", "a.yaml", "-tp", "2")) == "a.yaml"
    assert config_path_of(("--config=a.yaml", "--config")) is None  # vLLM passes over the first, and refuses the second
    said = with_config(("-tp", "2"), {"tensor_parallel_size": 4, "enforce-eager": True, "x": False, "y": {"z": 1}})
    assert said == ("--tensor_parallel_size", "4", "--enforce-eager", "--y", '{"z": 1}', "-tp", "2")
    assert num_slots_of(said) == 2


def test_all_variables_that_need_a_cold_start_are_named() -> None:
    said = {"LD_PRELOAD": "x", "HF_HOME": "y", "VLLM_USE_V2": "1", "MY_HF_HOME": "z", "SLLM_MIGRATION": "1"}
    told = "HF_HOME, LD_PRELOAD, SLLM_MIGRATION would be read too late"
    assert launch(environment=said).cold_reason == told
