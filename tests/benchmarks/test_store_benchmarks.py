"""The store's benchmarks: their verdicts and summaries, and that real children and a real daemon do what is asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.loading.formats import plain_loaders, vllm_loaders
from benchmarks.loading.job import OURS, OURS_RESIDENT, REFERENCE
from benchmarks.loading.plain_checkpoint import module_for, write_plain_checkpoint
from benchmarks.loading.report import rows_of, verdicts_of
from benchmarks.store import early_prefetch, io_schedule, serve_hinting
from benchmarks.store import hops as store_shares
from benchmarks.store.daemon import DaemonFailed, StoreDaemon
from benchmarks.store.job import StoreJob, StoreJobFailed
from benchmarks.store.setting import SMALL_PAGE_SLOT_NBYTES, StoreSetting, data_nbytes, forget_on_disk, load_job
from benchmarks.store.shares import Share
from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.loader.module_state import named_state
from sllm_vllm.store import channel
from tests.benchmarks.test_loading import limits, samples
from tests.support.cases import every_case

# ---------------------------------------------------------------------------------------------------------- verdicts


def share(rule: str, goal: float, ours: list[float], limit: list[float]) -> Share:
    return Share(name="x", rule=rule, goal=goal, ours_s=ours, limit_s=limit)  # type: ignore[arg-type]


def test_share_of_a_limit_is_the_median_over_the_rounds() -> None:
    found = share("share", 0.9, [1.0, 2.0, 10.0], [0.9, 2.0, 5.0])
    assert found.value == 0.9
    assert found.is_met
    assert not share("share", 0.91, [1.0], [0.9]).is_met


def test_times_of_a_limit_may_not_exceed_the_goal() -> None:
    assert share("times", 1.15, [1.15], [1.0]).is_met
    assert not share("times", 1.15, [1.16], [1.0]).is_met


def test_seconds_may_not_exceed_the_goal() -> None:
    assert share("seconds", 0.05, [0.01, 0.05, 9.0], []).is_met
    assert not share("seconds", 0.05, [0.051], []).is_met


@every_case("ours, said", [(1.0, "yes"), (2.0, "NO")])
def test_line_of_a_share_ends_with_its_verdict(ours: float, said: str) -> None:
    assert share("share", 0.9, [ours], [1.0]).line().endswith(f": {said}")
    assert share("times", 1.1, [ours], [1.0]).line().endswith(f": {said}")
    assert share("seconds", 1.5, [ours], []).line().endswith(f": {said}")


def test_share_is_a_line_of_json() -> None:
    told = json.loads(json.dumps(share("share", 0.9, [1.0], [0.95]).as_json()))
    assert told["kind"] == "share"
    assert (told["value"], told["met"], told["ours_s"], told["limit_s"]) == (0.95, True, [1.0], [0.95])


@every_case("seconds, is_met", [(2.2, True), (2.21, False)])
def test_load_from_the_pool_may_take_a_tenth_longer_than_post_processing(seconds: float, is_met: bool) -> None:
    found = samples()
    (ours, *_) = found[OURS, "warm"]
    for tier in ("warm", "cold"):
        found[OURS_RESIDENT, tier] = [ours.model_copy(update={"seconds": seconds})]
    rows = rows_of(found, [limits()], reference=REFERENCE)
    verdict = verdicts_of(rows, read_s=1.0, process_s=2.0, reference=REFERENCE)[-1]
    assert verdict.name.startswith("(f)")
    assert verdict.is_met == is_met


def test_loaders_that_take_the_store_are_told_from_those_that_do_not(tmp_path: Path) -> None:
    for loaders in (vllm_loaders(tmp_path), plain_loaders(tmp_path)):
        by_name = {loader.name: loader for loader in loaders}
        assert by_name[OURS].extra_config["store"] is False
        assert by_name[OURS_RESIDENT].needs_store
        assert by_name[OURS].extra_config["store_dir"] == by_name[OURS_RESIDENT].extra_config["store_dir"]


def test_schedule_is_worth_the_ratio_of_the_medians() -> None:
    sample = io_schedule.Sample
    found = [sample("alone", 1.0), sample("paused", 1.5, 3.0, 2.0), sample("unpaused", 3.0, 2.0, 1.0)]
    *cases, worth = io_schedule.summary_of(found)
    assert {line["case"]: line["load_s"] for line in cases} == {"alone": 1.0, "paused": 1.5, "unpaused": 3.0}
    assert (worth["paused_over_alone"], worth["unpaused_over_alone"], worth["unpaused_over_paused"]) == (1.5, 3.0, 2.0)


def test_starts_are_summed_up_by_their_hint() -> None:
    def start(hint: early_prefetch.Hint, wait_s: float) -> early_prefetch.Start:
        return early_prefetch.Start(hint, wait_s, 2.0, 1.0, 20.0, hint == "yes")

    lines = early_prefetch.summary_of([start("yes", 0.1), start("no", 0.7), start("yes", 0.3), start("no", 0.9)])
    assert [(line["hint"], line["wait_s"], line["resident_before"]) for line in lines] == [
        ("yes", 0.2, 2),
        ("no", 0.8, 0),
    ]


# --------------------------------------------------------------------------------------------------------- arguments


def test_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["store_shares", "--parts", "tape"])
    with pytest.raises(SystemExit, match="2"):
        store_shares.main()
    assert "unknown: tape" in capsys.readouterr().err


def test_part_that_can_not_be_measured_is_told_and_left_out(
    monkeypatch: pytest.MonkeyPatch, setting: StoreSetting, lines: list[str]
) -> None:
    def fail(setting: StoreSetting) -> list[Share]:
        raise StoreJobFailed("no such thing")

    monkeypatch.setattr(store_shares, "disk_shares", fail)
    assert store_shares.run_shares(setting, ["disk"]) == []
    assert lines == ["disk: not measured: no such thing"]


def test_start_without_a_hint_stays_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    real = channel.send_hint
    monkeypatch.setattr(channel, "send_hint", real)
    monkeypatch.setitem(
        sys.modules, "vllm.entrypoints.cli.main", type("M", (), {"main": lambda: calls.append(list(sys.argv))})
    )
    for word, expected in (("yes", real), ("no", serve_hinting.keep_silent)):
        monkeypatch.setattr(sys, "argv", ["serve_hinting", word, "serve", "model"])
        serve_hinting.main()
        assert channel.send_hint is expected
    assert calls == [["serve_hinting", "serve", "model"]] * 2
    assert not serve_hinting.keep_silent(tmp_path, "model", 1)


# --------------------------------------------------------------------------------------------------- the real things


@pytest.fixture
def lines() -> list[str]:
    """What a benchmark says."""
    return []


@pytest.fixture
def setting(tmp_path: Path, lines: list[str]) -> StoreSetting:
    return StoreSetting(scratch=tmp_path, environment={}, rounds=1, say=lines.append, num_layers=0, claims_memory=False)


@pytest.fixture
def checkpoint(setting: StoreSetting) -> Checkpoint:
    """67 MB: embedding and output layer."""
    return setting.checkpoint("store", "small")


@pytest.fixture
def daemon(setting: StoreSetting, checkpoint: Checkpoint) -> Iterator[StoreDaemon]:
    slot_bytes = SMALL_PAGE_SLOT_NBYTES
    with setting.daemon("store", nbytes=data_nbytes(checkpoint), slot_bytes=slot_bytes, prefault=False) as running:
        yield running


def test_module_has_a_place_for_each_tensor_of_the_checkpoint(checkpoint: Checkpoint) -> None:
    partition = checkpoint.partition(0)
    state = named_state(module_for(partition, torch.device("cpu")))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        record.name: tuple(record.shape) for record in partition.record.tensors
    }


def test_checkpoint_is_written_once(tmp_path: Path, checkpoint: Checkpoint) -> None:
    again = write_plain_checkpoint(tmp_path / "store", "small", num_layers=5)
    assert again.manifest == checkpoint.manifest


def test_children_load_from_the_daemon_and_copy_out_of_its_pool(
    setting: StoreSetting, checkpoint: Checkpoint, daemon: StoreDaemon
) -> None:
    assert daemon.status()["pool"]["page_nbytes"] == 4096
    assert daemon.prefetch_s(checkpoint.path.name) > 0
    for pool in ("map", "copy"):
        answer = setting.run_job(load_job(checkpoint.path, daemon.config.store_dir, pool=pool))
        assert answer.source == "store"
        assert answer.seconds > 0
    config = {"store_dir": str(daemon.config.store_dir)}
    job = StoreJob(action="memcpy", config=config, num_threads=2, nbytes=data_nbytes(checkpoint))
    assert setting.run_job(job).seconds > 0
    daemon.wait_idle()
    daemon.evict(checkpoint.path.name)
    assert daemon.status()["pool"]["ready"] == 0


def test_child_that_fails_is_told_by_its_last_line(setting: StoreSetting, tmp_path: Path) -> None:
    with pytest.raises(StoreJobFailed, match="CheckpointMissing"):
        setting.run_job(load_job(tmp_path / "nothing", tmp_path))


def test_daemon_that_can_not_start_is_told(setting: StoreSetting, daemon: StoreDaemon) -> None:
    with pytest.raises(DaemonFailed, match="another daemon of the store is running"):
        setting.daemon("store", nbytes=0).__enter__()


def test_what_was_written_behind_a_load_is_removed(tmp_path: Path, checkpoint: Checkpoint) -> None:
    forget_on_disk(tmp_path / "store", checkpoint.path.name)
    forget_on_disk(tmp_path / "store", checkpoint.path.name)
    assert not checkpoint.path.exists()
