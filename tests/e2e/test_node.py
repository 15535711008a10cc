"""The node agent with real vLLM: warm starts that answer as stock does, and every fault that can be made."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from sllm_vllm.errors import OrderRefused
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.core.phases import StartPhase
from sllm_vllm.node.engine_process import living_members
from sllm_vllm.node.orphans import all_processes
from sllm_vllm.node.protocol import ReplicaReport
from tests.conftest import ModelDir
from tests.e2e.real_agent import (
    PROMPTS,
    answers,
    ended,
    order,
    ready,
    stopped,
    tokens,
    warm,
    warm_agent,
    watched,
)
from tests.support.listening import listening_addresses
from tests.support.vllm_server import vllm_server
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.e2e_long, pytest.mark.asyncio(loop_scope="module")]

END_MAX_S = 300.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NodeAgent]:
    async with warm_agent(tmp_path_factory.mktemp("node")) as node:
        yield node


# ------------------------------------------------------------------------------------------------------ what it is for


@pytest.mark.parametrize("architecture", ["llama", "opt"])
async def test_a_warm_engine_answers_as_stock_does(
    agent: NodeAgent, model_dir: ModelDir, tmp_path: Path, architecture: str
) -> None:
    model = model_dir(architecture)
    report = await ready(agent, order(model))
    assert report.start is not None
    assert report.start.is_warm, report.start.cold_reason
    assert report.start.load["outcome"] == "converted"
    found = await answers(report)
    assert (await stopped(agent, report.id)).status == 0

    again = await ready(agent, order(model))
    assert again.start is not None
    assert again.start.load["outcome"] == "loaded"
    assert again.start.nbytes == int(again.start.load["bytes"])
    assert await answers(again) == found
    await stopped(agent, again.id)

    with vllm_server(model, tmp_path) as stock:
        assert [await asyncio.to_thread(stock.tokens, prompt, temperature=0) for prompt in PROMPTS] == found


async def test_the_first_start_of_an_architecture_imports_vllm_in_no_new_interpreter(
    agent: NodeAgent, model_dir: ModelDir, tmp_path: Path
) -> None:
    """With an empty cache folder vLLM inspects the model's class, in a fork, and keeps what it found."""
    interpreters: set[str] = set()
    report = await agent.ensure_replica(order(model_dir("llama"), environment={"VLLM_CACHE_ROOT": str(tmp_path)}))

    def is_over(report: ReplicaReport) -> bool:
        for pid in living_members(report.pid) if report.pid is not None else ():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
                interpreters.update([words] if "models.registry" in words else [])
        return report.is_ready or report.has_ended

    report = await watched(agent, report.id, is_over)
    assert report.is_ready, (report.reason, report.tail)
    assert report.start is not None
    assert report.start.is_warm
    assert interpreters == set()
    assert report.start.seconds["inspect"] > 0
    assert [path.name for path in (tmp_path / "modelinfos").iterdir()] == [
        "vllm-model_executor-models-llama-LlamaForCausalLM.json"
    ]
    await stopped(agent, report.id)


async def test_an_order_right_after_the_agents_start_waits_for_its_warm_parent(
    model_dir: ModelDir, tmp_path: Path
) -> None:
    async with warm_agent(tmp_path, waits=False) as early:
        assert (await early.report()).warm.ready_in_s is not None
        report = await ready(early, order(model_dir("llama")))
        assert report.start is not None
        assert report.start.is_warm, report.start.cold_reason
        assert report.start.seconds["parent"] > 0
        assert (await early.report()).warm.ready_in_s is None


async def test_two_engines_answer_at_once_and_a_third_order_is_refused_or_waits(
    agent: NodeAgent, model_dir: ModelDir
) -> None:
    first, second = await asyncio.gather(ready(agent, order(model_dir("llama"))), ready(agent, order(model_dir("opt"))))
    assert set(first.slots) & set(second.slots) == set()
    both = await asyncio.gather(answers(first), answers(second))
    assert all(len(found) == 24 for found in (*both[0], *both[1]))
    with pytest.raises(OrderRefused, match="1 of 2 slots wanted, 0 free"):
        await agent.ensure_replica(order(model_dir("llama")))
    waiting = await agent.ensure_replica(order(model_dir("llama"), waits=True))
    assert waiting.state == "waiting"
    await stopped(agent, first.id)
    third = await watched(agent, waiting.id, lambda report: report.is_ready)
    assert await answers(third) == both[0]
    for report in (second, third):
        await stopped(agent, report.id)


