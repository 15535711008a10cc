"""Ports held for engines: what Linux promises, and that no port is given twice."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from sllm_vllm.node.core.launch import LOOPBACK
from sllm_vllm.node.ports import PortReservation, Ports

IP_LOCAL_PORT_RANGE = 51
"""Linux 6.3: the ports that the system may choose from, for one socket."""
ENGINE_OPTIONS = [
    pytest.param([socket.SO_REUSEADDR], id="one API server"),
    pytest.param([socket.SO_REUSEADDR, socket.SO_REUSEPORT], id="several API servers"),
]
"""What vLLM's `create_server_socket` sets."""


@pytest.fixture
def reservation() -> Iterator[PortReservation]:
    with Ports().reserve() as reservation:
        yield reservation


def tcp_socket(*options: int) -> socket.socket:
    made = socket.socket()
    for option in options:
        made.setsockopt(socket.SOL_SOCKET, option, 1)
    return made


def limit_choice(made: socket.socket, port: int) -> None:
    """Let the system choose among this one port alone, for whoever asks for any."""
    try:
        made.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
    except OSError:
        pytest.skip("needs Linux 6.3")


def ephemeral_ports() -> tuple[int, int]:
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        lowest, highest = file.read().split()
    return int(lowest), int(highest)


# -------------------------------------------------------------------------------------------------- for the engine


@pytest.mark.parametrize("host", [LOOPBACK, "0.0.0.0"])
@pytest.mark.parametrize("options", ENGINE_OPTIONS)
def test_an_engine_serves_on_its_port_while_it_is_reserved(
    reservation: PortReservation, options: list[int], host: str
) -> None:
    with tcp_socket(*options) as engine:
        engine.bind((host, reservation.port))
        engine.listen()
        with socket.create_connection((LOOPBACK, reservation.port)) as client:
            accepted, _ = engine.accept()
            with accepted:
                accepted.sendall(b"here")
                assert client.recv(4) == b"here"


def test_nobody_answers_before_the_engine_listens(reservation: PortReservation) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, reservation.port))


def test_an_engine_serves_on_when_its_port_is_given_back(reservation: PortReservation) -> None:
    with tcp_socket(socket.SO_REUSEADDR) as engine:
        engine.bind((LOOPBACK, reservation.port))
        engine.listen()
        reservation.close()
        with socket.create_connection((LOOPBACK, reservation.port)) as client:
            assert client.getpeername() == (LOOPBACK, reservation.port)


def test_the_next_engine_gets_the_port_at_once(reservation: PortReservation) -> None:
    """What the system remembers of the last one's connections keeps it from nothing."""
    for _ in range(2):
        with tcp_socket(socket.SO_REUSEADDR) as engine:
            engine.bind((LOOPBACK, reservation.port))
            engine.listen()
            with socket.create_connection((LOOPBACK, reservation.port)) as client:
                accepted, _ = engine.accept()
                accepted.close()  # the server's end closes first: TIME_WAIT is on its port
                assert client.recv(1) == b""
    reservation.close()
    with Ports().reserve(reservation.port) as again:
        assert again.port == reservation.port


# ------------------------------------------------------------------------------------------------ for nobody else


def test_a_thousand_who_ask_for_any_port_do_not_get_it(reservation: PortReservation) -> None:
    got = set()
    for number in range(1000):
        with tcp_socket(*[socket.SO_REUSEADDR][: number % 2]) as other:
            other.bind((LOOPBACK if number % 4 < 2 else "", 0))
            got.add(other.getsockname()[1])
    assert reservation.port not in got
    assert len(got) > 1


@pytest.mark.parametrize("options", [[], [socket.SO_REUSEADDR], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]])
@pytest.mark.parametrize("host", [LOOPBACK, ""])
def test_it_is_not_chosen_even_if_there_is_no_other(
    reservation: PortReservation, options: list[int], host: str
) -> None:
    lowest, highest = ephemeral_ports()
    assert lowest <= reservation.port <= highest
    with tcp_socket(*options) as other:
        limit_choice(other, reservation.port)
        with pytest.raises(OSError, match="in use"):
            other.bind((host, 0))


def test_no_outgoing_connection_gets_it_even_if_there_is_no_other(reservation: PortReservation) -> None:
    with closing(socket.create_server((LOOPBACK, 0))) as server, tcp_socket() as other:
        limit_choice(other, reservation.port)
        with pytest.raises(OSError, match="assign requested address") as caught:
            other.connect(server.getsockname())
        assert caught.value.errno == errno.EADDRNOTAVAIL


def test_a_port_without_reservation_is_chosen_if_there_is_no_other(reservation: PortReservation) -> None:
    """That the two tests before can fail."""
    reservation.close()
    with tcp_socket() as other:
        limit_choice(other, reservation.port)
        other.bind((LOOPBACK, 0))
        assert other.getsockname()[1] == reservation.port


# --------------------------------------------------------------------------------------------------------- refusals


def test_no_port_is_reserved_twice() -> None:
    ports = Ports()
    with ports.reserve() as first, pytest.raises(OSError, match="another engine's") as caught:
        ports.reserve(first.port)
    assert caught.value.errno == errno.EADDRINUSE


def test_a_port_that_was_given_back_can_be_reserved() -> None:
    ports = Ports()
    with ports.reserve() as first:
        pass
    first.close()  # harmless
    with ports.reserve(first.port) as second:
        first.close()  # also now that it is another's
        assert second.port == first.port
        with pytest.raises(OSError, match="another engine's"):
            ports.reserve(first.port)


def test_chosen_ports_differ() -> None:
    ports = Ports()
    reservations = [ports.reserve() for _ in range(100)]
    assert len({reservation.port for reservation in reservations}) == 100
    for reservation in reservations:
        reservation.close()


@pytest.mark.parametrize("host", [LOOPBACK, "0.0.0.0", "::"])
def test_a_port_where_somebody_listens_is_refused(host: str) -> None:
    family = socket.AF_INET6 if host == "::" else socket.AF_INET
    try:
        server = socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::")
    except (OSError, ValueError):
        assert host == "::", "IPv4 is always there"
        pytest.skip("no IPv6 here")
    with server, pytest.raises(OSError, match="in use") as caught:
        Ports().reserve(server.getsockname()[1])
    assert caught.value.errno == errno.EADDRINUSE


def test_a_port_that_somebody_has_for_himself_is_refused() -> None:
    with tcp_socket() as other:
        other.bind((LOOPBACK, 0))
        with pytest.raises(OSError, match="in use") as caught:
            Ports().reserve(other.getsockname()[1])
    assert caught.value.errno == errno.EADDRINUSE


def test_a_refused_port_is_not_taken() -> None:
    ports = Ports()
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            ports.reserve(port)
    with ports.reserve(port) as reservation:
        assert reservation.port == port
