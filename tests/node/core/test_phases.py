"""vLLM's own log lines as timed phases: whole logs, single lines, and lines that nobody expected."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.node.core.phases import LINE_MAX, StartPhase, StartPhases, timings_of
from tests.support.cases import every_case

LOGS = Path(__file__).parent / "logs"
CPU_END = [
    (189.0, "(Worker pid=1) INFO [monitor.py:60] [backbone] torch.compile took 118.00 s in total"),
    (190.0, "(Worker pid=1) INFO [cpu_model_runner.py:91] Warming up done."),
    (191.0, "(EngineCore pid=1) INFO [core.py:394] init engine (profile, create kv cache, warmup model) took 121.00 s"),
    (193.0, "INFO:     Application startup complete."),
]
"""What was cut off the cold log, in the words of vLLM's source."""
GPU = [
    (9.0, "INFO 06-01 [utils.py:233] non-default args: {'model': 'm'}"),
    (20.0, "INFO 06-01 [parallel_state.py:1004] world_size=2 rank=0 local_rank=0 backend=nccl"),
    (21.0, "INFO 06-01 [gpu_model_runner.py:5040] Starting to load model m..."),
    (24.0, "Loading safetensors checkpoint shards:  50% Completed | 1/2"),
    (30.0, "INFO 06-01 [default_loader.py:501] Loading weights took 5.50 seconds"),
    (31.0, "INFO 06-01 [gpu_model_runner.py:5150] Model loading took 14.5 GiB memory and 10.000000 seconds"),
    (33.0, "INFO 06-01 [backends.py:1105] Using cache directory: /cache/torch_compile_cache for vLLM's torch.compile"),
    (36.0, "INFO 06-01 [backends.py:1167] Dynamo bytecode transform time: 3.00 s"),
    (45.0, "INFO 06-01 [monitor.py:60] torch.compile took 12.00 s in total"),
    (47.0, "INFO 06-01 [monitor.py:91] Initial profiling/warmup run took 1.90 s"),
    (48.0, "INFO 06-01 [gpu_worker.py:760] Available KV cache memory: 50.0 GiB"),
    (49.0, "INFO 06-01 [kv_cache_utils.py:2327] GPU KV cache size: 400,000 tokens"),
    (50.0, "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):   0%|          | 0/67"),
    (55.0, "INFO 06-01 [gpu_model_runner.py:6582] Graph capturing finished in 5 secs, took 0.60 GiB"),
    (56.0, "INFO 06-01 [core.py:394] init engine (profile, create kv cache, warmup model) took 25.00 s"),
    (58.0, "INFO:     Application startup complete."),
]
"""Made of the formats in vLLM 0.32's source: no GPU was at hand."""


def read_log(name: str) -> list[tuple[float, str]]:
    lines = (LOGS / name).read_text().splitlines()
    return [(float(at_s), line) for at_s, _, line in (line.partition(" ") for line in lines)]


def rounded(lines: list[tuple[float, str]]) -> dict[str, float]:
    return {phase.name: round(seconds, 3) for phase, seconds in timings_of(lines).seconds.items()}


# -------------------------------------------------------------------------------------------------------- whole logs


def test_a_cold_log_of_the_cpu_is_cut_into_phases() -> None:
    assert rounded(read_log("cold.log") + CPU_END) == {
        "PROCESS": 16.013,
        "IMPORTS": 0.937,
        "WORKERS": 50.71,
        "INIT": 0.301,
        "WEIGHTS": 2.17,
        "PROFILE": 1.001,
        "COMPILE": 118.868,
        "WARMUP": 1.0,
        "HTTP": 2.0,
    }


def test_a_log_that_ends_early_tells_what_it_is_at() -> None:
    timings = timings_of(read_log("cold.log"))
    assert (timings.phase, timings.phase.value, timings.is_ready) == (StartPhase.COMPILE, "compiling", False)
    assert timings.nbytes is None


def test_a_warm_log_of_the_cpu_tells_the_bytes_too() -> None:
    """Its seconds are whole: they are those of the log's own clock."""
    timings = timings_of(read_log("warm.log"))
    assert (timings.phase, timings.is_ready, timings.total_s, timings.nbytes) == (StartPhase.READY, True, 2.0, 5247552)
    assert timings.seconds[StartPhase.WORKERS] == 1.0
    assert timings.seconds[StartPhase.WARMUP] == 1.0


def test_a_log_of_a_gpu_compiles_while_it_profiles() -> None:
    assert rounded(GPU) == {
        "PROCESS": 9.0,
        "IMPORTS": 0.0,
        "WORKERS": 11.0,
        "INIT": 1.0,
        "WEIGHTS": 10.0,
        "PROFILE": 6.0,
        "COMPILE": 12.0,
        "WARMUP": 2.0,
        "GRAPHS": 5.0,
        "HTTP": 2.0,
    }


@every_case("name", ["cold.log", "warm.log"])
def test_phases_add_up_to_the_whole(name: str) -> None:
    lines = read_log(name)
    timings = timings_of(lines)
    assert timings.total_s == pytest.approx(sum(timings.seconds.values()))
    assert timings.total_s <= lines[-1][0]