async def test_twenty_orders_at_once_are_served_in_turn(agent: NodeAgent, model_dir: ModelDir) -> None:
    model = model_dir("llama")

    async def serve() -> list[int]:
        report = await ready(agent, order(model, waits=True))
        found = await asyncio.to_thread(tokens, report, PROMPTS[0], temperature=0)
        await stopped(agent, report.id)
        return found

    found = await asyncio.gather(*(serve() for _ in range(20)))
    assert all(one == found[0] for one in found)


async def test_without_its_key_an_engine_answers_health_alone_on_loopback(
    agent: NodeAgent, model_dir: ModelDir
) -> None:
    report = await ready(agent, order(model_dir("llama")))
    asked = [("GET", "/metrics"), ("GET", "/load"), ("GET", "/docs"), ("GET", "/version"), ("POST", "/tokenize")]
    asked += [("POST", "/invocations"), ("POST", "/scale_elastic_ep"), ("GET", "/v1/models"), ("GET", "/nothing")]
    async with aiohttp.ClientSession(report.url) as session:
        for method, path in asked:
            async with session.request(method, path) as answer:
                assert answer.status == 401, path
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await session.ws_connect("/v1/realtime")
        async with session.get("/health") as answer:
            assert answer.status == 200
        async with session.get("/metrics", headers={"Authorization": f"Bearer {report.api_key}"}) as answer:
            assert (answer.status, "vllm:num_requests_running" in await answer.text()) == (200, True)
    assert report.pid is not None
    found = listening_addresses(report.pid)
    assert ("127.0.0.1", report.port) in found
    assert {host for host, _ in found} == {"127.0.0.1"}  # torch's process groups listen, too
    await stopped(agent, report.id)


# -------------------------------------------------------------------------------------------------------------- faults


async def test_a_bad_argument_is_told_in_vllms_own_words(agent: NodeAgent) -> None:
    report = await agent.ensure_replica(order("model", "--no-such-argument"))
    report = await ended(agent, report.id)
    assert (report.state, report.status) == ("failed", 2)
    assert report.reason == "exited with status 2 before it was healthy"
    assert any("unrecognized arguments: --no-such-argument" in line for line in report.tail)


async def test_a_model_that_is_not_there_is_refused(agent: NodeAgent, tmp_path: Path) -> None:
    with pytest.raises(OrderRefused, match="nothing: No such file or directory"):
        await agent.ensure_replica(order(tmp_path / "nothing"))


async def test_a_model_without_weights_is_told_in_vllms_own_words(
    agent: NodeAgent, model_dir: ModelDir, tmp_path: Path
) -> None:
    model = tmp_path / "empty"
    shutil.copytree(model_dir("llama"), model, ignore=shutil.ignore_patterns("*.safetensors"))
    report = await agent.ensure_replica(order(model))
    report = await ended(agent, report.id)
    assert (report.state, report.status) == ("failed", 1)
    assert report.cause == f"RuntimeError: Cannot find any model weights with `{model}`"


async def test_a_port_that_somebody_took_meanwhile_fails_that_engine_alone(
    agent: NodeAgent, model_dir: ModelDir
) -> None:
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        report = await agent.ensure_replica(order(model_dir("llama")))
        assert report.port is not None
        thief.bind(("127.0.0.1", report.port))
        thief.listen()
        report = await ended(agent, report.id)
    assert report.state == "failed"
    assert any("ddress already in use" in line for line in report.tail)
    await stopped(agent, (await ready(agent, order(model_dir("llama")))).id)


PHASES = (
    StartPhase.IMPORTS,
    StartPhase.WORKERS,
    StartPhase.INIT,
    StartPhase.WEIGHTS,
    StartPhase.PROFILE,
    StartPhase.WARMUP,
    StartPhase.HTTP,
)


