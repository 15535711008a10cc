"""What the warm parent does with a vLLM that has less than the newest, and with sockets that engines inherit."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from sllm_vllm.node.warm_parent import is_server, override_kernels_once


class Platform:
    """As vLLM's: asked for a name that it has not, it says None."""

    def __getattr__(self, name: str) -> Any:
        return None


def test_kernels_are_overridden_in_the_parent_and_in_no_engine() -> None:
    class Overriding(Platform):
        num_calls = 0

        @classmethod
        def register_triton_kernel_overrides(cls) -> None:
            cls.num_calls += 1

    platform = Overriding()
    override_kernels_once(platform)
    platform.register_triton_kernel_overrides()
    assert Overriding.num_calls == 1


def test_a_platform_that_overrides_none_stays_as_it_is() -> None:
    platform = Platform()
    override_kernels_once(platform)
    assert platform.register_triton_kernel_overrides is None


def test_only_a_servers_own_socket_is_taken_from_an_engines_other_processes(tmp_path: Path) -> None:
    """Not a connection, nor what vLLM's processes talk over among themselves."""
    path = str(tmp_path / "engine")
    with (
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX) as other,
        socket.socket(socket.AF_UNIX) as client,
        socket.create_server(("127.0.0.1", 0)) as on_port,
    ):
        server.bind(path)
        assert is_server(server.fileno(), path)  # before it listens
        server.listen()
        other.bind(f"{path}-zmq")
        other.listen()
        client.connect(path)
        accepted, _ = server.accept()
        with accepted:
            found = [is_server(one.fileno(), path) for one in (server, other, client, accepted, on_port)]
        assert found == [True, False, False, False, True]
        assert not is_server(server.fileno(), None)
