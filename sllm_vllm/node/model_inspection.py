"""Replaces vLLM's inspection of a model's class in forked engines: it runs in a fork of the engine. Imports no vLLM.

If vLLM's cache folder does not know an architecture, vLLM imports the class in a new interpreter, because that may
initialise CUDA, and asks it what the class can do. The new interpreter imports all of vLLM again: 48 s of a start that
takes 2 s otherwise. A fork of a process that has imported vLLM already is just as isolated, and takes 0.06 s.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType
from typing import NoReturn, TypeVar

T = TypeVar("T")

logger = logging.getLogger("vllm.sllm.inspection")  # below vLLM's own logger, whose handler prints it

REPLACED = "_run_in_subprocess"
"""vLLM's function that starts the interpreter, in its ``model_executor.models.registry``."""
ANSWER_S = 60.0
"""Longest wait for a forked process's answer before vLLM's own function is used."""


def inspect_in_forks(registry: ModuleType) -> None:
    """Make vLLM's model registry inspect classes in forks of this process; does nothing if the registry has no such
    function."""
    stock = getattr(registry, REPLACED, None)
    if stock is None:
        return

    def run(function: Callable[[], object]) -> object:
        start = time.monotonic()
        try:
            return ask_fork(function)
        except NoAnswer as error:
            logger.warning("event=inspect_model way=interpreter reason=%s", error)
            return stock(function)
        finally:
            logger.info("event=inspect_model seconds=%.3f", time.monotonic() - start)

    setattr(registry, REPLACED, run)


class NoAnswer(Exception):
    """The forked process ended without an answer, or did not answer in time."""


def ask_fork(function: Callable[[], T], *, answer_s: float = ANSWER_S) -> T:
    """Call ``function`` in a fork of this process and return its result.

    Raises:
        RuntimeError: ``function`` raised; the message has the traceback. NoAnswer: the fork gave no answer.
    """
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)
    with reader:
        pid = os.fork()
        if pid == 0:
            _answer(function, writer)
        writer.close()
        try:
            if not reader.poll(answer_s):
                raise NoAnswer(f"a forked process said nothing for {answer_s:.0f} s")
            value, problem = reader.recv()
        except EOFError:
            raise NoAnswer("a forked process ended without a word") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it has answered, or never will
            os.waitpid(pid, 0)
    if problem:
        raise RuntimeError(f"Error raised in a forked process:\n{problem}")
    result: T = value
    return result


def _answer(function: Callable[[], object], writer: Connection) -> NoReturn:
    """Runs in the forked process: send the result, then exit."""
    try:
        try:
            writer.send((function(), ""))
        except BaseException:  # top of a run loop: the waiting process raises it
            writer.send((None, traceback.format_exc()))
    finally:
        os._exit(0)
