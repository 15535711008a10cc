"""Who may talk to the daemon, what a client may do to the pool, and what garbage does."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm_vllm.errors import StoreRefused
from sllm_vllm.store.channel import connect_to
from sllm_vllm.store.client import StoreClient
from sllm_vllm.store.protocol import Hello, LeaseOrder, Order, Release, encode
from sllm_vllm.units import MIB
from tests.support.store_checkpoints import data_of, lease_of, load_through, make_checkpoint, read_slot
from tests.support.store_daemon import RunningDaemon, store_daemon
from tests.support.waiting import wait_until

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


def test_socket_and_folder_are_for_this_user_alone(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o755)
    with store_daemon(tmp_path / "store") as daemon:
        assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(daemon.socket.parent.stat().st_mode) == 0o700


def test_a_folder_that_was_open_is_closed(tmp_path: Path) -> None:
    (tmp_path / "store" / ".store").mkdir(parents=True, mode=0o777)
    with store_daemon(tmp_path / "store") as daemon:
        assert stat.S_IMODE(daemon.socket.parent.stat().st_mode) == 0o700


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Act as another user for a while."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@as_root
def test_another_user_is_turned_away_even_where_the_modes_are_open(open_folder: Path) -> None:
    checkpoint = make_checkpoint(open_folder / "store", "a")
    with store_daemon(open_folder / "store") as daemon:
        for path in (daemon.socket, daemon.socket.parent, open_folder / "store"):
            path.chmod(0o777)
        with as_user(NOBODY), socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(daemon.socket))
            with contextlib.suppress(ConnectionError):
                channel.sendall(encode(Hello(version=1)))
                assert channel.recv(4096) == b""
        with daemon.client() as client:
            assert load_through(client, checkpoint) == data_of(checkpoint.partition(0))


@as_root
def test_a_client_does_not_talk_to_another_users_socket(open_folder: Path) -> None:
    path = open_folder / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        with as_user(NOBODY):
            listener.bind(str(path))
            listener.listen()
            path.chmod(0o777)
        with as_user(NOBODY - 1), pytest.raises(StoreRefused, match="belongs to user 65534"):
            connect_to(path, 5.0)


@pytest.mark.parametrize("slot_bytes", [2 * MIB, MIB], ids=["huge pages", "memfd"])
def test_no_client_can_write_to_the_pool(tmp_path: Path, slot_bytes: int) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a", chunk_nbytes=MIB)
    with store_daemon(tmp_path / "store", slot_bytes=slot_bytes) as daemon, daemon.client() as client:
        leased = lease_of(client, checkpoint, hold=True)
        span, slot, _ = client.next_given(60.0).spans[0]
        before = read_slot(client, slot, MIB)
        fd, nbytes = client.pool_fd, client.welcome.slot_nbytes
        with pytest.raises(PermissionError):
            mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match="Errno"):
            os.pwrite(fd, b"x", slot * nbytes)
        with pytest.raises(OSError, match="Errno"):
            os.ftruncate(fd, 0)
        with contextlib.suppress(OSError):  # where it can be opened anew, it still can't be written to
            writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            try:
                with pytest.raises(OSError, match="Errno"):
                    os.pwrite(writable, b"x", slot * nbytes)
                with pytest.raises(OSError, match="Errno"):
                    os.ftruncate(writable, 0)
                with pytest.raises(OSError, match="Errno"):
                    mmap.mmap(writable, nbytes, flags=mmap.MAP_SHARED)
            finally:
                os.close(writable)
        private = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE, offset=slot * nbytes)
        private[:4] = b"mine"
        assert read_slot(client, slot, MIB) == before
        private.close()
        client.release(leased.token, (span,))


def talk(daemon: RunningDaemon, data: bytes) -> None:
    """Say something, and wait until the daemon has read it and hung up."""
    with connect_to(daemon.socket, 30.0) as channel, contextlib.suppress(ConnectionError):
        channel.sendall(data)
        channel.shutdown(socket.SHUT_WR)
        while channel.recv(1 << 16):
            pass


def test_garbage_ends_the_connection_and_nothing_else(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a")
    hello = encode(Hello(version=1))
    lease = encode(LeaseOrder(checkpoint=checkpoint.path.name, rank=0, digest="0" * 32, hold=False))
    good = st.sampled_from([hello, lease, encode(Release(token=1, spans=(0,))), encode(Order(order="status"))])
    with store_daemon(tmp_path / "store") as daemon, daemon.client() as bystander:
        leased = lease_of(bystander, checkpoint, hold=True)

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.one_of(good, st.binary(max_size=64)), max_size=6), st.booleans())
        def feed(parts: list[bytes], with_hello: bool) -> None:
            talk(daemon, (hello if with_hello else b"") + b"".join(parts))
            assert daemon.process.poll() is None

        feed()
        spans = 0
        while spans < leased.num_spans:
            spans += len(bystander.next_given(60.0).spans)
        wait_until(lambda: daemon.status()["clients"] == 2, "the garbage's connections to end")
        assert [row["given"] for row in daemon.status()["leases"]] == [leased.num_spans]


def test_an_endless_frame_is_not_waited_for(tmp_path: Path) -> None:
    with store_daemon(tmp_path / "store") as daemon, connect_to(daemon.socket, 30.0) as channel:
        channel.sendall(encode(Hello(version=1)))
        assert channel.recv(4096)
        channel.sendall(struct.pack(">I", 1 << 30))
        with contextlib.suppress(ConnectionError):
            assert channel.recv(4096) == b""


def test_another_version_is_told_so(tmp_path: Path) -> None:
    with store_daemon(tmp_path / "store") as daemon, connect_to(daemon.socket, 30.0) as channel:
        channel.sendall(encode(Hello(version=99)))
        assert b"version 1 of the protocol, you speak 99" in channel.recv(4096)


def test_a_client_that_does_not_read_is_let_go_of(tmp_path: Path) -> None:
    with store_daemon(tmp_path / "store") as daemon, connect_to(daemon.socket, 30.0) as channel:
        channel.sendall(encode(Hello(version=1)))
        status = encode(Order(order="status"))
        with contextlib.suppress(OSError):
            for _ in range(200_000):
                channel.sendall(status)
        with daemon.client() as client:
            assert client.order(Order(order="status"))["clients"] >= 1


def test_more_clients_than_allowed_are_turned_away(tmp_path: Path) -> None:
    with store_daemon(tmp_path / "store", clients_max=3) as daemon, contextlib.ExitStack() as stack:
        clients: list[StoreClient] = [stack.enter_context(daemon.client()) for _ in range(3)]
        with connect_to(daemon.socket, 30.0) as channel, contextlib.suppress(ConnectionError):
            channel.sendall(encode(Hello(version=1)))
            assert channel.recv(4096) == b""
        clients[0].close()
        wait_until(lambda: clients[1].order(Order(order="status"))["clients"] == 2, "a place to be free")
        daemon.client().close()
