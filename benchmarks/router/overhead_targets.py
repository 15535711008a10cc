"""The targets between client and engine: nothing, our router, or a peer. Each is started as its users start it.

Owns the table of peers: packages, versions, settings. Each peer has its own environment in the cache, made once and
marked when complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common.supervise import ROOT, Workspace
from benchmarks.common.vllm_server import HOST, free_port
from benchmarks.loading.bytecode import environment_of
from benchmarks.router.overhead_processes import Tree
from benchmarks.router.overhead_report import OURS, OURS_SOCKET
from sllm_vllm.config import child_environment
from sllm_vllm.errors import NodeError
from sllm_vllm.node.client import NodeClient
from sllm_vllm.router.config.keys import digest_of

READY_S_MAX = 600.0
STOP_S_MAX = 30.0
INSTALL_S_MAX = 900.0
LOG_SHOWN = 3000
"""Characters of a log that a failure shows."""
ONGOING_MAX = 1024
"""More than the number of streams that are measured at once."""
CLIENT_KEY = f"sk-{secrets.token_hex(16)}"
"""The client key of this run. Our router and litellm, which does not start without a key, accept no other."""
_POLL_S = 0.1
_URL = re.compile(r"event=router_serving url=http://[^:\s]+:(\d+)")


class TargetFailed(Exception):
    """The target could not be installed, or did not become ready. The message is written for the user."""


@dataclass(frozen=True, slots=True)
class Target:
    """A target that answers requests. ``tree``: its processes; None for the engine itself."""

    name: str
    port: int
    tree: Tree | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """The engine behind all targets. ``command`` is used in place of ``vllm serve``."""

    model: str
    source: str
    command: Sequence[str]
    arguments: dict[str, object] = field(default_factory=dict)
    node: dict[str, object] = field(default_factory=dict)
    """Additional keys for the section ``node`` in our router's configuration."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer runs: its environment's programs, a scratch directory, its port, and the engine behind it."""

    programs: Path
    scratch: Path
    port: int
    backend: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A peer. ``setting``: what differs from its defaults, and why, in words."""

    name: str
    package: str
    version: str
    setting: str
    command: Callable[[Place], list[str]]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def requirement(self) -> str:
        """The requirement in pip's syntax."""
        return f"{self.package}=={self.version}"


def _vllm_router(place: Place) -> list[str]:
    words = ["--host", HOST, "--port", str(place.port), "--worker-urls", place.backend, "--policy", "round_robin"]
    words += ["--log-level", "error", "--prometheus-port", str(free_port())]
    return [str(place.programs / "vllm-router"), *words, "--worker-startup-check-interval", "1"]


def _litellm(place: Place) -> list[str]:
    model = {"model": f"hosted_vllm/{place.model}", "api_base": f"{place.backend}/v1", "api_key": "none"}
    values = {
        "model_list": [{"model_name": place.model, "litellm_params": model}],
        "litellm_settings": {"set_verbose": False, "request_timeout": 600, "telemetry": False, "callbacks": []},
        "general_settings": {"master_key": CLIENT_KEY, "disable_spend_logs": True, "disable_error_logs": True},
    }
    config = place.scratch / "litellm.yaml"
    config.write_text(json.dumps(values))
    command = [str(place.programs / "litellm"), "--config", str(config), "--host", HOST, "--port", str(place.port)]
    return [*command, "--num_workers", "1"]


def _ray_serve(place: Place) -> list[str]:
    script = ROOT / "benchmarks" / "router" / "overhead_serve.py"
    command = [str(place.programs / "python"), "-P", str(script), place.backend, str(place.port)]
    return [*command, str(place.scratch / "ray")]


