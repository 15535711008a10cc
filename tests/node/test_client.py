"""The client: what it makes of answers, of nobody, of other users, and of an agent that dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sllm_vllm.errors import NodeError, NodeUnavailable, OrderRefused, ReplicaUnknown
from sllm_vllm.node import launcher
from sllm_vllm.node.client import NodeClient
from sllm_vllm.node.launcher import LOG_NBYTES_MAX, start_in_background
from sllm_vllm.node.protocol import ReplicaOrder
from tests.support import fake_agent
from tests.support.cases import every_case
from tests.support.fake_agent import KEY, ServedAgent, agent_command, agent_process
from tests.support.waiting import DEADLINE_S, wait_until

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedAgent]:
    with ServedAgent(tmp_path / "node") as served:
        yield served


# ------------------------------------------------------------------------------------------------------------ answers


def test_every_route(served: ServedAgent) -> None:
    client = served.client
    report = client.order(ReplicaOrder(model="m/ready", id="r-1"))
    assert (report.id, report.api_key) == ("r-1", KEY)
    assert next(report for report in client.watch("r") if report.is_ready).port == 40123
    assert client.stop_replica("r").state == "stopping"
    assert client.replica("r-1").has_ended
    assert b"".join(client.logs("r-1")) == b"line 0\nline 1\nline 2\n"
    assert b"".join(client.logs("r-1", tail_nbytes=7, follow=True)) == b"line 2\n"
    assert client.story("r-1")[0].endswith("ReplicaOrdered r-1")
    assert client.report().warm.pss_nbytes is None
    assert client.report(with_memory=True).warm.pss_nbytes == 5 << 20
    client.prefetch("c")
    assert served.agent.prefetched == ["c"]


def test_watch_tells_every_change_until_the_end(served: ServedAgent) -> None:
    served.order("slow", id="s")
    seen = []
    for report in served.client.watch("s"):
        seen.append(report.state)
        if report.state == "loading" and seen.count("loading") == 1:
            served.client.stop_replica("s")
    assert (seen[-1], served.agent.num_streams) == ("stopped", 0)


def test_leaving_a_stream_ends_it(served: ServedAgent) -> None:
    served.order("slow", id="s")
    stream = served.client.logs("s", follow=True)
    assert next(stream).startswith(b"line 0")
    stream.close()
    wait_until(lambda: served.agent.num_streams == 0, "the stream to end")


def test_refusals_are_what_the_agent_said(served: ServedAgent) -> None:
    with pytest.raises(OrderRefused, match="m/refused: no slot is free; stop a replica"):
        served.order("m/refused")
    with pytest.raises(ReplicaUnknown, match="0 replicas"):
        served.client.stop_replica("none")
    with pytest.raises(ReplicaUnknown, match="0 replicas"):
        next(served.client.watch("none"))
    with pytest.raises(ReplicaUnknown, match="this is not a valid replica id"):
        served.client.replica("../report")
    with pytest.raises(NodeError, match="no daemon of the store") as caught:
        served.client.prefetch("no-store")
    assert type(caught.value) is NodeError
    with pytest.raises(NodeError, match="HTTP status 500"):
        served.order("unsaid")


@contextlib.contextmanager
def answering(path: Path, answer: bytes) -> Iterator[NodeClient]:
    """Something that is no agent, and says this to whoever comes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    channel, _ = listener.accept()
                    with channel:
                        channel.recv(1 << 16)
                        channel.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield NodeClient(path, timeout_s=DEADLINE_S)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def http(status: int, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@every_case(
    "answer, kind, told",
    [
        (b"", NodeUnavailable, "ended in the middle"),
        (b"\x00\x01\x02\r\n\r\n", NodeUnavailable, "ended in the middle"),
        (http(200, b"{}")[:-1], NodeUnavailable, "ended in the middle"),
        (http(200, b"no json"), NodeError, "no NodeReport"),
        (http(200, b'{"version": 1}'), NodeError, "no NodeReport"),
        (http(404, b"{"), NodeError, "HTTP status 404"),
        (http(404, b'{"error": 3}'), NodeError, "HTTP status 404"),
        (http(500, b'{"error": {"kind": [], "path": 1}}'), NodeError, "HTTP status 500"),
        (
            http(409, b'{"error": {"kind": "SystemExit", "path": "a", "problem": "b", "mend": "c"}}'),
            NodeError,
            "a: b; c",
        ),
    ],
)
def test_odd_answers(tmp_path: Path, answer: bytes, kind: type[NodeError], told: str) -> None:
    with answering(tmp_path / "socket", answer) as client:
        with pytest.raises(NodeError, match=told) as caught:
            client.report()
        assert type(caught.value) is kind


def test_nobody_there(tmp_path: Path) -> None:
    client = NodeClient(tmp_path / "none" / "socket")
    assert not client.is_there()
    with pytest.raises(NodeUnavailable, match=r"no agent is running .*start one with"):
        client.report()


@as_root
def test_another_users_socket_is_not_talked_to() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        Path(folder).chmod(0o777)
        path = Path(folder) / "socket"
        os.seteuid(NOBODY)
        try:
            listener.bind(str(path))
            listener.listen()
            path.chmod(0o777)
            os.seteuid(0)
            os.seteuid(NOBODY - 1)
            with pytest.raises(NodeError, match="belongs to user 65534"):
                NodeClient(path).report()
        finally:
            os.seteuid(0)


# ---------------------------------------------------------------------------------------------------------- processes


def test_an_agent_that_is_killed_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    with agent_process(tmp_path / "node") as (client, process):
        client.order(ReplicaOrder(model="slow", id="s"))
        watch, logs = client.watch("s"), client.logs("s", follow=True)
        next(watch)
        next(logs)
        process.kill()
        for stream in (watch, logs):
            with pytest.raises(NodeUnavailable, match="ended in the middle"):
                list(stream)
    assert not client.is_there()


def test_agent_that_dies_between_two_calls_was_there_before(tmp_path: Path) -> None:
    with agent_process(tmp_path / "node") as (client, process):
        client.order(ReplicaOrder(model="slow", id="s"))
        process.kill()
        process.wait()
        with pytest.raises(NodeUnavailable, match=r"ended in the middle.*agent\.log"):
            client.replica("s")


def test_an_agent_that_does_not_answer(tmp_path: Path) -> None:
    with agent_process(tmp_path / "node") as (_, process):
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(NodeUnavailable, match="does not answer"):
            NodeClient(tmp_path / "node" / "socket", timeout_s=0.2).report()
        with pytest.raises(NodeUnavailable, match="does not answer"):
            NodeClient(tmp_path / "node" / "socket", timeout_s=0.2).stop(wait_s=0.1)


@pytest.mark.parametrize("kind", ["watch", "logs", "prefetch"])
def test_what_may_take_for_ever_notices_an_agent_that_stands_still(tmp_path: Path, kind: str) -> None:
    with agent_process(tmp_path / "node") as (client, process):
        client.order(ReplicaOrder(model="slow", id="s"))
        impatient = NodeClient(tmp_path / "node" / "socket", timeout_s=DEADLINE_S, silent_s=0.05)
        watch, logs = impatient.watch("s"), impatient.logs("s", follow=True)
        next(watch)
        next(logs)
        process.send_signal(signal.SIGSTOP)
        impatient._timeout_s = 0.2
        with pytest.raises(NodeUnavailable, match="does not answer"):
            impatient.prefetch("c") if kind == "prefetch" else list(watch if kind == "watch" else logs)


def test_a_silent_engine_is_waited_for_while_its_agent_answers(served: ServedAgent) -> None:
    served.order("slow", id="s")
    asked = threading.Event()
    patient = NodeClient(served.client.socket_path, silent_s=0.01)
    require = patient._require_answer

    def require_and_tell() -> None:
        require()
        asked.set()

    patient._require_answer = require_and_tell  # type: ignore[method-assign]
    states: list[str] = []
    watching = threading.Thread(target=lambda: states.extend(report.state for report in patient.watch("s")))
    watching.start()
    assert asked.wait(DEADLINE_S)
    served.client.stop_replica("s")
    watching.join(DEADLINE_S)
    assert states[-1] == "stopped"


def test_stop_returns_when_the_process_is_gone(tmp_path: Path) -> None:
    with agent_process(tmp_path / "node") as (client, process):
        client.order(ReplicaOrder(model="slow", id="s"))
        watch = client.watch("s")
        next(watch)
        client.stop(wait_s=60.0)
        assert [report.state for report in watch][-1] == "stopped"
        assert (process.wait(), list((tmp_path / "node").glob("socket"))) == (0, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_agent_well(tmp_path: Path, number: signal.Signals) -> None:
    with agent_process(tmp_path / "node") as (client, process):
        client.order(ReplicaOrder(model="slow", id="s"))
        process.send_signal(number)
        assert process.wait(60.0) == 0


def test_two_agents_of_one_directory(tmp_path: Path) -> None:
    node_dir = tmp_path / "node"
    with agent_process(node_dir) as (client, process):
        ending = f"`sllm-vllm node stop --node-dir {node_dir}` ends it, and with it"
        for engines in ("no engine", "the engines s (loading)"):
            second = subprocess.run(agent_command(node_dir), capture_output=True, check=False, text=True)
            assert second.returncode != 0
            told = f"another agent is running (process {process.pid}); stop it first: {ending} {engines}"
            assert told in second.stderr
            client.order(ReplicaOrder(model="slow", id="s"))
            wait_until(lambda: client.replica("s").state == "loading", "the engine")
        assert client.report().pid == process.pid


def test_an_agent_takes_over_from_one_that_was_killed(tmp_path: Path) -> None:
    with agent_process(tmp_path / "node") as (_, process):
        process.kill()
        process.wait()
        assert (tmp_path / "node" / "socket").exists()
    with agent_process(tmp_path / "node") as (client, process):
        assert client.report().pid == process.pid


# --------------------------------------------------------------------------------------------------- in the background

_BUSY = f"""
import sys
sys.argv = sys.argv[1:]
from sllm_vllm.errors import NodeBusy
import runpy
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except NodeBusy as error:
    print(error)
    sys.exit({launcher.BUSY_STATUS})
"""


def busy_command(node_dir: Path) -> list[str]:
    """As `node serve` does: says with its exit status that another agent is there."""
    return [sys.executable, "-c", _BUSY, fake_agent.__file__, str(node_dir)]


@contextlib.contextmanager
def stopping(client: NodeClient) -> Iterator[None]:
    try:
        yield
    finally:
        client.stop(wait_s=60.0)


def test_an_agent_in_the_background(tmp_path: Path) -> None:
    node_dir = tmp_path / "new" / "node"
    with stopping(start_in_background(node_dir, busy_command(node_dir))):
        pid = NodeClient(node_dir / "socket").report().pid
        log = node_dir / "agent.log"
        assert (os.getsid(pid), os.readlink(f"/proc/{pid}/fd/0")) == (pid, "/dev/null")
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert oct(log.stat().st_mode)[-3:] == "600"
        assert "event=agent_serving" in log.read_text()


def test_two_that_start_one_at_once_have_the_same(tmp_path: Path) -> None:
    node_dir, pids = tmp_path / "node", []

    def start() -> None:
        pids.append(start_in_background(node_dir, busy_command(node_dir)).report().pid)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with stopping(NodeClient(node_dir / "socket")):
        assert (len(pids), len(set(pids))) == (3, 1)
    wait_until(lambda: not end_agents(node_dir), "those that were too late to find another one")


def end_agents(node_dir: Path) -> list[int]:
    """Tell every agent of a folder to end; their pids. One that is slow to start may come when the first has gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(node_dir).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
                os.kill(found[-1], signal.SIGTERM)
    return found


def test_an_agent_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    node_dir = tmp_path / "node"
    with agent_process(node_dir) as (client, process):
        (node_dir / "socket").unlink()  # as while it closes: it has the lock, and does not answer
        log = node_dir / "agent.log"

        def end_it() -> None:
            wait_until(lambda: log.exists() and b"another agent" in log.read_bytes(), "the second to be refused")
            process.terminate()

        thread = threading.Thread(target=end_it)
        thread.start()
        with stopping(start_in_background(node_dir, busy_command(node_dir), start_s=60.0)):
            thread.join()
            assert client.report().pid != process.pid


def test_an_agent_that_can_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('line'); sys.exit('no GPU is there')"]
    with pytest.raises(NodeUnavailable, match=r"ended at once \(exit status 1\)") as caught:
        start_in_background(tmp_path / "node", command)
    assert str(caught.value).endswith("no GPU is there")


def test_an_agent_that_does_not_answer_in_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.read(); import signal; signal.alarm(5); signal.pause()"]
    with pytest.raises(NodeUnavailable, match="no agent answers after 0 s"):
        start_in_background(tmp_path / "node", command, start_s=0.1)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="no agent can be started"):
        start_in_background(tmp_path / "node", [str(tmp_path / "none")])


def test_a_long_log_is_emptied(tmp_path: Path) -> None:
    log = tmp_path / "node" / "agent.log"
    log.parent.mkdir()
    log.write_bytes(b"old " * (LOG_NBYTES_MAX // 4) + b"!")
    with pytest.raises(NodeUnavailable):
        start_in_background(log.parent, [sys.executable, "-c", "print('new')"])
    assert log.read_bytes() == b"new\n"


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NodeError, match="can't be made"):
        start_in_background(tmp_path / "file" / "node", ["true"])


def test_the_command_is_this_installations() -> None:
    command = launcher.serve_command(["--node-dir", "/x"])
    assert command[0] == sys.executable
    assert command[-4:] == ["node", "serve", "--node-dir", "/x"]
