"""The commands `run`, `ps`, `logs` and `stop` against an agent without engines behind its real socket."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sllm_vllm.cli import engines as cli_engines
from sllm_vllm.cli.engines import progress_line
from sllm_vllm.node import launcher
from sllm_vllm.node.client import NodeClient
from tests.support.cases import every_case
from tests.support.commands import Run, caller, command, use_folders
from tests.support.fake_agent import KEY, ServedAgent, agent_command, agent_process, start_report
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


def heed_interrupts() -> None:
    """A shell has its background processes ignore them, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def state_of(served: ServedAgent, replica_id: str) -> str:
    return served.client.replica(replica_id).state


# --------------------------------------------------------------------------------------------------------------- run


def test_run_tells_where_it_answers(run: Run, served: ServedAgent) -> None:
    code, out, err = run("run", "--name", "r-1", "m/ready")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "ready in 1.02 s (warm): http://127.0.0.1:40123  id r-1",
        f"export OPENAI_BASE_URL=http://127.0.0.1:40123/v1 OPENAI_API_KEY={KEY}",
    ]


def test_run_hands_everything_after_the_model_on(
    run: Run, served: ServedAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--slots", "2", "--port", "8123", "--name", "x", "--wait", "-e", "A=1", "--env", "B=c=d", "--json")
    words = ("--help", "--no-such", "-O3", "--", "--seed", "1", "-x", "plain", "--dtype=float32")
    code, out, _ = run("run", *options, "m/ready", *words)
    assert (code, json.loads(out)["state"]) == (0, "ready")
    order = served.agent.orders[0]
    assert order.arguments == words
    assert (order.model, order.num_slots, order.port, order.id, order.waits) == ("m/ready", 2, 8123, "x", True)
    assert order.environment == {"A": "1", "B": "c=d"}
    assert order.directory == str(tmp_path)


def test_run_without_options_leaves_the_choice_to_the_agent(run: Run, served: ServedAgent) -> None:
    assert run("run", "m/ready")[0] == 0
    order = served.agent.orders[0]
    assert (order.num_slots, order.port, order.id, order.waits, order.arguments) == (None, 0, None, False, ())


def test_run_detached_returns_at_once(run: Run, served: ServedAgent) -> None:
    code, out, err = run("run", "-d", "--name", "w", "m/waits")
    export = f"export OPENAI_BASE_URL=http://127.0.0.1:40123/v1 OPENAI_API_KEY={KEY}\n"
    assert (code, out, err) == (0, f"waiting: w  http://127.0.0.1:40123\n{export}", "")
    assert served.agent.orders[-1].reuses_id
    code, out, _ = run("run", "-d", "--json", "--name", "w2", "m/waits")
    assert (code, json.loads(out)["state"]) == (0, "waiting")


def test_run_that_fails_tells_the_end_of_the_log(run: Run, served: ServedAgent) -> None:
    code, out, err = run("run", "--name", "f", "m/fails")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "line 1",
        "ValueError: no such model",
        "sllm-vllm: f failed: it ended by itself (exit status 1): ModuleNotFoundError: No module named 'torchvision';"
        f" see {served.config.log_dir / 'f'}",
    ]
    code, out, err = run("run", "--json", "--name", "f2", "m/fails")
    assert (code, json.loads(out)["status"]) == (1, 1)
    assert "it ended by itself" in err


