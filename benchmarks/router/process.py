"""Runs a real router as a child process: starts it, waits until engines start warm, uses its admin API, stops it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.supervise import Workspace
from benchmarks.loading.bytecode import environment_of
from sllm_vllm.config import child_environment

READY_S_MAX = 600.0
ANSWER_S_MAX = 600.0
LOG_SHOWN = 4000
"""Characters of the log that a failure shows."""
_URL = re.compile(r"event=router_serving url=(\S+)")


class RouterFailed(Exception):
    """The router did not become ready, or a request failed. The message, for the user, ends with the router's log."""


@dataclass(frozen=True, slots=True)
class Router:
    """A running router."""

    url: str
    key_file: Path
    log: Path
    pid: int

    def admin(self, path: str, *, method: str = "GET", body: object = None) -> dict[str, Any]:
        """Call the admin API and return its answer."""
        headers = {"Authorization": f"Bearer {self.key_file.read_text().strip()}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/sllm/v1/{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=ANSWER_S_MAX) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    def running(self) -> set[str]:
        """Models that have a ready replica."""
        return {one["model"] for one in self.admin("replicas")["replicas"] if one["state"] == "ready"}

    def end_replicas(self, model: str) -> None:
        """Drain a model's replicas and wait until they have ended.

        Raises:
            RouterFailed: they did not end in time.
        """
        deadline_s = time.monotonic() + ANSWER_S_MAX
        while found := [one for one in self.admin("replicas")["replicas"] if one["model"] == model]:
            for replica in found:
                if replica["state"] == "ready":
                    self.admin(f"replicas/{replica['id']}/drain", method="POST")
            if time.monotonic() > deadline_s:
                raise RouterFailed(f"{model} keeps its replica\n{self.log_tail()}")
            time.sleep(0.05)

    def complete(self, model: str) -> None:
        """Request a few tokens from a model.

        Raises:
            RouterFailed: it gave no answer.
        """
        body = json.dumps({"model": model, "prompt": "Hello, my name is", "max_tokens": 4, "temperature": 0}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S_MAX) as answer:
                json.loads(answer.read())["choices"][0]
        except (OSError, LookupError, ValueError) as error:
            raise RouterFailed(f"{model} gave no answer: {error}\n{self.log_tail()}") from None

    def log_tail(self) -> str:
        """The end of the router's log."""
        return self.log.read_text(errors="replace")[-LOG_SHOWN:]


def write_config(
    workspace: Workspace, models: Mapping[str, Path], *, slots: int, kv_memory: str = "256MiB", **sections: object
) -> Path:
    """Write a configuration for these models; the agent's directory and the checkpoints are the run's own.

    ``sections`` replace the default sections of the same name.
    """
    config = workspace.tmp / "router.yaml"
    values = {
        "server": {"port": 0},
        "node": {"slots": slots, "kv_memory": kv_memory, "node_dir": str(workspace.tmp / "node")},
        "store": {"directory": str(workspace.run / "store")},
        "defaults": {"engine_arguments": {"enforce-eager": True, "max-model-len": 512}, "keep_alive": 3600},
        "models": [{"name": name, "source": str(path)} for name, path in models.items()],
        **sections,
    }
    config.write_text(json.dumps(values))
    return config


@contextlib.contextmanager
def running_router(
    workspace: Workspace, models: Mapping[str, Path], *, slots: int, kv_memory: str = "256MiB", **sections: object
) -> Iterator[Router]:
    """Run a router with such a configuration.

    Raises:
        RouterFailed: it did not become ready.
    """
    config, node_dir = (
        write_config(workspace, models, slots=slots, kv_memory=kv_memory, **sections),
        workspace.tmp / "node",
    )
    log = workspace.run / "router.log"
    environment = child_environment(**environment_of(workspace), HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    with log.open("wb") as output:
        command = [str(Path(sys.executable).with_name("sllm-vllm")), "serve", str(config)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        yield _wait_warm(process, log, node_dir / "admin.key")
    finally:
        process.terminate()
        process.wait(60)


def _wait_warm(process: subprocess.Popen[bytes], log: Path, key_file: Path) -> Router:
    deadline_s = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline_s and process.poll() is None:
        found = _URL.search(log.read_text())
        if found is not None and "event=warm_parent_ready" in log.read_text() and key_file.exists():
            return Router(found[1], key_file, log, process.pid)
        time.sleep(0.1)
    raise RouterFailed(f"the router did not get ready\n{log.read_text(errors='replace')[-LOG_SHOWN:]}")
