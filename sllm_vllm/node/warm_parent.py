"""The warm parent: a process that has imported vLLM and forks a whole stock server for each order. Imports vLLM.

``python -m sllm_vllm.node.warm_parent SOCKET_FD`` reads orders from a socket (``WarmOrder``, with two descriptors
attached) and answers each with the engine's pid. The engine is forked twice, so that the agent, not this process,
becomes its parent: it survives the end of this process, and ends with the agent. It begins when the agent, which knows
its pid by then, writes a byte into a pipe; an engine whose pid never reached the agent ends without having begun.

Stock vLLM does the rest: the engine's command line goes through vLLM's own parser and ``serve`` command. Three things
are changed in this process, and so in its engines: vLLM's processes are forked instead of spawned, model classes are
inspected in a fork (``model_inspection``), and the scan for kernels to override, done here once, is not repeated.
DESIGN.md lists the hazards of forking.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import multiprocessing
import os
import pkgutil
import signal
import socket
import stat
import sys
import tempfile
import time
from multiprocessing import resource_tracker
from typing import Any, NoReturn

from sllm_vllm.config import replace_environment
from sllm_vllm.node.core.launch import option_value
from sllm_vllm.node.model_inspection import inspect_in_forks
from sllm_vllm.node.warm_order import ORDER_NBYTES_MAX, WarmAnswer, WarmOrder, WarmReady, installation

_PR_SET_PDEATHSIG = 1
_ADOPTION_MAX_S = 5.0
_NUM_FDS = 2
"""Attached to an order: the engine's standard output, and the reading end of the pipe that tells it to begin."""
_libc = ctypes.CDLL(None, use_errno=True)

_MODULES = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.app",
    "vllm.model_executor.layers.quantization.compressed_tensors.utils",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.renderers.hf",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "model_hosting_container_standards.sagemaker",
    "prometheus_fastapi_instrumentator",
    "setproctitle",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
    "sllm_vllm.loader.vllm.loader",
)
"""Modules that every server imports in one of its three processes; beside ``_ROUTES``."""
_ROUTES = ("api_router", "serving", "batch_serving", "offline_docs")
"""Modules below ``vllm.entrypoints`` with the server's HTTP routes."""
_DEVICE_MODULES = {
    "cpu": ("vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn"),
    "cuda": ("vllm.v1.worker.gpu_worker",),
}
_FORKING = (
    "vllm.utils.system_utils",
    "vllm.v1.engine.coordinator",
    "vllm.v1.engine.utils",
    "vllm.v1.executor.multiproc_executor",
)
"""Modules that ask vLLM how to start a process."""
_REGISTRY = "vllm.model_executor.models.registry"


class ForkRefused(Exception):
    """The order can't be carried out here; the message says why. A cold start can do it."""


def main(socket_fd: int) -> int:
    """Import, report ready, and fork until the agent closes the socket. Returns the exit status."""
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # SIGINT from a terminal is meant for the agent
    with socket.socket(fileno=socket_fd) as channel:
        start = time.monotonic()
        parser = prepare()
        ready = WarmReady(pid=os.getpid(), seconds=time.monotonic() - start, installation=installation())
        channel.sendall(ready.model_dump_json().encode())
        while True:
            data, fds, _, _ = socket.recv_fds(channel, ORDER_NBYTES_MAX, _NUM_FDS)
            if not data:
                return 0
            order = WarmOrder.model_validate_json(data)
            channel.sendall(_answer(order, fds, channel, parser=parser).model_dump_json().encode())


def prepare() -> Any:
    """Import everything and apply the changes; returns vLLM's command-line parser."""
    from vllm.platforms import current_platform

    for name in (*_MODULES, *_route_modules(), *_DEVICE_MODULES.get(current_platform.device_type, ())):
        with contextlib.suppress(ModuleNotFoundError):  # missing in this vLLM, which imports its own when needed
            importlib.import_module(name)
    for name in _FORKING:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "get_mp_context"):
            module.get_mp_context = _fork_context  # type: ignore[attr-defined]
    override_kernels_once(current_platform)
    parser = _parser()
    registry = sys.modules.get(_REGISTRY)
    if registry is not None:
        inspect_in_forks(registry)
    gc.collect()
    gc.freeze()  # so that no collection in an engine touches, and so copies, the pages of what was imported
    return parser


def override_kernels_once(platform: Any) -> None:
    """Do once what every worker would repeat, if this vLLM does it at all (0.32 does, 0.27.1 does not)."""
    kind = type(platform)
    if hasattr(kind, "register_triton_kernel_overrides"):  # not the instance: it has None for any missing name
        platform.register_triton_kernel_overrides()
        kind.register_triton_kernel_overrides = classmethod(lambda cls: None)


def _route_modules() -> list[str]:
    """The modules of this vLLM's HTTP routes; their place depends on its version."""
    import vllm.entrypoints as package

    found = [info.name for info in pkgutil.walk_packages(package.__path__, "vllm.entrypoints.", onerror=lambda _: None)]
    return [name for name in found if name.rpartition(".")[2] in _ROUTES]