# The newest versions whose dependencies could all be installed.
PEERS = (
    Peer(
        name="vllm-router",
        package="vllm-router",
        version="0.1.17",
        setting="round robin, which looks at no prompt; errors alone are logged",
        command=_vllm_router,
    ),
    Peer(
        name="litellm",
        package="litellm[proxy]",
        version="1.106.2",
        setting="its production settings: one worker, LITELLM_MODE=PRODUCTION, a master key (it does not"
        " start without), errors alone are logged; no database, cache, callback or telemetry; prices from the package",
        command=_litellm,
        environment={"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    ),
    Peer(
        name="Ray Serve",
        package="ray[serve]",
        version="2.60.0",
        setting=f"RAY_SERVE_THROUGHPUT_OPTIMIZED=1, one proxy, one replica with max_ongoing_requests={ONGOING_MAX}"
        " (default: 5, and streams would wait for each other); no access log, no dashboard",
        command=_ray_serve,
        environment={"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_USAGE_STATS_ENABLED": "0"},
    ),
)


# -------------------------------------------------------------------------------------------------------- installing


def ensure_peer(workspace: Workspace, peer: Peer) -> Path:
    """Return the directory of the programs in a peer's environment; make the environment if it does not exist yet.

    Raises:
        TargetFailed: the environment could not be made.
    """
    home = workspace.cache / "peers" / f"{re.sub('[^a-z0-9]+', '-', peer.name.lower())}-{peer.version}"
    if not (home / "made").exists():
        shutil.rmtree(home, ignore_errors=True)  # can't be moved into place when complete, so a file marks it
        home.parent.mkdir(exist_ok=True)
        _run([sys.executable, "-m", "venv", str(home)], home)
        _run([str(home / "bin" / "pip"), "install", "--quiet", peer.requirement], home)
        (home / "made").touch()
    return home / "bin"


def _run(command: Sequence[str], home: Path) -> None:
    log = home.with_name(f"{home.name}.log")
    with log.open("wb") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=INSTALL_S_MAX, check=False)
        except subprocess.TimeoutExpired:
            raise TargetFailed(f"its environment was not made in {INSTALL_S_MAX:.0f} s") from None
    if done.returncode:
        raise TargetFailed(f"its environment could not be made; peers/{log.name} in the cache says why")


# ---------------------------------------------------------------------------------------------------------- starting


@contextlib.contextmanager
def running_peer(workspace: Workspace, peer: Peer, programs: Path, *, backend: str, model: str) -> Iterator[Target]:
    """Run a peer in front of an engine.

    Raises:
        TargetFailed: the peer did not become ready.
    """
    scratch = workspace.tmp / peer.name.split()[0]
    scratch.mkdir(exist_ok=True)
    place = Place(programs, scratch, free_port(), backend, model)
    environment = child_environment(TMPDIR=str(workspace.tmp), PYTHONDONTWRITEBYTECODE="", **peer.environment)
    log = workspace.run / f"{scratch.name}.log"
    with _running(peer.command(place), environment, log=log, grace_s=STOP_S_MAX) as process:
        _wait_answer(process, place.port, model, log=log)
        yield Target(peer.name, place.port, Tree(process.pid))


@contextlib.contextmanager
def running_ours(workspace: Workspace, engine: Engine, *, on_socket: bool = False) -> Iterator[tuple[Target, str]]:
    """Run our router, which starts the engine on a port or a Unix socket. Also yields the engine's URL for other
    targets.

    Raises:
        TargetFailed: the router or its engine did not become ready.
    """
    name = "ours-socket" if on_socket else "ours"
    node_dir, log = workspace.tmp / f"node-{name}", workspace.run / f"{name}.log"
    config = workspace.tmp / f"{name}.yaml"
    values = {
        "server": {"port": 0},
        "keys": {"clients": [{"sha256": digest_of(CLIENT_KEY)}]},
        "node": {"slots": 1, "warm": False, "node_dir": str(node_dir), "engine_command": list(engine.command)}
        | {"engine_sockets": on_socket}
        | engine.node,
        "store": {"directory": str(workspace.run / f"store-{name}")},
        "defaults": {"ongoing_max": ONGOING_MAX, "target_ongoing": ONGOING_MAX, "min_replicas": 1},
        "models": [{"name": engine.model, "source": engine.source, "engine_arguments": engine.arguments}],
    }
    config.write_text(json.dumps(values))
    environment = child_environment(**environment_of(workspace), HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    command = [str(Path(sys.executable).with_name("sllm-vllm")), "serve", str(config)]
    with _running(command, environment, log=log, grace_s=60.0) as process:
        pid, url = _wait_engine(process, NodeClient(node_dir / "socket"), log)
        found = _URL.search(log.read_text())
        assert found is not None
        _wait_answer(process, int(found[1]), engine.model, log=log)
        yield Target(OURS_SOCKET if on_socket else OURS, int(found[1]), Tree(process.pid, (pid,))), url


@contextlib.contextmanager
def _running(
    command: Sequence[str], environment: dict[str, str], *, log: Path, grace_s: float
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in its own session; nothing of its process group is left afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_engine(process: subprocess.Popen[bytes], node: NodeClient, log: Path) -> tuple[int, str]:
    """Wait until the engine is ready; return its process id and URL."""
    deadline_s = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(NodeError):
            for replica in node.report().replicas:
                if replica.is_ready and replica.pid is not None and replica.url is not None:
                    return replica.pid, replica.url
        time.sleep(_POLL_S)
    raise TargetFailed(f"the router's engine did not get ready\n{_tail(log)}")


def _wait_answer(process: subprocess.Popen[bytes], port: int, model: str, *, log: Path) -> None:
    """Wait until the target answers a small question."""
    asked = {"model": model, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 1}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {CLIENT_KEY}"}
    request = urllib.request.Request(f"http://{HOST}:{port}/v1/chat/completions", json.dumps(asked).encode(), headers)
    deadline_s, last = time.monotonic() + READY_S_MAX, ""
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=READY_S_MAX) as answer:
                json.loads(answer.read())["choices"][0]
                return
        except urllib.error.HTTPError as error:
            last = f"status {error.code}: {error.read()[:300].decode(errors='replace')}"
        except (OSError, LookupError, ValueError) as error:
            last = str(error)
        time.sleep(_POLL_S)
    raise TargetFailed(f"it did not get ready: {last}\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-LOG_SHOWN:]
