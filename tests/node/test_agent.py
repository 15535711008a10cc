"""The node agent takes orders: engines start, answer, wait for slots, stop, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from pathlib import Path

import pytest

from sllm_vllm.daemon.unix_listener import socket_of_url
from sllm_vllm.errors import NodeError, OrderRefused, ReplicaUnknown, StoreUnavailable
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.engine_process import living_members
from sllm_vllm.node.orphans import find_process
from sllm_vllm.node.ports import Ports
from sllm_vllm.node.protocol import NodeReport, ReplicaOrder
from tests.node.agent_bench import Bench, ask, descriptors, node_config, running_agent, text_of
from tests.support.cases import every_case
from tests.support.listening import listening_addresses as session_listeners
from tests.support.listening import servers_of
from tests.support.waiting import DEADLINE_S

_LISTENING = "0A"


def listening_addresses(port: int) -> set[str]:
    """The addresses, in the kernel's own words, on which somebody listens at a port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == _LISTENING and int(number, 16) == port:
                found.add(address)
    return found


def is_there(path: str) -> bool:
    return os.path.lexists(path)


async def test_a_replica_lives_from_its_order_to_its_stop_and_leaves_nothing(tmp_path: Path) -> None:
    before = descriptors()
    async with running_agent(tmp_path) as bench:
        ordered = await bench.order()
        assert ordered.state in {"starting", "loading"}
        report = await bench.reach(ordered.id, "ready")
        assert report.pid is not None
        assert report.port is not None
        assert await ask(report, "/v1/models", with_key=False) == (401, {"error": "Unauthorized"})
        status, models = await ask(report, "/v1/models")
        assert (status, models["data"][0]["pid"]) == (200, report.pid)
        assert report.start is not None
        assert (report.start.phase, report.start.is_warm) == ("ready", False)
        assert report.start.cold_reason == "the warm parent is switched off"
        assert sum(report.start.seconds.values()) == pytest.approx(report.start.total_s, abs=0.01)

        ended = await bench.stop(report.id)
        assert (ended.state, ended.status, ended.pid, ended.slots, ended.tail) == ("stopped", 0, None, (), ())
        assert living_members(report.pid) == []
        Ports().reserve(report.port).close()
        assert (await bench.agent.stop_replica(report.id)).state == "stopped"  # harmless
    assert descriptors() == before


@pytest.mark.parametrize("said", [(), ("--host", "0.0.0.0"), ("--host=0.0.0.0", "--port=1")])
async def test_an_engine_listens_on_loopback_alone(tmp_path: Path, said: tuple[str, ...]) -> None:
    async with running_agent(tmp_path) as bench:
        report = await bench.ready(arguments=said)
        assert report.port is not None
        assert report.url == f"http://127.0.0.1:{report.port}"
        assert listening_addresses(report.port) == {"0100007F"}


@pytest.mark.parametrize("said", [(), ("--host=0.0.0.0", "--port=1")])
async def test_an_engine_of_a_router_here_listens_on_no_port(tmp_path: Path, said: tuple[str, ...]) -> None:
    before = descriptors()
    async with running_agent(tmp_path, engine_sockets=True) as bench:
        report = await bench.ready(arguments=said, takes_socket=True)
        path = socket_of_url(report.url or "")
        assert path is not None
        assert report.port is None
        assert stat.S_ISSOCK(os.stat(path).st_mode)
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        assert report.pid is not None
        assert session_listeners(report.pid) == set()
        assert servers_of(report.pid, path) == {report.pid}
        assert await ask(report, "/v1/models", with_key=False) == (401, {"error": "Unauthorized"})
        assert (await ask(report, "/v1/models"))[1]["data"][0]["pid"] == report.pid
        by_hand = await bench.ready()  # a user's own: `run` says where it can be reached
        assert by_hand.url == f"http://127.0.0.1:{by_hand.port}"

        await bench.stop(report.id)
        assert not is_there(path)
        again = await bench.ready(takes_socket=True)
        assert again.url != report.url
    assert not is_there(os.path.dirname(path))
    assert descriptors() == before


async def test_a_socket_of_an_engine_that_was_killed_is_removed(tmp_path: Path) -> None:
    async with running_agent(tmp_path, engine_sockets=True) as bench:
        report = await bench.ready(takes_socket=True)
        path = socket_of_url(report.url or "")
        assert path is not None
        assert report.pid is not None
        os.kill(report.pid, signal.SIGKILL)
        async for last in bench.agent.watch(report.id):
            if last.has_ended:
                break
        assert not is_there(path)


