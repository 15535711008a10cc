"""Nothing is left behind by a daemon that loads and evicts all day."""

from __future__ import annotations

from pathlib import Path

from sllm_vllm.units import MIB
from tests.support.store_checkpoints import lease_of, make_checkpoint
from tests.support.store_daemon import store_daemon
from tests.support.waiting import wait_until


def test_a_thousand_loads_and_evictions_leak_nothing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "store", "a", nbytes=6 * MIB)
    with store_daemon(tmp_path / "store", prefault=False) as daemon:

        def cycle() -> None:
            with daemon.client() as client:
                leased = lease_of(client, checkpoint)
                left = leased.num_spans
                while left:
                    left -= len(client.next_given(60.0).spans)
            wait_until(lambda: daemon.evict(checkpoint.path.name)["remaining_spans"] == 0, "the lease to end")

        def held() -> tuple[int, int]:
            folder = Path(f"/proc/{daemon.process.pid}")
            return len(list((folder / "fd").iterdir())), len((folder / "maps").read_text().splitlines())

        for _ in range(50):
            cycle()
        fds, maps = held()
        for _ in range(1000):
            cycle()
        pool = daemon.status()["pool"]
        assert pool["free"] == pool["slots"]
        after_fds, after_maps = held()
        assert after_fds <= fds + 1  # a connection that is just ending
        assert after_maps <= maps + 8  # arenas of the allocator
