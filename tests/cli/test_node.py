"""The commands `node …`, and what all node commands do where no agent is running."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sllm_vllm.config import NodeConfig
from sllm_vllm.errors import NodeBusy
from sllm_vllm.node import launcher
from sllm_vllm.units import GIB, MIB
from tests.support.cases import every_case
from tests.support.commands import Run, caller, use_folders
from tests.support.fake_agent import ServedAgent, agent_process
from tests.support.waiting import DEADLINE_S, wait_until


@pytest.fixture
def node_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_folders(tmp_path, monkeypatch)


@pytest.fixture
def served(node_dir: Path) -> Iterator[ServedAgent]:
    with ServedAgent(node_dir) as served:
        yield served


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return caller(capfd, monkeypatch)


def state_of(served: ServedAgent, replica_id: str) -> str:
    return served.client.replica(replica_id).state


@pytest.mark.parametrize(
    ("arguments", "code", "out"),
    [
        (("ps",), 0, "no agent is running\n"),
        (("ps", "--json"), 0, "[]\n"),
        (("logs", "a"), 1, ""),
        (("stop", "a"), 1, ""),
        (("stop", "--all"), 1, ""),
        (("node", "status"), 1, ""),
        (("node", "stop"), 1, ""),
    ],
)
def test_nothing_but_run_starts_an_agent(
    run: Run, node_dir: Path, arguments: tuple[str, ...], code: int, out: str
) -> None:
    found, told, err = run(*arguments)
    assert (found, told) == (code, out)
    assert ("start one with `sllm-vllm node serve`" in err) == bool(code)
    assert not node_dir.exists()


# -------------------------------------------------------------------------------------------------------------- node


def test_node_status(run: Run, served: ServedAgent) -> None:
    served.order("m/slow", id="s-1")
    wait_until(lambda: state_of(served, "s-1") == "loading", "the start")
    code, out, err = run("node", "status", "--memory")
    assert (code, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 100
    for expected in (
        "node 1.2.3",
        "up 2.0 h  cpu",
        "warm parent pid 99, 3 forks, imported in 9.5 s, 5.00 MiB",
        "the store is available",
        "cpu 0-3, 10.5 GiB",
        "s-1",
        "50%",
        "2.00 GB/s",
        "loading weights 0.92",
    ):
        assert expected in out


def test_node_status_as_json_is_what_the_agent_says(run: Run, served: ServedAgent) -> None:
    code, out, _ = run("node", "status", "--json")
    assert (code, json.loads(out)["warm"]["pid"], json.loads(out)["warm"]["pss_nbytes"]) == (0, 99, None)


def test_node_stop_returns_when_it_is_gone(run: Run, node_dir: Path) -> None:
    with agent_process(node_dir) as (client, process):
        assert run("run", "-d", "m/slow")[0] == 0
        code, out, _ = run("node", "stop")
        assert (code, out) == (0, f"stopped: {node_dir} (1 engine ended)\n")
        assert not client.is_there()
        assert process.wait(DEADLINE_S) == 0


def test_node_stop_that_takes_too_long(run: Run, served: ServedAgent) -> None:
    code, _, err = run("node", "stop", "--timeout", "0.1")  # the agent is in this process, which stays
    assert (code, served.was_told_to_stop.is_set()) == (1, True)
    assert "the agent is still running after 0.1 s" in err


@pytest.fixture
def configs(node_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[NodeConfig]:
    """What `node serve` hands to the agent's process, which is none here."""
    configs: list[NodeConfig] = []

    def serve(config: NodeConfig) -> int:
        configs.append(config)
        if config.slots == 13:
            raise NodeBusy(config.socket_path, "another agent is running", "stop it first")
        return 0

    module = ModuleType("sllm_vllm.node.daemon")
    monkeypatch.setattr(module, "serve", serve, raising=False)
    monkeypatch.setitem(sys.modules, "sllm_vllm.node.daemon", module)
    return configs


def test_node_serve_with_every_option(run: Run, configs: list[NodeConfig], tmp_path: Path) -> None:
    sizes = ("--memory", "8GiB", "--kv-memory", "512MiB")
    places = ("--node-dir", tmp_path / "n", "--store-dir", tmp_path / "s")
    code, _, err = run(
        "node", "serve", "--slots", 2, "--gpus", "0, GPU-1", *sizes, "--no-warm", *places, "--start-timeout", "90"
    )
    assert (code, err) == (0, "")
    assert configs == [
        NodeConfig(
            node_dir=tmp_path / "n",
            store_dir=tmp_path / "s",
            slots=2,
            gpus=("0", "GPU-1"),
            memory_bytes=8 * GIB,
            kv_bytes=512 * MIB,
            warm=False,
            start_s=90.0,
        )
    ]


def test_node_serve_with_a_file(run: Run, configs: list[NodeConfig], tmp_path: Path) -> None:
    file = tmp_path / "node.json"
    file.write_text('{"slots": 3, "memory_bytes": "1GiB", "engine_command": ["engine", "-x"], "warm": false}')
    assert run("node", "serve", "--config", file, "--slots", 4)[0] == 0
    config = configs[0]
    assert (config.slots, config.memory_bytes, config.engine_command) == (4, GIB, ("engine", "-x"))
    assert (config.node_dir, config.store_dir) == (tmp_path / "node", tmp_path / "store")


@every_case(
    "arguments, told",
    [
        (("--slots", "0"), "--slots: must be at least 1"),
        (("--memory", "much"), "not a number of bytes"),
        (("--memory", "1"), "--memory: must be at least 268435456"),
        (("--start-timeout", "1"), "--start-timeout: must be more than 5"),
        (("--config", "none.json"), "none.json"),
    ],
)
def test_node_serve_wrongly_used(run: Run, configs: list[NodeConfig], arguments: tuple[str, ...], told: str) -> None:
    code, _, err = run("node", "serve", *arguments)
    assert (code, configs) == (2, [])
    assert told in err


def test_node_serve_where_another_agent_is(run: Run, configs: list[NodeConfig]) -> None:
    code, _, err = run("node", "serve", "--slots", 13)
    assert code == launcher.BUSY_STATUS
    assert "another agent is running; stop it first" in err


def test_commands_load_little_until_they_run() -> None:
    script = "import sys, sllm_vllm.cli.node; print(sorted({'aiohttp', 'pydantic', 'rich.live'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"[]\n"