async def test_without_engine_sockets_whoever_takes_one_gets_a_port(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:  # an engine_command may run where a socket can't be reached
        assert (await bench.ready(takes_socket=True)).port is not None


async def test_a_folder_for_sockets_that_can_not_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_agent(tmp_path, engine_sockets=True) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(bench.agent._sockets, "_folder", tmp_path / "missing" / "sockets")
            with pytest.raises(OrderRefused, match="a folder for its socket can't be had"):
                await bench.order(takes_socket=True)
        await bench.ready(takes_socket=True)


def test_an_order_of_a_port_takes_no_socket() -> None:
    with pytest.raises(ValueError, match="takes no socket"):
        ReplicaOrder(model="m", port=4000, takes_socket=True)


# ----------------------------------------------------------------------------------------------------------- slots


async def test_who_finds_no_slot_is_refused_or_waits_for_one(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        first, second = await asyncio.gather(bench.ready(), bench.ready())
        assert {first.slots, second.slots} == {(0,), (1,)}
        with pytest.raises(OrderRefused, match="1 of 2 slots wanted, 0 free"):
            await bench.order()
        third = await bench.order(waits=True)
        assert (third.state, third.slots, third.start) == ("waiting", (), None)
        assert "slots" in third.reason
        with pytest.raises(OrderRefused, match="it wants 3 slots, this node has 2"):
            await bench.order(arguments=("-tp", "3"), waits=True)
        await bench.stop(first.id)
        assert (await bench.reach(third.id, "ready")).slots == first.slots
        assert len((await bench.agent.report()).replicas) == 3  # who was refused is not known


async def test_a_large_order_has_all_its_slots(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        report = await bench.ready(arguments=("--tensor-parallel-size", "2"))
        assert report.slots == (0, 1)
        with pytest.raises(OrderRefused, match="slots"):
            await bench.order()
        await bench.stop(report.id)
        assert (await bench.order(num_slots=1)).slots == (0,)


async def test_one_that_waits_may_be_called_off(tmp_path: Path) -> None:
    async with running_agent(tmp_path, slots=1) as bench:
        await bench.ready()
        waiting = await bench.order(waits=True)
        assert (await bench.stop(waiting.id)).state == "stopped"
        assert text_of(waiting.log) == ""


async def test_of_twenty_orders_at_once_two_run_at_a_time(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        orders = await asyncio.gather(*(bench.order(waits=True) for _ in range(20)))
        seen: list[int] = []

        async def use(replica_id: str) -> None:
            report = await bench.reach(replica_id, "ready")
            assert (await ask(report, "/v1/models"))[0] == 200
            replicas = (await bench.agent.report()).replicas
            seen.append(sum(bool(replica.slots) for replica in replicas))
            assert sum(replica.pid is not None for replica in replicas) <= 2
            assert (await bench.stop(replica_id)).status == 0

        await asyncio.gather(*(use(order.id) for order in orders))
        assert len({order.id for order in orders}) == 20
        assert len(seen) == 20
        assert max(seen) == 2


async def test_of_twenty_orders_at_once_that_will_not_wait_two_are_accepted(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        answers = await asyncio.gather(*(bench.order() for _ in range(20)), return_exceptions=True)
        accepted = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert len(accepted) == 2
        assert sum(isinstance(answer, OrderRefused) for answer in answers) == 18
        for report in accepted:
            await bench.reach(report.id, "ready")


# --------------------------------------------------------------------------------------------------- names and ports


async def test_an_id_stands_for_one_engine_for_ever(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        first = await bench.ready(id="mine")
        again = await bench.order(id="mine")
        assert (again.pid, again.port, again.state) == (first.pid, first.port, "ready")
        with pytest.raises(OrderRefused, match="another spec"):
            await bench.order("late", id="mine")
        assert (await ask(first, "/v1/models"))[0] == 200
        await bench.stop("mine")
        with pytest.raises(OrderRefused, match="mine is stopped"):
            await bench.order(id="mine")
        assert bench.agent.replica("mine").state == "stopped"


async def test_the_id_of_one_that_has_ended_can_be_used_again_where_the_order_says_so(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        first = await bench.ready(id="mine")
        with pytest.raises(OrderRefused, match="another spec"):
            await bench.order("late", id="mine", reuses_id=True)
        await bench.stop("mine")
        again = await bench.ready(id="mine", reuses_id=True)
        assert (again.state, again.log) == ("ready", first.log)
        assert again.pid != first.pid
        said = b"".join([data async for data in bench.agent.logs("mine", tail_nbytes=None, follow=False)])
        assert said.count(b"Application startup complete") == 1
        assert [one.id for one in (await bench.agent.report()).replicas] == ["mine"]
        assert (await bench.order(id="mine", reuses_id=True)).pid == again.pid  # it is alive


async def test_one_that_failed_is_still_known_if_another_of_its_id_is_refused(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        await bench.reach((await bench.order("exits-3", id="mine")).id, "failed")
        with pytest.raises(OrderRefused, match="9 slots"):
            await bench.order(id="mine", reuses_id=True, num_slots=9)
        report = bench.agent.replica("mine")
        assert (report.state, report.status, report.tail[-1:]) == ("failed", 3, report.tail[-1:])
        assert report.tail
        assert (await bench.ready(id="mine", reuses_id=True)).tail == ()


async def test_a_port_that_another_listens_on_is_refused(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(OrderRefused, match=f"port {port} can't be had"):
                await bench.order(port=port)
        assert (await bench.ready(port=port)).port == port


async def test_a_port_is_one_replicas_from_its_order_to_its_end(tmp_path: Path) -> None:
    async with running_agent(tmp_path, slots=1) as bench:
        first = await bench.ready()
        waiting = await bench.order(waits=True)
        for other in (first, waiting):
            with pytest.raises(OrderRefused, match=f"port {other.port} can't be had"):
                await bench.order(port=other.port, waits=True)
        await bench.stop(waiting.id)
        await bench.stop(first.id)
        assert (await bench.ready(port=waiting.port)).port == waiting.port


async def test_a_replica_is_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        await bench.ready(id="ab")
        await bench.ready(id="ab-1")
        find = bench.agent.find
        assert (find("ab"), find("ab-")) == ("ab", "ab-1")
        with pytest.raises(ReplicaUnknown, match="2 replicas"):
            find("a")
        with pytest.raises(ReplicaUnknown, match="no replica"):
            find("b")
        await bench.stop("ab")
        assert find("a") == "ab-1"  # the only one that is alive
        await bench.stop("ab-1")
        assert find("ab-") == "ab-1"
        with pytest.raises(ReplicaUnknown, match="2 replicas"):
            find("a")


async def test_an_id_is_made_of_the_models_name(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        report = await bench.agent.ensure_replica(ReplicaOrder(model="/models/Very odd_name (1)/"))
        assert report.id.startswith("Very-odd_name-1-")
        assert (await bench.agent.ensure_replica(ReplicaOrder(model="/./"))).id.startswith("model-")


async def test_nobody_knows_an_id_that_was_never_ordered(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        agent = bench.agent
        for asked in (agent.replica, agent.story):
            with pytest.raises(ReplicaUnknown, match="no replica has this id"):
                asked("nobody")
        with pytest.raises(ReplicaUnknown):
            await agent.stop_replica("nobody")
        with pytest.raises(ReplicaUnknown):
            agent.logs("nobody", tail_nbytes=None, follow=True)
        assert [report async for report in agent.watch("nobody")] == []


# -------------------------------------------------------------------------------------------------------- telling


async def test_a_watch_ends_with_the_replica_and_tells_every_state(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        states: list[str] = []
        async with asyncio.timeout(DEADLINE_S):
            async for report in bench.agent.watch((await bench.order()).id):
                states += [report.state] if states[-1:] != [report.state] else []
                if report.is_ready:
                    await bench.agent.stop_replica(report.id)
        assert states[-3:] == ["ready", "stopping", "stopped"]


async def test_a_story_tells_what_happened(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        report = await bench.ready()
        assert report.api_key is not None
        await bench.stop(report.id)
        words = [line.split()[2] for line in bench.agent.story(report.id)]
        story = "\n".join(bench.agent.story(report.id))
    started = "ReplicaOrdered TellState StartEngine EngineStarted TellState EngineHealthy TellState"
    assert " ".join(words) == f"{started} StopAsked TellState TerminateEngine EngineExited TellState"
    assert f"EngineStarted pid={report.pid}" in story
    assert report.api_key not in story


async def test_a_report_tells_who_has_which_slot(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        replica = await bench.ready()
        report = NodeReport.model_validate_json((await bench.agent.report(with_memory=True)).model_dump_json())
        assert [(slot.slot, slot.replica) for slot in report.slots] == [(0, replica.id), (1, None)]
        assert report.slots[0].what.startswith("cpu ")
        assert [(row.id, row.state) for row in report.replicas] == [(replica.id, "ready")]
        assert (report.pid, report.platform, report.checkpoints) == (os.getpid(), "cpu", ())
        assert "no daemon of the store" in report.store
        assert (report.warm.pid, report.warm.problem) == (None, "the warm parent is switched off")
        assert [(timing.replica, timing.start.phase) for timing in report.timings] == [(replica.id, "ready")]
        assert not await bench.agent.wait_warm(60)


async def test_what_was_ordered_reaches_the_engine(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    async with running_agent(tmp_path, slots=1, pin=True, store_socket=tmp_path / "no-socket") as bench:
        report = await bench.ready(
            environment={"MINE": "1", "OMP_NUM_THREADS": "7"}, directory=str(tmp_path / "here"), arguments=("--x", "ü")
        )
        _, told = await ask(report, "/environment")
    assert told["pid"] == report.pid
    assert told["cwd"] == str(tmp_path / "here")
    assert told["cpus"] == sorted(os.sched_getaffinity(0))
    assert told["argv"][1:5] == ["serve", "/models/fine", "--x", "ü"]
    assert told["argv"][-4:] == ["--host", "127.0.0.1", "--port", str(report.port)]
    assert told["environment"]["VLLM_API_KEY"] == report.api_key
    assert (told["environment"]["MINE"], told["environment"]["OMP_NUM_THREADS"]) == ("1", "7")
    assert told["environment"]["SLLM_STORE_DIR"] == str(bench.config.store_dir)
    assert told["environment"]["SLLM_STORE_SOCKET"] == str(bench.config.store_socket)


@every_case("option", ["--uds=/tmp/s", "--grpc", "--grpc-port=1", "--data-parallel-multi-port-external-lb"])
async def test_an_engine_opens_no_door_but_its_port(tmp_path: Path, option: str) -> None:
    async with running_agent(tmp_path) as bench:
        with pytest.raises(OrderRefused, match=option.partition("=")[0]):
            await bench.order(arguments=(option,))


async def test_without_a_store_nothing_is_prefetched(tmp_path: Path) -> None:
    async with running_agent(tmp_path, store_socket=tmp_path / "no-socket") as bench:
        with pytest.raises(StoreUnavailable, match="no daemon of the store"):
            await bench.agent.prefetch("a")


async def test_each_slot_has_processors_of_its_own(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two processors")
    async with running_agent(tmp_path, pin=True) as bench:
        reports = await asyncio.gather(bench.ready(), bench.ready())
        shares = [(await ask(report, "/environment"))[1]["cpus"] for report in reports]
    assert sorted(cpu for share in shares for cpu in share) == cpus


async def test_a_key_is_told_to_whoever_asks_for_the_replica_and_to_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with running_agent(tmp_path) as bench:
        own = await bench.ready()
        given = await bench.ready(arguments=("--api-key", "my-own-key"))
        assert given.api_key == "my-own-key"
        assert own.api_key is not None
        assert (await ask(own, "/v1/models"))[0] == (await ask(given, "/v1/models"))[0] == 200
        for report in (own, given):
            await bench.stop(report.id)
        logs = text_of(own.log) + text_of(given.log)
    assert "event=replica" in caplog.text
    assert "startup complete" in logs
    for key in (own.api_key, given.api_key):
        assert key not in caplog.text
        assert key not in logs


# ------------------------------------------------------------------------------------------------------- its own end


async def test_an_agent_that_closes_ends_everything(tmp_path: Path) -> None:
    before = descriptors()
    async with running_agent(tmp_path) as bench:
        ready, waiting = await bench.ready("family"), await bench.order("hangs")
        await bench.reach(waiting.id, "loading")
        late = await bench.order(waits=True)
        left = bench.left()
        assert len(left) == 4
    assert {bench.agent.replica(report.id).state for report in (ready, waiting, late)} == {"stopped"}
    with pytest.raises(OrderRefused, match="the agent is stopping"):
        await bench.order()
    assert [find_process(pid) for pid in left] == [None] * 4  # not even as children that nobody has reaped
    assert descriptors() == before


async def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "node").write_text("")
    with pytest.raises(NodeError, match="it can't be used"):
        await NodeAgent(node_config(tmp_path)).start()


async def test_stopping_while_it_starts(tmp_path: Path) -> None:
    """Once before there is a process, and once after."""
    async with running_agent(tmp_path) as bench:
        early, late = await bench.order(), await bench.order("hangs")
        assert (early.state, early.pid) == ("starting", None)
        ended = await bench.stop(early.id)
        assert (ended.state, ended.status in {0, -signal.SIGTERM}) == ("stopped", True)
        await bench.reach(late.id, "loading")
        assert (await bench.stop(late.id)).state == "stopped"
        assert await all_slots_free(bench)


async def all_slots_free(bench: Bench) -> bool:
    return all(slot.replica is None for slot in (await bench.agent.report()).slots)
