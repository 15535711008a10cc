"""Where checkpoints lie: as a real store's daemon tells, or as the disk does where none runs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.config import NodeConfig
from sllm_vllm.errors import CheckpointMissing, StoreUnavailable
from sllm_vllm.node.protocol import CheckpointReport
from sllm_vllm.node.residency import hint_store, prefetch_checkpoint, read_residency
from sllm_vllm.units import MIB
from tests.support.store_checkpoints import make_checkpoint
from tests.support.store_daemon import RunningDaemon, store_daemon
from tests.support.waiting import wait_until

NBYTES = 6 * MIB


@pytest.fixture
def store_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SLLM_STORE_SOCKET", raising=False)
    return tmp_path / "store"


@pytest.fixture
def daemon(store_dir: Path) -> Iterator[RunningDaemon]:
    """A store with one checkpoint."""
    make_checkpoint(store_dir, "a", nbytes=NBYTES)
    with store_daemon(store_dir) as running:
        yield running


def config_of(store_dir: Path, store_socket: Path | None = None) -> NodeConfig:
    return NodeConfig(node_dir=store_dir.parent / "node", store_dir=store_dir, store_socket=store_socket)


def _is_whole(config: NodeConfig) -> bool:
    (found,) = read_residency(config).checkpoints
    return found.resident_nbytes == found.nbytes


def on_disk(checkpoint: Checkpoint) -> CheckpointReport:
    return CheckpointReport(
        name=checkpoint.path.name,
        nbytes=checkpoint.manifest.nbytes,
        resident_nbytes=0,
        tiers=("DISK",),
        model=checkpoint.manifest.source.model,
    )


def test_without_a_store_the_disk_tells(store_dir: Path) -> None:
    checkpoints = [make_checkpoint(store_dir, model, nbytes=NBYTES) for model in ("a", "b")]
    residency = read_residency(config_of(store_dir))
    expected = sorted(map(on_disk, checkpoints), key=lambda report: report.name)
    assert sorted(residency.checkpoints, key=lambda report: report.name) == expected
    assert residency.problem.startswith("no daemon of the store: ")
    assert residency.hops == {}


def test_what_is_no_whole_checkpoint_is_passed_over(store_dir: Path) -> None:
    whole, broken = (make_checkpoint(store_dir, model, nbytes=NBYTES) for model in ("a", "b"))
    (broken.path / "manifest.json").write_text("{")
    (store_dir / "empty").mkdir()
    (store_dir / "file").write_text("")
    assert read_residency(config_of(store_dir)).checkpoints == (on_disk(whole),)


def test_a_store_that_is_not_there_has_nothing(store_dir: Path) -> None:
    assert read_residency(config_of(store_dir)).checkpoints == ()


def test_a_folder_that_cannot_be_read_has_nothing(store_dir: Path) -> None:
    store_dir.symlink_to(store_dir)
    assert read_residency(config_of(store_dir)).checkpoints == ()


def test_a_socket_nobody_answers_on_is_told(store_dir: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(store_dir, "a", nbytes=NBYTES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(tmp_path / "socket"))
        residency = read_residency(config_of(store_dir, tmp_path / "socket"))
    assert "refused" in residency.problem
    assert residency.checkpoints == (on_disk(checkpoint),)


def test_a_running_store_tells(daemon: RunningDaemon, store_dir: Path) -> None:
    residency = read_residency(config_of(store_dir))
    assert residency.problem == ""
    (found,) = residency.checkpoints
    assert (found.tiers, found.resident_nbytes) == (("DISK",), 0)
    assert found.nbytes >= NBYTES
    assert residency.hops
    assert {frozenset(rates) for rates in residency.hops.values()} == {frozenset({"bps", "limit_bps"})}


def test_what_was_prefetched_is_resident(daemon: RunningDaemon, store_dir: Path) -> None:
    config = config_of(store_dir, daemon.socket)
    (name,) = (report.name for report in read_residency(config).checkpoints)
    prefetch_checkpoint(config, name)
    wait_until(lambda: _is_whole(config), "the store to read all of it")
    (found,) = read_residency(config).checkpoints
    assert found.tiers == ("DISK", "HOST")


def test_the_ranks_of_a_checkpoint_are_one_line(store_dir: Path) -> None:
    checkpoint = make_checkpoint(store_dir, "a", nbytes=NBYTES, ranks=2)
    with store_daemon(store_dir) as daemon:
        daemon.prefetch(checkpoint.path.name)
        (found,) = read_residency(config_of(store_dir)).checkpoints
    assert found.name == checkpoint.path.name
    assert found.nbytes >= 2 * NBYTES
    assert found.resident_nbytes == found.nbytes


def test_a_prefetch_that_cannot_be_is_told(daemon: RunningDaemon, store_dir: Path) -> None:
    with pytest.raises(CheckpointMissing):
        prefetch_checkpoint(config_of(store_dir), "nobody-has-this")
    daemon.kill()
    with pytest.raises(StoreUnavailable):
        prefetch_checkpoint(config_of(store_dir), "nobody-has-this")


def test_a_starting_engine_is_announced(daemon: RunningDaemon, store_dir: Path) -> None:
    config = config_of(store_dir)
    hint_store(config, ("a", "--load-format", "dummy"))
    assert read_residency(config).checkpoints[0].tiers == ("DISK",)
    extra = f'{{"store_dir": "{store_dir}"}}'
    hint_store(config_of(store_dir.parent), ("a", "--load-format", "sllm", "--model-loader-extra-config", extra))
    wait_until(lambda: "HOST" in read_residency(config).checkpoints[0].tiers, "the store to read what was announced")


@pytest.mark.parametrize("arguments", [(), ("a",), ("a", "--load-format", "sllm")])
def test_announcing_never_fails(store_dir: Path, arguments: tuple[str, ...]) -> None:
    hint_store(config_of(store_dir), arguments)
    assert not store_dir.exists()