@pytest.mark.parametrize("model", ["./nope", "{home}/nope", "~/nope"])
def test_run_of_a_path_that_is_not_there_starts_no_agent(
    run: Run, node_dir: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = node_dir.parent
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    code, out, err = run("run", model.format(home=home))
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "/nope: No such file or directory; give a directory that exists, or a name on the Hub" in err
    assert not NodeClient(node_dir / "socket").is_there()


def test_run_writes_out_a_path_below_the_home_directory(
    run: Run, served: ServedAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ready").mkdir()
    assert run("run", "~/ready")[0] == 0
    assert served.agent.orders[-1].model == f"{tmp_path}/ready"


def test_run_of_what_is_killed_names_the_signal(run: Run, served: ServedAgent) -> None:
    def kill() -> None:
        wait_until(lambda: served.do(lambda: "s" in served.agent.replicas), "the order")
        wait_until(lambda: state_of(served, "s") == "loading", "the start")
        served.do(lambda: served.agent.change("s", state="failed", status=-9, reason="out of\nmemory"))

    thread = threading.Thread(target=kill)
    thread.start()
    code, _, err = run("run", "--name", "s", "m/slow")
    thread.join()
    assert code == 1
    assert "s failed: out of memory (killed by signal 9)" in err


@every_case(
    "arguments, told",
    [
        (("-e", "NOVALUE", "m"), "KEY=VALUE"),
        (("-e", "=v", "m"), "KEY=VALUE"),
        (("--name", "a/b", "m"), "--name:"),
        (("--slots", "2000", "m"), "--slots: must be at most 1024"),
        (("--slots", "0", "m"), "--slots"),
        (("--port", "70000", "m"), "--port"),
        (("m", "--name", "one"), "--name: put it before MODEL"),
        (("m", "--dtype", "float32", "--port=8000"), "--port: put it before MODEL"),
        (("m", "-d"), "-d: put it before MODEL"),
        (("",), "MODEL: "),
        ((), "MODEL"),
    ],
)
def test_run_wrongly_used(run: Run, served: ServedAgent, arguments: tuple[str, ...], told: str) -> None:
    code, _, err = run("run", *arguments)
    assert (code, served.agent.orders) == (2, [])
    assert told in err


def test_run_refused(run: Run, served: ServedAgent) -> None:
    code, _, err = run("run", "m/refused")
    assert code == 1
    assert err == "sllm-vllm: m/refused: no slot is free; stop a replica, or wait for one (`run --wait`)\n"


def test_run_with_an_agent_that_dies_meanwhile(run: Run, node_dir: Path) -> None:
    with agent_process(node_dir) as (_, process):
        code, _, err = run("run", "m/dies")
        assert (code, process.wait()) == (1, 9)
        assert "the agent ended in the middle" in err


def test_run_starts_an_agent(run: Run, node_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "serve_command", lambda options: agent_command(Path(options[1])))
    try:
        code, out, err = run("run", "--node-dir", node_dir.parent / "other", "m/ready")
        assert code == 0
        assert out.startswith("ready in 1.02 s (warm)")
        assert err == f"no agent is running: starting one, see {node_dir.parent / 'other' / 'agent.log'}\n"
    finally:
        NodeClient(node_dir.parent / "other" / "socket").stop(wait_s=60.0)
    assert not node_dir.exists()


def test_run_tells_why_no_agent_starts(run: Run, node_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "serve_command", lambda options: [sys.executable, "-c", "exit('no GPU 7')"])
    code, _, err = run("run", "m/ready")
    assert (code, err.splitlines()[-1]) == (1, "  no GPU 7")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_what_starts(served: ServedAgent, how: signal.Signals) -> None:
    process = subprocess.Popen(
        command("run", "--name", "s", "m/slow"), stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    )
    wait_until(lambda: served.do(lambda: served.agent.num_streams) == 1, "the command to watch")
    process.send_signal(how)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (130, b"interrupted: stopping s\n")
    assert state_of(served, "s") == "stopped"


def test_a_terminal_sees_how_far_it_is(served: ServedAgent) -> None:
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        command("run", "--name", "s", "m/slow"), stdout=subprocess.PIPE, stderr=terminal, env=environment
    )
    os.close(terminal)
    seen = b""
    try:
        while b"s  loading weights  0.5 s  3.00 MiB  warm" not in seen:
            seen += os.read(reader, 4096)
        served.do(lambda: served.agent.change("s", state="ready", start=start_report("ready")))
        out, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
        os.close(reader)
    assert (process.returncode, out.splitlines()[0]) == (0, b"ready in 0.50 s (warm): http://127.0.0.1:40123  id s")


def test_progress_line(served: ServedAgent) -> None:
    assert progress_line(served.order("waits", id="w")) == "w  waiting  1.0 s  no slot is free"
    served.order("cold", id="c")
    wait_until(lambda: served.client.replica("c").is_ready, "the replica")
    assert progress_line(served.client.replica("c")).endswith("3.00 MiB  cold (the warm parent is importing)")


# ------------------------------------------------------------------------------------------------------ ps, logs, stop


def test_ps(run: Run, served: ServedAgent) -> None:
    for model in ("slow", "fails", "waits", "cold"):
        served.order(f"m/{model}", id=f"{model}-1")
    wait_until(lambda: state_of(served, "fails-1") == "failed" and state_of(served, "cold-1") == "ready", "the starts")
    code, out, err = run("ps")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line] == ["id", "slow-1", "waits-1", "cold-1"]
    assert "1.02 s cold" in out
    assert "no slot is free" in out
    assert "fails-1" in run("ps", "--all")[1]
    assert [row["id"] for row in json.loads(run("ps", "--json")[1])] == ["slow-1", "waits-1", "cold-1"]
    assert len(json.loads(run("ps", "--json", "--all")[1])) == 4


def test_a_routers_engine_on_a_socket_has_no_port_and_no_address_for_clients(run: Run, served: ServedAgent) -> None:
    code, out, _ = run("run", "--name", "r-1", "m/on-socket")
    assert (code, out) == (0, "ready in 1.02 s (warm): unix:///node/sockets/1  id r-1\n")
    head, row = (line.split() for line in run("ps")[1].splitlines() if line)
    assert row[head.index("port")] == "-"
    assert json.loads(run("ps", "--json")[1])[0]["url"] == "unix:///node/sockets/1"


