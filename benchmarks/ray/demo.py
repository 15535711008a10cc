"""Four models on a Ray cluster of three nodes behind Ray Serve, on this machine; parts of it are killed under load.

Each model is asked with the official ``openai`` client, stopped, and asked again: the second start goes to the node
that has its checkpoint. Then the controller, an ingress, an agent and a node are killed in turn, each while every model
streams; the demo prints how the streams ended. Exits with 1 if an answer is wrong, if a stream stops early without an
error, if a second start went to another node, or if a model is not served afterwards.

    python -m benchmarks.ray.demo
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
from rich.console import Console
from rich.table import Table

from benchmarks.cold_start.models import ensure_architecture
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.loading.bytecode import bytecode_environment, environment_of, warm_up
from benchmarks.ray.cluster import ADMIN_KEY, RayCluster, ray_cluster, sections_of
from sllm_vllm.errors import NodeError
from sllm_vllm.router.admin.client import AdminClient, AdminError

NODES = ("a", "b", "c")
ARCHITECTURES = ("llama", "opt", "qwen2", "gpt2")
QUESTION = "Hello, my name is"
NUM_TOKENS, NUM_STREAMED = 16, 500
WAIT_S_MAX = 120.0
_WHOLE = "whole"


class DemoFailed(Exception):
    """The demo did not get as far as it should in time."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for models")
    arguments = parser.parse_args()
    return run_supervised(run_demo, arguments.cache.resolve())


