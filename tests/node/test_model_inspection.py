"""vLLM's look at a model class, in a fork: its answer, its errors, and vLLM's own way where there is no answer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import pytest

from sllm_vllm.node.model_inspection import NoAnswer, ask_fork, inspect_in_forks


def registry(stock: Callable[[Callable[[], Any]], Any]) -> Any:
    """Something like vLLM's module."""
    module = ModuleType("registry")
    cast("Any", module)._run_in_subprocess = stock
    return module


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ModuleNotFoundError("No module named 'torchvision'")


def not_asked(function: Callable[[], Any]) -> Any:
    raise AssertionError("a new interpreter was started")


def test_the_function_runs_in_another_process_and_its_value_comes_back() -> None:
    module = registry(not_asked)
    inspect_in_forks(module)
    pid, value = module._run_in_subprocess(lambda: (os.getpid(), {"attn_type": "decoder"}))
    assert value == {"attn_type": "decoder"}
    assert pid != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_error_comes_back_with_its_traceback() -> None:
    module = registry(not_asked)
    inspect_in_forks(module)
    with pytest.raises(RuntimeError, match=r"in fail\n[\s\S]*No module named 'torchvision'"):
        module._run_in_subprocess(fail)


def test_a_fork_that_dies_leaves_it_to_vllms_own_way() -> None:
    module = registry(lambda function: "vLLM's answer")
    inspect_in_forks(module)
    assert module._run_in_subprocess(die) == "vLLM's answer"


def test_a_fork_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[int] = []
    fork = os.fork

    def noted_fork() -> int:
        forked.append(fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", noted_fork)
    with pytest.raises(NoAnswer, match="said nothing"):
        ask_fork(lambda: time.sleep(3600), answer_s=0.1)
    (pid,) = forked
    with pytest.raises(ChildProcessError):  # ended and reaped
        os.waitpid(pid, os.WNOHANG)


def test_no_descriptor_is_left() -> None:
    before = os.listdir("/proc/self/fd")
    ask_fork(lambda: None)
    assert os.listdir("/proc/self/fd") == before


def test_a_registry_without_such_a_function_stays_as_it_is() -> None:
    module = ModuleType("registry")
    inspect_in_forks(module)
    assert not hasattr(module, "_run_in_subprocess")