def test_ps_of_nothing(run: Run, served: ServedAgent) -> None:
    assert run("ps") == (0, "no engine is running\n", "")
    assert run("ps", "--json") == (0, "[]\n", "")
    served.order("fails")
    wait_until(lambda: all(replica.has_ended for replica in served.client.report().replicas), "its end")
    assert run("ps") == (0, "no engine is running; `--all` shows ended ones\n", "")


def test_ps_of_an_agent_that_stands_still(run: Run, node_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with agent_process(node_dir) as (_, process):
        impatient = NodeClient(node_dir / "socket", timeout_s=0.2)
        monkeypatch.setattr(cli_engines, "client_of", lambda node_dir: impatient)
        process.send_signal(signal.SIGSTOP)
        code, out, err = run("ps")
    assert (code, out, "the agent does not answer" in err) == (1, "", True)


def loaded(served: ServedAgent, replica_id: str) -> None:
    served.order("slow", id=replica_id)
    wait_until(lambda: b"line 2" in b"".join(served.client.logs(replica_id)), "its lines")


def test_logs(run: Run, served: ServedAgent) -> None:
    loaded(served, "s-1")
    assert run("logs", "s") == (0, "line 0\nline 1\nline 2\n", "")
    assert run("logs", "--tail", "2", "s") == (0, "line 1\nline 2\n", "")
    assert run("logs", "--tail", "0", "s") == (0, "", "")
    assert run("logs", "--tail", "99", "s") == (0, "line 0\nline 1\nline 2\n", "")


@pytest.mark.parametrize(("options", "first"), [((), "line 0"), (("--tail", "1"), "line 2"), (("--tail", "0"), "more")])
def test_logs_are_followed_to_the_end(served: ServedAgent, options: tuple[str, ...], first: str) -> None:
    loaded(served, "s")
    process = subprocess.Popen(command("logs", "-f", *options, "s"), stdout=subprocess.PIPE, text=True)
    wait_until(lambda: served.do(lambda: served.agent.num_streams) == 1, "the command to follow")
    served.do(lambda: served.agent.say("s", b"more\n\xff\n"))
    served.do(lambda: served.agent.say("s", b"last"))
    served.client.stop_replica("s")
    assert process.stdout is not None
    process.stdout.reconfigure(errors="replace")  # type: ignore[attr-defined]
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert (out.splitlines()[0], out.splitlines()[-1]) == (first, "last")


def test_logs_into_a_pipe_that_breaks(served: ServedAgent) -> None:
    loaded(served, "s")
    process = subprocess.Popen(command("logs", "-f", "s"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    served.do(lambda: served.agent.say("s", b"more\n"))
    assert process.stderr is not None
    err = process.stderr.read()
    assert (process.wait(DEADLINE_S), err) == (0, b"")


def test_logs_interrupted(served: ServedAgent) -> None:
    loaded(served, "s")
    process = subprocess.Popen(
        command("logs", "-f", "s"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    )
    wait_until(lambda: served.do(lambda: served.agent.num_streams) == 1, "the command to follow")
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=DEADLINE_S)[1], process.returncode) == (b"", 130)


def test_stop(run: Run, served: ServedAgent) -> None:
    for name in ("a-1", "b-1", "c-1"):
        served.order("slow", id=name)
    assert run("stop", "a", "b-1", "a-1") == (0, "stopped: a-1 (stop asked)\nstopped: b-1 (stop asked)\n", "")
    assert run("stop", "--no-wait", "c-1") == (0, "stopping: c-1\n", "")


def test_stop_all(run: Run, served: ServedAgent) -> None:
    assert run("stop", "--all") == (0, "no engine is running\n", "")
    served.order("slow", id="a")
    served.order("waits", id="b")
    assert run("stop", "--all")[1].count("stopped: ") == 2
    assert run("stop", "--all") == (0, "no engine is running\n", "")


def test_stop_of_an_unknown_one_stops_none(run: Run, served: ServedAgent) -> None:
    served.order("slow", id="a")
    code, _, err = run("stop", "a", "zz")
    assert (code, err) == (1, "sllm-vllm: zz: 0 replicas have ids with this prefix; give more of the id\n")
    assert state_of(served, "a") != "stopped"


@pytest.mark.parametrize("arguments", [(), ("--all", "a")])
def test_stop_wrongly_used(run: Run, served: ServedAgent, arguments: tuple[str, ...]) -> None:
    assert run("stop", *arguments) == (2, "", "sllm-vllm: stop: give either IDs or --all\n")
