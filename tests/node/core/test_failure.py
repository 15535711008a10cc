"""What an engine says when it fails: whole logs of real vLLM, processes that print at once, lines nobody expected."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.node.core.failure import CAUSE_MAX, PROCESSES_MAX, FailureWords
from tests.support.cases import every_case

LOGS = Path(__file__).parent / "logs" / "failures"
"""Of vLLM 0.32 on the CPU, without its lines of information."""

CAUSES = {
    "bad-config": "OSError: It looks like the config file at '/models/badjson/config.json' is not a valid JSON file.",
    "cut-weights": "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete",
    "kv-cache-too-small": "ValueError: No available memory for the cache blocks.",
    "missing-module": "ModuleNotFoundError: No module named 'torchvision'",
    "missing-tokenizer": "ValueError: Couldn't instantiate the backend tokenizer from one of:",
    "missing-weights": "RuntimeError: Cannot find any model weights with `/models/noweights`",
    "out-of-memory": "RuntimeError: Worker failed with error 'Available memory on node 0 (10.34/12.71 GiB) on kv cache",
    "port-in-use": "OSError: [Errno 98] Address already in use",
    "too-long": "ValidationError: User-specified max_model_len (99999999) is greater than the derived max_model_len",
    "unknown-architecture": "ValidationError: Model architectures ['NopeForCausalLM'] are not supported for now.",
    "wrong-argument": "unrecognized arguments: --no-such-argument",
    "wrong-value": "argument --dtype: invalid choice: 'float17' (choose from",
}
"""How each cause begins."""

ROOT = [
    "(Worker pid=7) ERROR 11-30 15:00:00 [multiproc_executor.py:953] Traceback (most recent call last):",
    '(Worker pid=7) ERROR 11-30 15:00:00 [multiproc_executor.py:953]   File "/venv/worker.py", line 594, in load_model',
    "(Worker pid=7) ERROR 11-30 15:00:00 [multiproc_executor.py:953]     raise torch.OutOfMemoryError",
    "(Worker pid=7) ERROR 11-30 15:00:00 [multiproc_executor.py:953] torch.OutOfMemoryError: CUDA out of memory.",
]


def cause_of(lines: list[str]) -> str:
    words = FailureWords()
    for line in lines:
        words.note(line)
    return words.cause


@every_case("name", CAUSES)
def test_a_log_of_vllm_tells_why(name: str) -> None:
    cause = cause_of((LOGS / f"{name}.log").read_text().splitlines())
    assert cause.startswith(CAUSES[name])
    assert bool(cause) == bool(CAUSES[name])


def test_every_log_is_tried() -> None:
    assert {path.stem for path in LOGS.iterdir()} == set(CAUSES)


def test_an_exception_that_points_to_another_is_not_told_instead_of_it() -> None:
    pointer = [
        "(EngineCore pid=6) Traceback (most recent call last):",
        '(EngineCore pid=6)   File "/venv/core.py", line 1, in run',
        "(EngineCore pid=6) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert cause_of(ROOT + pointer) == "torch.OutOfMemoryError: CUDA out of memory."
    assert cause_of(pointer) == "RuntimeError: Engine core initialization failed. See root cause above."


def test_tracebacks_of_two_processes_that_mix_are_told_apart() -> None:
    other = [line.replace("Worker pid=7", "Worker pid=8").replace("CUDA out of memory.", "other") for line in ROOT]
    mixed = [line for pair in zip(ROOT, other, strict=True) for line in pair]
    assert cause_of(mixed) == "torch.OutOfMemoryError: other"
    assert cause_of(mixed[:-1]) == "torch.OutOfMemoryError: CUDA out of memory."


def test_a_field_that_is_wrong_is_told_with_what_is_wrong() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "/venv/serve.py", line 1, in main',
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "max_model_len",
        "  Input should be greater than 0 [type=greater_than, input_value=-5, input_type=int]",
        "    For further information visit https://errors.pydantic.dev/2.14/v/greater_than",
    ]
    assert cause_of(lines) == "ValidationError: Input should be greater than 0"


def test_what_stands_outside_of_a_traceback_is_no_exception() -> None:
    assert cause_of(["ValueError: said in a log line", "INFO: all is well"]) == ""


@given(st.lists(st.text() | st.sampled_from([*ROOT, "x: 1 validation error for X", "  ", ""])))
def test_any_text_will_do(lines: list[str]) -> None:
    assert len(cause_of([ROOT[0], *lines])) <= CAUSE_MAX


def test_no_number_of_processes_takes_memory_without_bound() -> None:
    words = FailureWords()
    for pid in range(10 * PROCESSES_MAX):
        words.note(f"(Worker pid={pid}) Traceback (most recent call last):")
    assert len(words._open) == PROCESSES_MAX