@every_case("without", range(len(GPU)))
def test_a_line_that_another_version_lacks_costs_its_phase_alone(without: int) -> None:
    lines = [line for number, line in enumerate(GPU) if number != without]
    full, less = timings_of(GPU), timings_of(lines)
    assert less.total_s == pytest.approx(lines[-1][0])
    assert set(full.seconds) - set(less.seconds) <= {
        StartPhase.WORKERS,
        StartPhase.INIT,
        StartPhase.GRAPHS,
        StartPhase.HTTP,
    }
    changed = [phase for phase in full.seconds if less.seconds.get(phase) != pytest.approx(full.seconds[phase])]
    assert len(changed) <= 3


def test_prefixes_of_processes_do_not_matter() -> None:
    prefixed = [(at_s, f"(Worker_TP0 pid=17) {line}") for at_s, line in GPU]
    assert timings_of(prefixed) == timings_of(GPU)


# ------------------------------------------------------------------------------------------------------ single lines


def test_the_process_has_started_when_it_is_told() -> None:
    phases = StartPhases()
    assert phases.timings(0.5).seconds == {StartPhase.PROCESS: 0.5}
    phases.process_started(1.0)
    assert phases.timings(4.0).seconds == {StartPhase.PROCESS: 1.0, StartPhase.IMPORTS: 3.0}


def test_it_is_ready_when_it_is_told() -> None:
    phases = StartPhases()
    phases.became_ready(3.0)
    phases.process_started(4.0)
    phases.note("Starting to load model m...", 5.0)
    assert phases.timings(9.0).total_s == 3.0


def test_the_module_is_built_while_weights_seem_to_be_loaded() -> None:
    """Our loader says when it is done how long that took; so does vLLM's."""
    lines = [
        (0.0, "world_size=1 rank=0"),
        (0.0, "Starting to load model m..."),
        (3.0, "event=load_model outcome=loaded source=store rank=0 bytes=10 construct_s=1.250 weights_s=1.5"),
    ]
    seconds = timings_of(lines).seconds
    assert (seconds[StartPhase.INIT], seconds[StartPhase.WEIGHTS]) == (1.25, 1.75)


def test_no_more_time_is_taken_than_there_was() -> None:
    lines = [(0.0, "Starting to load model m..."), (2.0, "Initializing model took 99.5 seconds")]
    assert timings_of(lines).seconds == {
        StartPhase.PROCESS: 0.0,
        StartPhase.IMPORTS: 0.0,
        StartPhase.INIT: 2.0,
        StartPhase.WEIGHTS: 0.0,
    }


def test_graphs_that_no_line_began_get_the_time_they_are_told_to_have_taken() -> None:
    lines = [(1.0, "GPU KV cache size: 1 tokens"), (7.0, "Graph capturing finished in 5 secs, took 0.60 GiB")]
    seconds = timings_of(lines).seconds
    assert (seconds[StartPhase.GRAPHS], seconds[StartPhase.WARMUP]) == (5.0, 1.0)


def test_bytes_of_all_workers_are_added_and_none_twice() -> None:
    phases = StartPhases()
    for rank, nbytes in ((0, 100), (1, 50), (1, 50)):
        phases.note(f"event=load_model outcome=loaded source=disk rank={rank} bytes={nbytes} rate=1", 1.0)
    assert phases.timings(1.0).nbytes == 150


def test_a_slower_worker_does_not_turn_the_start_back() -> None:
    lines = [(1.0, "Available KV cache memory: 50.0 GiB"), (2.0, "Starting to load model m...")]
    assert timings_of(lines).phase is StartPhase.PROFILE


def test_what_the_user_wrote_begins_no_phase() -> None:
    args = "non-default args: {'model': 'Capturing the graph, init engine took'}"
    assert timings_of([(1.0, args)]).phase is StartPhase.WORKERS


def test_time_that_goes_back_is_no_time() -> None:
    lines = [(5.0, "x"), (2.0, "Starting to load model m..."), (6.0, "Available KV cache memory")]
    assert timings_of(lines).seconds == {
        StartPhase.PROCESS: 5.0,
        StartPhase.IMPORTS: 0.0,
        StartPhase.WEIGHTS: 1.0,
        StartPhase.PROFILE: 0.0,
    }


def test_only_the_beginning_of_a_line_is_looked_at() -> None:
    assert timings_of([(1.0, "x" * LINE_MAX + "Application startup complete")]).phase is StartPhase.IMPORTS


def test_an_empty_log_is_a_start_of_no_time() -> None:
    assert timings_of([]).seconds == {StartPhase.PROCESS: 0.0}


SCRAPS = st.sampled_from(
    [
        "event=load_model ",
        "rank=",
        "bytes=",
        "construct_s=",
        "1.2.3",
        "٣",
        "\x00",
        "Initializing model took ",
        " s",
        "\n",
    ]
)


@given(st.lists(st.tuples(st.floats(-1e3, 1e6), st.one_of(st.text(), st.lists(SCRAPS).map("".join))), max_size=20))
def test_no_line_raises(lines: list[tuple[float, str]]) -> None:
    timings = timings_of(lines)
    assert all(seconds >= 0 for seconds in timings.seconds.values())


def test_the_inspection_of_a_class_is_taken_from_the_phase_that_ran() -> None:
    lines = [
        (0.1, "INFO [utils.py:233] non-default args: {'model': 'm'}"),
        (3.1, "INFO [model_inspection.py:46] event=inspect_model seconds=2.500"),
        (4.1, "INFO [core.py:126] Initializing a V1 LLM engine"),
        (5.1, "world_size=1 rank=0 local_rank=0"),
    ]
    assert rounded(lines) == {"PROCESS": 0.1, "IMPORTS": 0.0, "INSPECT": 2.5, "WORKERS": 2.5, "INIT": 0.0}
