"""The real daemon with remotes behind it: through the pool, onto the disk, and when the network or the disk fails."""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint, verify_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.errors import CheckpointCorrupt, CheckpointMissing, RemoteCorrupt, RemoteUnreachable
from sllm_vllm.units import MIB
from tests.checkpoint.conftest import Mount, mount  # noqa: F401 (a fixture)
from tests.store.faulty_http import Fault, FaultyServer, faulty_server
from tests.support.cases import every_case
from tests.support.servers import Nginx, nginx_server
from tests.support.store_checkpoints import data_of, load_through, make_checkpoint
from tests.support.store_daemon import RunningDaemon, store_daemon
from tests.support.waiting import wait_until


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    """Serves ``tmp_path/remote``."""
    (tmp_path / "remote").mkdir()
    tmp_path.chmod(0o755)
    with nginx_server(tmp_path / "remote") as server:
        yield server


def hop(daemon: RunningDaemon, name: str) -> int:
    return int(daemon.status()["hops"][name]["nbytes"])


def on_disk(daemon: RunningDaemon) -> set[str]:
    return {path.name for path in daemon.config.store_dir.iterdir() if not path.name.startswith(".")}


def serves(checkpoint: Checkpoint, *, prefix: str = "") -> dict[str, bytes]:
    """A checkpoint's files by the paths at which a server has them."""
    root = checkpoint.path.parent
    files = [path for path in checkpoint.path.rglob("*") if path.is_file()]
    return {f"{prefix}/{path.relative_to(root)}": path.read_bytes() for path in files}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_remote_checkpoint_goes_through_the_pool_and_stays_on_disk(tmp_path: Path, nginx: Nginx, ranks: int) -> None:
    checkpoint = make_checkpoint(tmp_path / "remote", "a", ranks=ranks)
    nbytes = sum(record.data_nbytes for record in checkpoint.manifest.partitions)
    with store_daemon(tmp_path / "store", remotes=(nginx.url,)) as daemon:
        with daemon.client() as client:
            assert client.find(checkpoint.path.name)["tier"] == "REMOTE"
            found = open_checkpoint(Path(client.find(checkpoint.path.name)["manifest"]).parent)
            assert found.manifest == checkpoint.manifest
        with daemon.client() as client:
            assert load_through(client, checkpoint) == data_of(checkpoint.partition(0))
        wait_until(lambda: on_disk(daemon) == {checkpoint.path.name}, "the checkpoint to be on disk")
        assert hop(daemon, "remote") == nbytes  # the write-behind read nothing twice
        written = open_checkpoint(tmp_path / "store" / checkpoint.path.name)
        verify_checkpoint(written)
        assert data_of(written.partition(0)) == data_of(checkpoint.partition(0))
        wait_until(lambda: daemon.evict(checkpoint.path.name)["remaining_spans"] == 0, "nobody to hold it")
        with daemon.client() as client:
            assert client.find(checkpoint.path.name)["tier"] == "DISK"
            assert load_through(client, checkpoint) == data_of(checkpoint.partition(0))
        assert hop(daemon, "remote") == nbytes


def test_one_download_serves_all_who_wait(tmp_path: Path, nginx: Nginx) -> None:
    checkpoint = make_checkpoint(tmp_path / "remote", "a", nbytes=24 * MIB)
    expected = data_of(checkpoint.partition(0))

    def load(daemon: RunningDaemon) -> bool:
        with daemon.client() as client:
            return load_through(client, checkpoint) == expected

    with (
        store_daemon(tmp_path / "store", remotes=(nginx.url,)) as daemon,
        concurrent.futures.ThreadPoolExecutor(20) as pool,
    ):
        assert all(pool.map(load, [daemon] * 20))
        assert hop(daemon, "remote") == len(expected)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_remote_checkpoint_larger_than_the_pool_streams_and_still_gets_to_disk(
    tmp_path: Path, nginx: Nginx, slots: int
) -> None:
    checkpoint = make_checkpoint(tmp_path / "remote", "a", nbytes=24 * MIB)
    with store_daemon(tmp_path / "store", remotes=(nginx.url,), memory_bytes=slots * 2 * MIB) as daemon:
        with daemon.client() as client:
            assert load_through(client, checkpoint) == data_of(checkpoint.partition(0))
        wait_until(lambda: on_disk(daemon) == {checkpoint.path.name}, "the checkpoint to be on disk")
        verify_checkpoint(open_checkpoint(tmp_path / "store" / checkpoint.path.name))


def load_all(daemon: RunningDaemon, checkpoints: list[Checkpoint]) -> None:
    for checkpoint in checkpoints:
        with daemon.client() as client:
            assert load_through(client, checkpoint) == data_of(checkpoint.partition(0))


def test_the_quota_removes_what_a_remote_has_and_nothing_else(tmp_path: Path, nginx: Nginx) -> None:
    mine = make_checkpoint(tmp_path / "store", "mine", nbytes=6 * MIB)
    first, second, third = (make_checkpoint(tmp_path / "remote", name, nbytes=6 * MIB) for name in "abc")
    quota = 3 * mine.manifest.nbytes
    with store_daemon(tmp_path / "store", remotes=(nginx.url,), disk_bytes=quota) as daemon:
        load_all(daemon, [first])
        wait_until(lambda: first.path.name in on_disk(daemon), "the first on disk")
        load_all(daemon, [second])
        wait_until(lambda: second.path.name in on_disk(daemon), "the second on disk")
        load_all(daemon, [third])
        wait_until(lambda: third.path.name in on_disk(daemon), "the third on disk")
        assert on_disk(daemon) == {mine.path.name, second.path.name, third.path.name}
        assert daemon.status()["tiers"]["DISK"]["nbytes"] <= quota


