"""What the machine has: GPUs by a real program called nvidia-smi that says what the test wants, and memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sllm_vllm.errors import ConfigError
from sllm_vllm.node import hardware
from sllm_vllm.node.core.launch import Gpu
from sllm_vllm.node.hardware import FREE_SHARE, available_nbytes, detect_hardware, parse_gpu
from sllm_vllm.units import GIB, MIB
from tests.support.cases import every_case

THREE = "0, GPU-aa11, 1000\n1, GPU-ab22, 2000\n\n2, GPU-cc33, 3000\n"

Smi = Callable[..., Path]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Factory ``smi(answer, status)``: the only program on the path."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(answer: str = THREE, *, status: int = 0, shell: str = "/bin/sh") -> Path:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!{shell}\necho \"$@\" > '{tmp_path}/asked'\nprintf '{answer}'\nexit {status}\n")
        program.chmod(0o755)
        return tmp_path / "asked"

    return make


def ids(gpus: tuple[str, ...] | None = None, visible: str | None = None) -> list[str]:
    return [gpu.id for gpu in detect_hardware(gpus, GIB, visible).gpus]


@every_case(
    "line, found",
    [
        ("0, GPU-1b2c, 143771", (0, Gpu("GPU-1b2c", 143771 * MIB))),
        ("12,GPU-x,1", (12, Gpu("GPU-x", MIB))),
        ("0, GPU-unified, [N/A]", (0, Gpu("GPU-unified", 0))),
    ],
)
def test_a_line_is_a_gpu(line: str, found: tuple[int, Gpu]) -> None:
    assert parse_gpu(line) == found


def test_the_machines_own_tool_is_asked(smi: Smi) -> None:
    asked = smi()
    found = detect_hardware(None, GIB, None)
    assert found.gpus == (Gpu("GPU-aa11", 1000 * MIB), Gpu("GPU-ab22", 2000 * MIB), Gpu("GPU-cc33", 3000 * MIB))
    assert found.platform == "cuda"
    assert asked.read_text() == "--query-gpu=index,uuid,memory.total --format=csv,noheader,nounits\n"


def test_a_machine_without_the_tool_has_no_gpu(smi: Smi) -> None:
    assert ids() == []


@pytest.mark.parametrize(
    ("answer", "status", "shell"),
    [(THREE, 9, "/bin/sh"), ("No devices were found", 0, "/bin/sh"), ("", 0, "/bin/sh"), (THREE, 0, "/not/there")],
)
def test_a_tool_that_fails_is_no_gpu(smi: Smi, answer: str, status: int, shell: str) -> None:
    smi(answer, status=status, shell=shell)
    assert ids() == []


def test_without_gpus_nobody_is_asked(smi: Smi) -> None:
    asked = smi()
    assert detect_hardware((), GIB, "0").platform == "cpu"
    assert not asked.exists()


@pytest.mark.parametrize(
    ("gpus", "found"),
    [
        (("1",), ["GPU-ab22"]),
        (("2", "0"), ["GPU-cc33", "GPU-aa11"]),
        ((" 1 ",), ["GPU-ab22"]),
        (("GPU-ab22",), ["GPU-ab22"]),
        (("GPU-c",), ["GPU-cc33"]),
        (("0", "GPU-aa11"), ["GPU-aa11"]),
        (("",), []),
    ],
)
def test_gpus_are_named_by_index_or_by_the_beginning_of_their_id(
    smi: Smi, gpus: tuple[str, ...], found: list[str]
) -> None:
    smi()
    assert ids(gpus) == found


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["GPU-aa11", "GPU-ab22", "GPU-cc33"]),
        ("", []),
        ("-1", []),
        ("1,2", ["GPU-ab22", "GPU-cc33"]),
        ("2, 0", ["GPU-cc33", "GPU-aa11"]),
        ("GPU-ab22", ["GPU-ab22"]),
        ("0,-1,1", ["GPU-aa11"]),
    ],
)
def test_what_cuda_may_see_bounds_the_choice(smi: Smi, visible: str | None, found: list[str]) -> None:
    smi()
    assert ids(None, visible) == found


def test_a_gpu_is_named_by_the_machines_index_among_those_that_are_visible(smi: Smi) -> None:
    smi()
    assert ids(("2",), "1,2") == ["GPU-cc33"]
    with pytest.raises(ConfigError, match="'0'"):
        ids(("0",), "1,2")


@pytest.mark.parametrize("name", ["3", "GPU-b", "gpu-aa11", "MIG-aa11"])
def test_a_gpu_that_is_not_there_is_told(smi: Smi, name: str) -> None:
    smi()
    with pytest.raises(ConfigError, match=rf"no GPU '{name}'; nvidia-smi lists 3"):
        ids((name,))
    with pytest.raises(ConfigError, match=rf"no GPU '{name}'; nvidia-smi lists 3"):
        ids(None, name)


def test_processors_are_those_that_this_process_may_use() -> None:
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        assert detect_hardware((), GIB, None).cpus == (min(mine),)
    finally:
        os.sched_setaffinity(0, mine)


def test_memory_is_what_was_said_or_most_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_nbytes", lambda: 10 * GIB)
    assert detect_hardware((), 3 * GIB, None).memory_nbytes == 3 * GIB
    assert detect_hardware((), None, None).memory_nbytes == int(10 * GIB * FREE_SHARE)


@pytest.mark.parametrize(
    ("limit", "used", "nbytes"),
    [(str(64 * MIB), str(24 * MIB), 40 * MIB), (str(64 * MIB), str(70 * MIB), MIB)],
)
def test_a_control_groups_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str, nbytes: int
) -> None:
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    assert available_nbytes() == nbytes


@pytest.mark.parametrize("limit", [None, "max\n"])
def test_without_a_limit_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None) -> None:
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert MIB < available_nbytes() < total