@pytest.mark.parametrize("phase", PHASES, ids=[phase.name for phase in PHASES])
@pytest.mark.parametrize("victim", ["first", "last"])
async def test_an_engine_killed_in_any_phase_leaves_nothing(
    agent: NodeAgent, model_dir: ModelDir, phase: StartPhase, victim: str
) -> None:
    """The first process is the API server; the last that was started is a worker, once there is one.

    Python's resource tracker is none of vLLM's processes: an engine that loses it serves all the same.
    """
    report = await agent.ensure_replica(order(model_dir("llama")))
    report = await watched(
        agent, report.id, lambda report: (report.pid is not None and reached(report, phase)) or report.has_ended
    )
    assert report.pid is not None, report
    session = report.pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(session if victim == "first" else max(workers(session), default=session), signal.SIGKILL)
    report = await ended(agent, report.id)
    assert report.state == "failed"
    assert living_members(session) == []
    again = await ready(agent, order(model_dir("llama")))
    await stopped(agent, again.id)


def workers(session: int) -> list[int]:
    """The processes of an engine that do its work."""
    found = []
    for pid in living_members(session):
        with contextlib.suppress(OSError):
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def reached(report: ReplicaReport, phase: StartPhase) -> bool:
    order_of = [one.value for one in StartPhase]
    return report.start is not None and order_of.index(report.start.phase) >= order_of.index(phase.value)


async def test_a_start_whose_parent_is_killed_while_it_forks_is_forked_from_the_next_and_no_second_engine_is_left(
    agent: NodeAgent, model_dir: ModelDir
) -> None:
    parent = await warm(agent)
    os.kill(parent, signal.SIGSTOP)  # the order is sent, and never answered
    report = await agent.ensure_replica(order(model_dir("llama")))
    await watched(agent, report.id, lambda report: report.start is not None)
    os.kill(parent, signal.SIGKILL)
    report = await watched(agent, report.id, lambda report: report.is_ready or report.has_ended)
    assert report.is_ready, report.tail
    assert report.start is not None
    assert report.start.is_warm
    assert report.start.seconds["parent"] > 0
    listening = [process.session for process in all_processes() if process.session == parent and not process.is_ended]
    assert listening == []
    assert await answers(report)
    await stopped(agent, report.id)
    assert await warm(agent) != parent


async def test_a_parent_killed_between_forks_is_replaced_and_its_engines_live_on(
    agent: NodeAgent, model_dir: ModelDir
) -> None:
    report = await ready(agent, order(model_dir("llama")))
    found = await answers(report)
    parent = await warm(agent)  # now: a busy machine may have replaced the one that forked the engine
    os.kill(parent, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: not Path(f"/proc/{parent}").exists(), "the end of the parent")
    assert await warm(agent) != parent
    assert await answers(report) == found
    assert agent.replica(report.id).is_ready
    second = await ready(agent, order(model_dir("opt")))
    assert second.start is not None
    assert second.start.is_warm, second.start.cold_reason
    for one in (report, second):
        await stopped(agent, one.id)


async def test_variables_that_are_read_while_importing_start_an_engine_cold(
    agent: NodeAgent, model_dir: ModelDir
) -> None:
    report = await ready(agent, order(model_dir("llama"), environment={"VLLM_LOGGING_LEVEL": "DEBUG"}))
    assert report.start is not None
    assert (report.start.is_warm, report.start.cold_reason) == (False, "VLLM_LOGGING_LEVEL would be read too late")
    printed = b"".join([data async for data in agent.logs(report.id, tail_nbytes=None, follow=False)])
    assert printed.count(b"DEBUG") > 10
    await stopped(agent, report.id)


# ------------------------------------------------------------------------------------------------- hazards of forking


async def test_an_engines_processes_keep_nothing_of_the_parent_or_of_each_other(
    agent: NodeAgent, model_dir: ModelDir
) -> None:
    """No process has the channel to the agent, and the port is the API server's alone."""
    report = await ready(agent, order(model_dir("llama")))
    assert report.pid is not None
    inodes = {inode for inode in listening_inodes(report.port) if inode}
    owners = [pid for pid in living_members(report.pid) if inodes & socket_inodes(pid)]
    assert owners == [report.pid]
    parent = await warm(agent)
    assert socket_inodes(parent)
    for pid in living_members(report.pid):
        assert socket_inodes(parent) & socket_inodes(pid) == set()
    assert len(os.listdir(f"/proc/{parent}/task")) == 1
    await stopped(agent, report.id)


def listening_inodes(port: int | None) -> list[str]:
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return [one[9] for one in fields if one[3] == "0A" and int(one[1].partition(":")[2], 16) == port]


def socket_inodes(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found
