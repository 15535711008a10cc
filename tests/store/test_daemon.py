"""The real daemon over its real socket: what clients get, and what it does when something dies."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.errors import (
    CheckpointCorrupt,
    CheckpointMissing,
    StoreRefused,
    StoreUnavailable,
)
from sllm_vllm.store import client as client_module
from sllm_vllm.store.client import StoreClient
from sllm_vllm.store.protocol import Order
from sllm_vllm.units import MIB
from tests.support.cases import every_case
from tests.support.store_checkpoints import data_of, lease_of, load_through, make_checkpoint
from tests.support.store_daemon import RunningDaemon, store_daemon
from tests.support.waiting import DEADLINE_S, wait_until


def row_of(daemon: RunningDaemon, name: str) -> dict[str, object]:
    return next(row for row in daemon.status()["checkpoints"] if row["name"] == name)


def read_nbytes(daemon: RunningDaemon) -> int:
    hops = daemon.status()["hops"]
    return int(hops["disk"]["nbytes"] + hops["cache"]["nbytes"])


def test_a_partition_comes_through_the_pool_as_it_lies_on_disk(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a", ranks=2)
    with store_daemon(tmp_path / "store") as daemon:
        for rank in (0, 1):
            with daemon.client() as client:
                assert load_through(client, checkpoint, rank=rank) == data_of(checkpoint.partition(rank))


def test_a_resident_checkpoint_is_not_read_again(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    with store_daemon(tmp_path / "store") as daemon:
        with daemon.client() as client:
            load_through(client, checkpoint)
        before = read_nbytes(daemon)
        assert before == checkpoint.partition(0).record.data_nbytes
        with daemon.client() as client:
            assert load_through(client, checkpoint) == data_of(checkpoint.partition(0))
        assert read_nbytes(daemon) == before


def test_what_is_in_memory_is_used_and_only_the_rest_read(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path / "store", "a", nbytes=24 * MIB)
    second = make_checkpoint(tmp_path / "store", "b", nbytes=24 * MIB)
    with store_daemon(tmp_path / "store", memory_bytes=32 * MIB) as daemon:
        daemon.prefetch(first.path.name)
        with daemon.client() as client:
            load_through(client, second)
        resident = row_of(daemon, first.path.name)["resident_nbytes"]
        assert isinstance(resident, int)
        assert 0 < resident < first.partition(0).record.data_nbytes
        before = read_nbytes(daemon)
        with daemon.client() as client:
            assert load_through(client, first) == data_of(first.partition(0))
        assert read_nbytes(daemon) - before == first.partition(0).record.data_nbytes - resident


@every_case("slots", [1, 2, 3, 5])
def test_a_checkpoint_larger_than_the_pool_streams_through_it(tmp_path: Path, slots: int) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a", nbytes=32 * MIB)
    with store_daemon(tmp_path / "store", memory_bytes=slots * 2 * MIB) as daemon:
        with daemon.client() as client:
            assert load_through(client, checkpoint) == data_of(checkpoint.partition(0))
        with daemon.client() as client:
            assert load_through(client, checkpoint) == data_of(checkpoint.partition(0))


def test_holders_keep_their_slots_while_others_load(tmp_path: Path) -> None:
    held, other = (make_checkpoint(tmp_path / "store", name, nbytes=24 * MIB) for name in "ab")
    with store_daemon(tmp_path / "store", memory_bytes=32 * MIB) as daemon, daemon.client() as holder:
        leased = lease_of(holder, held, hold=True)
        given: list[tuple[int, int, bool]] = []
        while len(given) < leased.num_spans:
            given += holder.next_given(60.0).spans
            holder.release(leased.token, tuple(span for span, _, keep in given if not keep))
        kept = {span: slot for span, slot, keep in given if keep}
        assert 0 < len(kept) < leased.num_spans  # some slots are left to pass through
        with daemon.client() as client:
            assert load_through(client, other) == data_of(other.partition(0))
        data, nbytes = data_of(held.partition(0)), leased.chunks_per_span * MIB
        for span, slot in kept.items():
            expected = data[span * nbytes : (span + 1) * nbytes]
            assert os.pread(holder.pool_fd, len(expected), slot * holder.welcome.slot_nbytes) == expected


def test_many_waiters_share_one_read(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a", nbytes=32 * MIB)
    expected = data_of(checkpoint.partition(0))

    def load(daemon: RunningDaemon) -> bool:
        with daemon.client() as client:
            return load_through(client, checkpoint) == expected

    with store_daemon(tmp_path / "store") as daemon, concurrent.futures.ThreadPoolExecutor(50) as pool:
        assert all(pool.map(load, [daemon] * 50))
        assert read_nbytes(daemon) == checkpoint.partition(0).record.data_nbytes


def test_fifty_clients_share_a_pool_smaller_than_what_they_want(tmp_path: Path) -> None:
    checkpoints = [make_checkpoint(tmp_path / "store", name, nbytes=12 * MIB) for name in "abcde"]

    def load(daemon: RunningDaemon, index: int) -> bool:
        checkpoint = checkpoints[index % 5]
        with daemon.client() as client:
            return load_through(client, checkpoint) == data_of(checkpoint.partition(0))

    with (
        store_daemon(tmp_path / "store", memory_bytes=16 * MIB) as daemon,
        concurrent.futures.ThreadPoolExecutor(50) as pool,
    ):
        assert all(pool.map(lambda index: load(daemon, index), range(50)))
        wait_until(lambda: daemon.status()["leases"] == [], "the leases to end")


def hold_a_lease(socket: Path, checkpoint_path: Path, given: multiprocessing.synchronize.Event) -> None:
    from sllm_vllm.checkpoint.reader import open_checkpoint

    client = StoreClient(socket)
    leased = lease_of(client, open_checkpoint(checkpoint_path), hold=True)
    spans = 0
    while spans < leased.num_spans:
        spans += len(client.next_given(60.0).spans)
    given.set()
    signal.pause()


def test_the_lease_of_a_killed_engine_is_freed(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    context = multiprocessing.get_context("spawn")
    with store_daemon(tmp_path / "store") as daemon:
        given = context.Event()
        engine = context.Process(target=hold_a_lease, args=(daemon.socket, checkpoint.path, given))
        engine.start()
        assert given.wait(60.0)
        (lease,) = daemon.status()["leases"]
        assert lease["pid"] == engine.pid
        assert lease["kept"] > 0
        assert daemon.evict(checkpoint.path.name)["remaining_spans"] == lease["kept"]
        engine.kill()
        engine.join()
        wait_until(lambda: daemon.status()["leases"] == [], "the lease to end")
        assert daemon.evict(checkpoint.path.name)["remaining_spans"] == 0
        assert daemon.status()["pool"]["free"] == daemon.status()["pool"]["slots"]


def test_a_removed_checkpoint_is_read_to_its_end_by_who_leased_it(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a", nbytes=32 * MIB)
    expected = data_of(checkpoint.partition(0))
    with store_daemon(tmp_path / "store", memory_bytes=4 * MIB) as daemon, daemon.client() as client:
        leased = lease_of(client, checkpoint)
        CheckpointRepository(tmp_path / "store").remove(checkpoint.path.name)
        data, left, nbytes = bytearray(len(expected)), leased.num_spans, leased.chunks_per_span * MIB
        while left:
            for span, slot, _ in client.next_given(60.0).spans:
                piece = expected[span * nbytes : (span + 1) * nbytes]
                data[span * nbytes : span * nbytes + len(piece)] = os.pread(
                    client.pool_fd, len(piece), slot * client.welcome.slot_nbytes
                )
                client.release(leased.token, (span,))
                left -= 1
        assert data == expected
        with daemon.client() as late, pytest.raises(CheckpointMissing):
            lease_of(late, checkpoint)


def test_a_checkpoint_made_anew_under_its_name_is_read_anew(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    other = make_checkpoint(tmp_path / "store", "b")
    with store_daemon(tmp_path / "store") as daemon:
        daemon.prefetch(checkpoint.path.name)
        shutil.rmtree(checkpoint.path)
        os.rename(other.path, checkpoint.path)
        with daemon.client() as client, pytest.raises(CheckpointMissing, match="changed"):
            lease_of(client, checkpoint)
        with daemon.client() as client:
            digest = other.partition(0).content_digest
            assert client.lease(checkpoint.path.name, 0, digest, hold=False).num_spans > 0


def test_a_flipped_bit_reaches_every_waiter_and_nobody_sees_the_bytes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    path = checkpoint.partition(0).path
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)

    def load(daemon: RunningDaemon) -> str:
        with daemon.client() as client:
            try:
                load_through(client, checkpoint)
            except CheckpointCorrupt as error:
                return str(error)
        return "loaded"

    with store_daemon(tmp_path / "store") as daemon, concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all("differs from its checksum" in told for told in pool.map(load, [daemon] * 8))
        resident = row_of(daemon, checkpoint.path.name)["resident_nbytes"]
        assert isinstance(resident, int)
        assert resident < len(raw)


def test_a_second_daemon_refuses_to_start_and_the_first_runs_on(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    with store_daemon(tmp_path / "store") as daemon:
        for store_dir, socket in ((tmp_path / "store", None), (tmp_path / "other", daemon.socket)):
            with (
                pytest.raises(AssertionError, match="another daemon of the store is running"),
                store_daemon(store_dir, socket=socket),
            ):
                pass
        with daemon.client() as client:
            assert load_through(client, checkpoint) == data_of(checkpoint.partition(0))


def test_a_killed_daemon_leaves_what_clients_mapped_and_another_takes_its_place(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    with store_daemon(tmp_path / "store") as daemon, daemon.client() as client:
        leased = lease_of(client, checkpoint, hold=True)
        span, slot, _ = client.next_given(60.0).spans[0]
        expected = data_of(checkpoint.partition(0))[span * leased.chunks_per_span * MIB :][:MIB]
        daemon.kill()
        assert os.pread(client.pool_fd, len(expected), slot * client.welcome.slot_nbytes) == expected
        with pytest.raises(StoreUnavailable):
            take_everything(client)
        client.release(leased.token, (span,))  # not missed
        with store_daemon(tmp_path / "store") as second, second.client() as newcomer:
            assert load_through(newcomer, checkpoint) == data_of(checkpoint.partition(0))
            assert os.pread(client.pool_fd, len(expected), slot * client.welcome.slot_nbytes) == expected


def take_everything(client: StoreClient) -> None:
    while True:
        client.next_given()


def test_tokens_grow_over_a_restart(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    tokens = []
    for _ in range(2):
        with store_daemon(tmp_path / "store") as daemon, daemon.client() as client, daemon.client() as other:
            tokens += [lease_of(client, checkpoint).token, lease_of(other, checkpoint).token]
    assert tokens == sorted(set(tokens))


def test_a_stale_token_releases_nothing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    with store_daemon(tmp_path / "store") as daemon, daemon.client() as holder, daemon.client() as other:
        leased = lease_of(holder, checkpoint, hold=True)
        other.release(leased.token, tuple(range(leased.num_spans)))
        holder.release(leased.token - 1, tuple(range(leased.num_spans)))
        spans = 0
        while spans < leased.num_spans:
            spans += len(holder.next_given(60.0).spans)
        (lease,) = daemon.status()["leases"]
        assert lease["given"] == leased.num_spans


def test_releases_to_a_daemon_that_hangs_never_wait_and_arrive_later(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    with store_daemon(tmp_path / "store") as daemon, daemon.client() as client:
        leased = lease_of(client, checkpoint, hold=True)
        given = 0
        while given < leased.num_spans:
            given += len(client.next_given(60.0).spans)
        daemon.process.send_signal(signal.SIGSTOP)
        for _ in range(1000):  # far more than a socket holds
            client.release(leased.token, tuple(range(leased.num_spans)))
        daemon.process.send_signal(signal.SIGCONT)
        with pytest.raises(StoreUnavailable, match="in time"):
            client.next_given(1.0)  # whoever waits sends what could not be sent before
        (lease,) = daemon.status()["leases"]
        assert lease["given"] == 0


def test_a_daemon_that_hangs_in_the_middle_counts_as_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PING_S", 0.2)
    checkpoint = make_checkpoint(tmp_path / "store", "a", nbytes=24 * MIB)
    with store_daemon(tmp_path / "store", memory_bytes=4 * MIB) as daemon, daemon.client() as client:
        lease_of(client, checkpoint)
        client.next_given()
        with daemon.client() as other:  # the daemon waits for a release, and is well: it answers pings
            assert other.order(Order(order="status"))["leases"]
        daemon.process.send_signal(signal.SIGSTOP)
        with pytest.raises(StoreUnavailable, match="in time"):
            take_everything(client)


def test_pins_outlive_the_daemon_and_the_pressure_of_others(tmp_path: Path) -> None:
    pinned, other = (make_checkpoint(tmp_path / "store", name, nbytes=12 * MIB) for name in "ab")
    with store_daemon(tmp_path / "store", memory_bytes=24 * MIB) as daemon, daemon.client() as client:
        client.order(Order(order="pin", checkpoint=pinned.path.name, wait=True), timeout_s=DEADLINE_S)
    with store_daemon(tmp_path / "store", memory_bytes=24 * MIB) as daemon:
        nbytes = pinned.partition(0).record.data_nbytes

        def is_back() -> bool:
            rows = [row for row in daemon.status()["checkpoints"] if row["name"] == pinned.path.name]
            return bool(rows[0]["pinned"] and rows[0]["resident_nbytes"] >= nbytes)

        wait_until(is_back, "the pinned checkpoint to be back in memory")
        for _ in range(3):
            with daemon.client() as client:
                load_through(client, other)
        assert is_back()
        with daemon.client() as client, pytest.raises(StoreRefused, match="too little of the pool"):
            client.order(Order(order="pin", checkpoint=other.path.name))
        with daemon.client() as client:
            client.order(Order(order="unpin", checkpoint=pinned.path.name))
        assert row_of(daemon, pinned.path.name)["pinned"] is False


def test_chunks_larger_than_a_slot_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a", chunk_nbytes=4 * MIB)
    with (
        store_daemon(tmp_path / "store") as daemon,
        daemon.client() as client,
        pytest.raises(StoreRefused, match="--slot-size"),
    ):
        lease_of(client, checkpoint)


@every_case("name", ["nobody", "../a", ".staging", "/nowhere/at/all"])
def test_unknown_names_are_missing(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "store", "a")
    with store_daemon(tmp_path / "store") as daemon, daemon.client() as client:
        with pytest.raises(CheckpointMissing):
            client.lease(name, 0, "0" * 32, hold=False)
        assert client.order(Order(order="status"))["leases"] == []


def test_stop_ends_the_daemon_and_removes_its_socket(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "store", "a")
    with store_daemon(tmp_path / "store") as daemon:
        with daemon.client() as client:
            client.order(Order(order="stop"))
        assert daemon.process.wait(60.0) == 0
        assert not daemon.socket.exists()
        with pytest.raises(StoreUnavailable):
            daemon.client()


def test_a_hint_brings_in_what_was_used_last_for_the_model(tmp_path: Path) -> None:
    from sllm_vllm.store.channel import send_hint

    one = make_checkpoint(tmp_path / "store", "org/model")
    two = make_checkpoint(tmp_path / "store", "org/model", ranks=2)
    make_checkpoint(tmp_path / "store", "org/other")
    with store_daemon(tmp_path / "store") as daemon:
        assert send_hint(daemon.socket, "org/model", 2)
        wait_until(lambda: len(resident(daemon)) == 2, "both ranks to be there")
        assert {row["name"] for row in resident(daemon)} == {two.path.name}
        assert send_hint(daemon.socket, "org/model", 1)
        wait_until(lambda: len(resident(daemon)) == 3, "the other one to be there")
        assert {row["name"] for row in resident(daemon)} == {one.path.name, two.path.name}


def resident(daemon: RunningDaemon) -> list[dict[str, object]]:
    return [row for row in daemon.status()["checkpoints"] if row["resident_nbytes"]]


def test_status_is_plain_json(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    make_checkpoint(tmp_path / "store", "b")
    with store_daemon(tmp_path / "store") as daemon, daemon.client() as client:
        lease_of(client, checkpoint)
        status = json.loads(json.dumps(daemon.status()))
        assert status["tiers"]["DISK"]["checkpoints"] == 2
        assert [row["tiers"] for row in status["checkpoints"]][1] == ["DISK"]
        pool = status["pool"]
        assert pool["free"] + pool["filling"] + pool["ready"] == pool["slots"]
