"""vLLM's entry point, in a process of its own as in every vLLM process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.plugin import register
from sllm_vllm.store.channel import PROTOCOL_VERSION, short_address
from tests.support.waiting import DEADLINE_S, wait_until

LOADED = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
print("vllm.model_executor.model_loader" in sys.modules, "sllm_vllm.loader.vllm.loader" in sys.modules)
from vllm.model_executor.model_loader import get_model_loader
from vllm.config.load import LoadConfig
print(type(get_model_loader(LoadConfig(load_format="sllm"))).__name__)
"""
REGISTER = """
import multiprocessing, sys
from sllm_vllm.plugin import register
if __name__ == "__main__":
    register()
    for method in ("fork", "spawn"):
        child = multiprocessing.get_context(method).Process(target=register)
        child.start()
        child.join()
    print("registered", child.exitcode)
"""


def test_the_loader_is_registered_once_somebody_imports_the_loaders_and_not_before() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert done.stdout.split()[-3:] == ["False", "False", "SllmModelLoader"]


HOOKED = """
import os, sys
import vllm.multimodal.inputs, vllm.plugins, vllm.pooling_params, vllm.sampling_params
assert "vllm.v1.request" not in sys.modules
for wanted in ("1", "0", ""):
    child = os.fork()
    if child == 0:
        os.environ["SLLM_MIGRATION"] = wanted
        vllm.plugins.load_general_plugins()
        import vllm.v1.request
        print(repr(wanted), "_sllm_hooked" in vars(vllm.v1.request), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_vllm_is_hooked_for_migration_if_that_is_wanted_and_else_stock() -> None:
    command = [sys.executable, "-c", HOOKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    told = [line for line in done.stdout.splitlines() if line.startswith("'")]
    assert told == ["'1' True", "'0' False", "'' False"]


class Listener:
    """Stands in for the daemon: keeps what each connection said, and hangs up; or accepts and never answers."""

    def __init__(self, path: Path, *, hangs: bool) -> None:
        self.heard: list[list[dict[str, Any]]] = []
        self._open: list[socket.socket] = []
        self._hangs = hangs
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with short_address(path) as address:
            self._socket.bind(address)
        self._socket.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for channel in (self._socket, *self._open):
            channel.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                channel, _ = self._socket.accept()
                self.heard.append([])
                if self._hangs:
                    self._open.append(channel)
                    continue
                with channel, channel.makefile("rb") as stream:
                    while length := stream.read(4):
                        self.heard[-1].append(json.loads(stream.read(struct.unpack(">I", length)[0])))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "vllm"
    path.write_text(REGISTER)
    return path


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    path = tmp_path / "store" / ".store"
    path.mkdir(parents=True)
    return path


@contextlib.contextmanager
def listening(state_dir: Path, *, hangs: bool = False) -> Iterator[Listener]:
    with contextlib.closing(Listener(state_dir / "socket", hangs=hangs)) as listener:
        yield listener


def start(script: Path, *arguments: str, store: dict[str, object]) -> str:
    extra = ["--load-format", "sllm", "--model-loader-extra-config", json.dumps(store)]
    command = [sys.executable, str(script), "serve", *arguments, *extra]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert done.stderr == ""
    return done.stdout


def test_the_first_process_alone_tells_the_daemon_what_it_will_want(script: Path, state_dir: Path) -> None:
    with listening(state_dir) as daemon:
        start(script, "org/model", "-tp", "2", store={"store_dir": str(state_dir.parent)})
        wait_until(lambda: daemon.heard, "the connection to be accepted")
    hello = {"kind": "hello", "version": PROTOCOL_VERSION}
    assert daemon.heard == [[hello, {"kind": "hint", "model": "org/model", "tensor_parallel_size": 2}]]


def test_a_store_that_is_not_named_is_the_default_one(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_STORE_DIR", str(state_dir.parent))
    monkeypatch.delenv("SLLM_STORE_SOCKET", raising=False)
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", "--load-format", "sllm"])
    with listening(state_dir) as daemon:
        register()
        wait_until(lambda: daemon.heard, "the connection to be accepted")
    assert daemon.heard[0][1] == {"kind": "hint", "model": "m", "tensor_parallel_size": 1}


def test_a_home_that_is_not_there_does_not_fail_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_STORE_DIR", "~nobody-of-this-name/store")
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", "--load-format", "sllm"])
    register()


def test_a_start_that_does_without_the_store_tells_nobody(script: Path, state_dir: Path) -> None:
    with listening(state_dir) as daemon:
        start(script, "org/model", store={"store_dir": str(state_dir.parent), "store": False})
    assert daemon.heard == []


def test_a_daemon_that_hangs_does_not_fail_a_start(script: Path, state_dir: Path) -> None:
    with listening(state_dir, hangs=True) as daemon:
        assert start(script, "org/model", store={"store_dir": str(state_dir.parent)}) == "registered 0\n"
        wait_until(lambda: daemon.heard, "the connection to be accepted")
    assert daemon.heard == [[]]


@pytest.mark.parametrize("store_dir", ["/nowhere", "~nobody-of-this-name", "relative", "/" + "x" * 4000])
def test_no_daemon_does_not_fail_a_start(script: Path, store_dir: str) -> None:
    assert start(script, "org/model", store={"store_dir": store_dir}) == "registered 0\n"


def test_a_dead_daemon_s_socket_does_not_fail_a_start(script: Path, state_dir: Path) -> None:
    with listening(state_dir):
        pass
    assert start(script, "org/model", store={"store_dir": str(state_dir.parent)}) == "registered 0\n"


QUIET = """
import logging
import vllm.plugins
from vllm.plugins import load_endpoint_plugins, load_general_plugins
load_general_plugins()
load_general_plugins()
load_endpoint_plugins(None)
logger = logging.getLogger("vllm.plugins")
logger.warning("Found endpoint plugin(s) %s but", ["sllm", "others"])
logger.warning("plainly %s", ["sllm"])
"""


def test_a_plain_start_does_not_advise_to_allow_our_endpoints(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=DEADLINE_S, check=True, env=environment
    )
    said = done.stdout + done.stderr
    assert said.count("Found endpoint plugin(s)") == 1
    assert "Found endpoint plugin(s) ['others'] but" in said
    assert "plainly ['sllm']" in said