def run_demo(workspace: Workspace) -> int:
    """Run the demo in its workspace and return the exit status."""
    console = Console()
    progress = Progress(console)
    with progress.step("making models"):
        models = {name: ensure_architecture(workspace, name, "tiny") for name in ARCHITECTURES}
        warm_up(environment_of(workspace))
    environment = {**bytecode_environment(workspace.cache), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    begun_s = time.monotonic()
    try:
        with ray_cluster(RayCluster, workspace.run, *NODES, environment=environment) as cluster:
            with progress.step("three nodes: their agents import vLLM, once each"):
                cluster.deploy(_sections(workspace, models))
                demo = Demo(cluster, console)
                demo.wait(demo.is_warm, "warm parents")
            is_well = demo.starts() and demo.kills()
    except (DemoFailed, AdminError, openai.OpenAIError) as error:
        console.print(str(error), markup=False)
        return 1
    console.print(
        f"{time.monotonic() - begun_s:.0f} s in all; {'as it should be' if is_well else 'NOT as it should be'}"
    )
    return 0 if is_well else 1


def _sections(workspace: Workspace, models: dict[str, Path]) -> dict[str, Any]:
    return sections_of(
        workspace.run,
        {name: {"source": str(path)} for name, path in models.items()},
        node={"kv_memory": "64MiB"},
        ray={"ingress_min": 2, "ingress_max": 2},
        defaults={"engine_arguments": {"enforce-eager": True, "max-model-len": 1024}, "keep_alive": 3600},
    )


class Demo:
    """The parts of the demo, on a running cluster."""

    def __init__(self, cluster: RayCluster, console: Console) -> None:
        self._cluster = cluster
        self._console = console
        self._admin = AdminClient(cluster.url, ADMIN_KEY)
        self._client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
        self._said: dict[str, str] = {}
        self._told: dict[str, str] = {}
        self._begun: set[str] = set()
        """Models whose streams have delivered their first token."""

    # --------------------------------------------------------------------------------------------------------- acts

    def starts(self) -> bool:
        """Start each model twice; return whether every second start was on the same node as the first."""
        table = Table(title="starts", title_justify="left", box=None)
        for name in ("model", "start", "node", "tier", "expected s", "taken s"):
            table.add_column(name, justify="right" if name.endswith(" s") else "left")
        nodes: dict[str, list[str]] = {name: [] for name in ARCHITECTURES}
        for nth in ("first", "second"):
            for name in ARCHITECTURES:
                self._said.setdefault(name, answer := self.ask(name))
                if answer != self._said[name]:
                    raise DemoFailed(f"{name} answers {answer!r}, before it was {self._said[name]!r}")
                (replica,) = self.replicas(name)
                last = self._admin.get("explain", name)["last"]
                nodes[name].append(replica["node"])
                seconds = (f"{last[key]:.2f}" for key in ("expected_s", "actual_s"))
                table.add_row(name, nth, replica["node"], last["tier"], *seconds)
            if nth == "first":
                self.end_all()
        self._console.print(table)
        return all(first == second for first, second in nodes.values())

    def kills(self) -> bool:
        """Kill one part after the other under load; return whether no stream was wrong and all models work again."""
        self._told = {name: self.stream(name) for name in ARCHITECTURES}
        table = Table(title="killed while every model streams", title_justify="left", box=None)
        for name in ("what", *ARCHITECTURES, "asked", "free"):
            table.add_column(name, no_wrap=True)
        is_well = True
        for what, kill in self._victims():
            self.wait(self.is_warm, "warm parents")  # else starts would be cold, and slower than the running import
            with ThreadPoolExecutor(2 * len(ARCHITECTURES)) as pool:
                self._begun.clear()
                streams = {name: pool.submit(self.stream, name) for name in ARCHITECTURES}
                self.wait(lambda: self._begun == set(ARCHITECTURES), "streams")
                kill()
                asked = [pool.submit(self.outcome_of, name) for name in ARCHITECTURES]
                ends = {name: self.judged(name, one.result()) for name, one in streams.items()}
                meanwhile = [one.result() for one in asked]
            self.wait(self.is_whole, "all nodes to be back")
            again = {name: self.ask(name) == self._said[name] for name in ARCHITECTURES}
            is_well &= all(again.values()) and "WRONG" not in ends.values()
            counted = ", ".join(f"{meanwhile.count(one)} {one}" for one in dict.fromkeys(meanwhile))
            table.add_row(what, *ends.values(), counted, f"{self._cluster.num_cpus_free():.0f}")
        self._console.print(table)
        return is_well

    def _victims(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        cluster = self._cluster

        def node_of_llama() -> str:
            return str(self.replicas("llama")[0]["node"])

        def lose_node() -> None:
            cluster.kill_node(node_of_llama())
            cluster.add_node("d")

        return (
            ("the controller", cluster.kill_controller),
            ("an ingress", cluster.kill_ingress),
            ("llama's agent", lambda: cluster.kill_agent(node_of_llama())),
            ("llama's node", lose_node),
        )

    # ---------------------------------------------------------------------------------------------------- questions

    def ask(self, name: str) -> str:
        """Return a model's answer to the question, which is always the same; raises ``openai.OpenAIError``."""
        told = self._client.completions.create(model=name, prompt=QUESTION, max_tokens=NUM_TOKENS, temperature=0)
        return told.choices[0].text

    def outcome_of(self, name: str) -> str:
        """How a model answered the question, in one word."""
        try:
            return "ok" if self.ask(name) == self._said[name] else "WRONG"
        except openai.OpenAIError as error:
            return type(error).__name__

    def stream(self, name: str) -> str:
        """Stream a long answer and return it; if it ends with an error, return the error's name after "!"."""
        parts = []
        try:
            for event in self._client.completions.create(
                model=name,
                prompt=QUESTION,
                max_tokens=NUM_STREAMED,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                self._begun.add(name)
                parts += [choice.text for choice in event.choices]
        except (openai.OpenAIError, httpx.HTTPError) as error:
            return f"!{type(error).__name__}"
        return "".join(parts)

    def judged(self, name: str, told: str) -> str:
        """How a stream ended, in one word."""
        if told == self._told[name]:
            return _WHOLE
        return {"!APIError": "error", "!RemoteProtocolError": "cut", "!APIConnectionError": "cut"}.get(
            told, told if told[:1] == "!" else "WRONG"
        )

    def replicas(self, name: str) -> list[dict[str, Any]]:
        """The ready replicas of a model."""
        found = self._admin.get("replicas")["replicas"]
        return [one for one in found if one["model"] == name and one["state"] == "ready"]

    def end_all(self) -> None:
        """Drain all replicas and wait until they have ended."""
        for name in ARCHITECTURES:
            for replica in self.replicas(name):
                self._admin.post("replicas", replica["id"], "drain")
        self.wait(lambda: not self._admin.get("replicas")["replicas"], "engines to end")

    def is_warm(self) -> bool:
        """Whether every node's agent can fork engines."""
        try:
            return all(self._cluster.agent(node).report().warm.pid for node in self._cluster.nodes)
        except NodeError:
            return False

    def is_whole(self) -> bool:
        """Whether every node that Ray knows has joined, and agents hold all processors."""
        joined = {one["id"] for one in self._admin.get("nodes")["nodes"]}
        is_known = joined == set(self._cluster.nodes) == self._cluster.living_nodes()
        return is_known and self._cluster.num_cpus_free() == 0

    def wait(self, is_so: Callable[[], object], what: str) -> None:
        """Wait until a condition holds.

        Raises:
            DemoFailed: it did not hold within ``WAIT_S_MAX``.
        """
        deadline_s = time.monotonic() + WAIT_S_MAX
        while time.monotonic() < deadline_s:
            with contextlib.suppress(AdminError):  # while the controller restarts
                if is_so():
                    return
            time.sleep(0.1)
        raise DemoFailed(f"waited {WAIT_S_MAX:.0f} s in vain for {what}")


if __name__ == "__main__":
    sys.exit(main())