def check_forkable() -> None:
    """Check that a fork now gives a sound process.

    Raises:
        ForkRefused: another thread runs (its locks would stay locked in the child), or CUDA is initialised.
    """
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise ForkRefused(f"the warm parent has {len(threads)} threads")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise ForkRefused("CUDA is initialised in the warm parent")


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process (SIGKILL) when ``parent`` ends, for whatever reason."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)


def _fork_context() -> Any:
    return multiprocessing.get_context("fork")


def _parser() -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ModuleNotFoundError:  # seen in 0.30, not in 0.27.1
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))  # also loads the general plugins


def _answer(order: WarmOrder, fds: list[int], channel: socket.socket, *, parser: Any) -> WarmAnswer:
    try:
        if len(fds) != _NUM_FDS:
            raise ForkRefused(f"{len(fds)} descriptors came with the order instead of {_NUM_FDS}")
        check_forkable()
        return WarmAnswer(number=order.number, pid=_fork_engine(order, fds, channel, parser=parser))
    except (ForkRefused, OSError) as error:
        return WarmAnswer(number=order.number, problem=str(error))
    finally:
        for fd in fds:
            os.close(fd)


def _fork_engine(order: WarmOrder, fds: list[int], channel: socket.socket, *, parser: Any) -> int:
    """Fork an engine whose parent is the agent; returns its pid."""
    agent, (reading, writing) = os.getppid(), os.pipe()
    middle = os.fork()
    if middle == 0:
        engine = os.fork()
        if engine == 0:
            channel.close()
            for fd in (reading, writing):
                os.close(fd)
            _become_engine(order, fds, agent, parser=parser)
        os.write(writing, str(engine).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        pid = int(pipe.read() or b"0")
    os.waitpid(middle, 0)
    if pid == 0:
        raise ForkRefused("the fork failed")
    return pid


def _become_engine(order: WarmOrder, fds: list[int], agent: int, *, parser: Any) -> NoReturn:
    """Runs in the new process: become what ``vllm serve`` would be."""
    output, go = fds
    try:
        _wait_adopted(agent)
        if not os.read(go, 1):
            os._exit(1)
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.closerange(3, 256)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.register_at_fork(after_in_child=functools.partial(_at_fork, option_value(order.arguments, "--uds")))
        replace_environment(order.environment)
        tempfile.tempdir = None  # the directory found during the import is not this engine's
        os.chdir(order.directory)
        os.sched_setaffinity(0, order.cpus or os.sched_getaffinity(0))
        _reseed(order)
        resource_tracker.ensure_running()  # here, as where vLLM spawns: an engine core's own would be killed with it
        _serve(order, parser)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1 if error.code else 0
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)  # noqa: T201 (as the interpreter does)
    except BaseException:  # top of a run loop: what the interpreter would print
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without the exit handlers, which are the parent's


def _wait_adopted(agent: int) -> None:
    """Wait until the intermediate process has ended, so that the agent is this process's parent."""
    deadline = time.monotonic() + _ADOPTION_MAX_S
    while os.getppid() != agent:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0005)
    die_with_parent(agent)


def _at_fork(socket_path: str | None) -> None:
    """Runs in each process that the engine forks: end it with its parent, and don't keep the server's address open."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in os.listdir("/proc/self/fd"):
        if is_server(int(name), socket_path):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, int(name), inheritable=False)  # not closed: a copied object still refers to it
            os.close(null)


def is_server(fd: int, socket_path: str | None) -> bool:
    """Whether it is a socket with a TCP port or this path, but no connection: a server's, even before it listens."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        with socket.socket(fileno=os.dup(fd)) as copy:
            if copy.type != socket.SOCK_STREAM or _is_connected(copy):
                return False
            if copy.family == socket.AF_UNIX:
                return socket_path is not None and copy.getsockname() == socket_path
            return copy.family in {socket.AF_INET, socket.AF_INET6} and copy.getsockname()[1] != 0
    except OSError:  # the descriptor that listed the directory
        return False


def _is_connected(channel: socket.socket) -> bool:
    try:
        channel.getpeername()
    except OSError:
        return False
    return True


def _reseed(order: WarmOrder) -> None:
    """Reseed NumPy's random numbers, and use as many threads as the order says."""
    import numpy
    import torch

    numpy.random.seed()
    torch.set_num_threads(order.num_threads)


def _serve(order: WarmOrder, parser: Any) -> None:
    """Do what vLLM's ``main`` does for ``vllm serve``."""
    import vllm.logger
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    sys.argv = ["vllm", "serve", *order.arguments]
    cli_env_setup()
    arguments = parser.parse_args(list(order.arguments))
    if hasattr(vllm.logger, "configure_logging_from_args"):  # not in 0.30
        vllm.logger.configure_logging_from_args(arguments)
    ServeSubcommand().validate(arguments)
    ServeSubcommand.cmd(arguments)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