def test_what_does_not_fit_into_the_quota_is_served_and_not_written(tmp_path: Path, nginx: Nginx) -> None:
    mine = make_checkpoint(tmp_path / "store", "mine", nbytes=6 * MIB)
    remote = make_checkpoint(tmp_path / "remote", "a", nbytes=6 * MIB)
    with store_daemon(tmp_path / "store", remotes=(nginx.url,), disk_bytes=mine.manifest.nbytes) as daemon:
        load_all(daemon, [remote])
        wait_until(lambda: "reason=disk_quota" in daemon.log.read_text(), "the daemon to say so")
        assert on_disk(daemon) == {mine.path.name}


def test_a_full_disk_is_served_past(tmp_path: Path, nginx: Nginx, mount: Mount) -> None:  # noqa: F811
    store_dir = mount("tmpfs", "size=4m").path
    remote = make_checkpoint(tmp_path / "remote", "a", nbytes=12 * MIB)
    with store_daemon(store_dir, log_dir=tmp_path, remotes=(nginx.url,)) as daemon:
        load_all(daemon, [remote])
        wait_until(lambda: "event=not_written_behind" in daemon.log.read_text(), "the daemon to say so")
        assert on_disk(daemon) == set()
        load_all(daemon, [remote])


@every_case(
    "faults",
    [
        [Fault(stops_after=1000, how="reset"), Fault(stops_after=5, how="close")],
        [Fault(stops_after=70_000, how="stall")],
        [Fault(status=503), Fault(status=503)],
        [Fault(flips=77)],
    ],
)
def test_a_network_that_fails_now_and_then_is_survived(tmp_path: Path, faults: list[Fault]) -> None:
    checkpoint = make_checkpoint(tmp_path / "remote", "a", nbytes=6 * MIB)
    with faulty(checkpoint, faults) as server, store_daemon(tmp_path / "store", **quick(server)) as daemon:
        load_all(daemon, [checkpoint])
        wait_until(lambda: on_disk(daemon) == {checkpoint.path.name}, "the checkpoint to be on disk")
        verify_checkpoint(open_checkpoint(tmp_path / "store" / checkpoint.path.name))


@every_case(
    "fault, error",
    [
        (Fault(flips=77), RemoteCorrupt),
        (Fault(stops_after=10, how="reset"), RemoteUnreachable),
        (Fault(stops_after=10, how="stall"), RemoteUnreachable),
        (Fault(status=500), RemoteUnreachable),
        (Fault(extra=64), RemoteCorrupt),
        (Fault(total=7), RemoteCorrupt),
    ],
)
def test_a_network_that_goes_on_failing_is_told_and_leaves_nothing(
    tmp_path: Path, fault: Fault, error: type[Exception]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "remote", "a", nbytes=6 * MIB)
    with faulty(checkpoint, [], fault) as server, store_daemon(tmp_path / "store", **quick(server)) as daemon:
        with daemon.client() as client, pytest.raises(error):
            load_through(client, checkpoint)
        wait_until(lambda: "event=not_written_behind" in daemon.log.read_text(), "the write-behind to give up")
        assert on_disk(daemon) == set()
        wait_until(lambda: daemon.status()["pool"]["filling"] == 0, "every read to have failed")
        server.forever = Fault()
        load_all(daemon, [checkpoint])


def test_a_remote_stands_in_for_a_disk_that_fails(tmp_path: Path, nginx: Nginx) -> None:
    remote = make_checkpoint(tmp_path / "remote", "a", nbytes=6 * MIB)
    shutil.copytree(tmp_path / "remote", tmp_path / "store")
    local = CheckpointRepository(tmp_path / "store").root / remote.path.name
    path = open_checkpoint(local).partition(0).path
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with store_daemon(tmp_path / "store") as daemon, daemon.client() as client, pytest.raises(CheckpointCorrupt):
        load_through(client, remote)
    with store_daemon(tmp_path / "store", remotes=(nginx.url,)) as daemon:
        load_all(daemon, [remote])


def test_a_remote_that_is_gone_does_not_hide_one_that_has_it(tmp_path: Path, nginx: Nginx) -> None:
    remote = make_checkpoint(tmp_path / "remote", "a", nbytes=6 * MIB)
    with faulty_server({}) as dead:
        gone = dead.url
    with store_daemon(tmp_path / "store", remotes=(gone, nginx.url), retries_max=0) as daemon:
        load_all(daemon, [remote])
        with daemon.client() as client, pytest.raises(RemoteUnreachable):
            client.find("somebody-else")
    with (
        store_daemon(tmp_path / "other", remotes=(nginx.url,)) as daemon,
        daemon.client() as client,
        pytest.raises(CheckpointMissing),
    ):
        client.find("somebody-else")


def quick(server: FaultyServer) -> dict[str, Any]:
    """Settings with which what fails for ever fails soon."""
    return {"remotes": (server.url,), "retries_max": 2, "stall_s": 1.0, "downloads": 2}


def faulty(checkpoint: Checkpoint, faults: list[Fault], forever: Fault | None = None) -> Any:
    return faulty_server(serves(checkpoint), faults, forever=forever or Fault())
