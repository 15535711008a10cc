"""vLLM's own load out of the store's pool: the same weights, the same modules, spans back when they are packed."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint
from tests.conftest import ModelDir
from tests.loader.test_bit_identity import wait_until_written
from tests.support.lease_daemon import LeaseDaemon, Script
from tests.support.vllm_fill import Fill, load_model, tensors_after_load_weights
from tests.support.waiting import DEADLINE_S

CHUNK_NBYTES = 8192


class Setting:
    """A tiny model, converted; loads of it, each with a report."""

    def __init__(self, model: Path, root: Path) -> None:
        self.store = root / "store"
        self._report = root / "report.json"
        extra = {"store_dir": str(self.store), "report_path": str(self._report), "chunk_bytes": CHUNK_NBYTES}
        self.fill = Fill(model, load_format="sllm", extra_config=extra)
        load_model(self.fill)
        wait_until_written()
        assert self.report() == ("converted", None)
        (manifest,) = self.store.glob(f"[!.]*/{MANIFEST_NAME}")
        self.checkpoint = open_checkpoint(manifest.parent)

    def report(self) -> tuple[str, str | None]:
        """Outcome and source of the last load."""
        value = json.loads(self._report.read_text())
        return value["outcome"], value["source"]

    def daemon(self, script: Script | None = None, *, found: Path | None = None) -> LeaseDaemon:
        script = script or Script(keep=lambda span: span % 3 != 0, transit=2)
        return LeaseDaemon(self.store, script, slot_nbytes=4 * CHUNK_NBYTES, num_slots=512, found=found)


@pytest.fixture
def setting(model_dir: ModelDir, tmp_path: Path) -> Setting:
    return Setting(model_dir("llama"), tmp_path)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_weights_are_those_of_the_stock_loader(setting: Setting) -> None:
    expected = tensors_after_load_weights(Fill(setting.fill.model_dir))
    with setting.daemon():
        assert_same(tensors_after_load_weights(setting.fill), expected)


def packs(module: torch.nn.Module) -> bool:
    """Whether vLLM made copies of weights for its kernels: it does where the processor has AVX-512."""
    return any(not weight.numel() for weight in module.parameters())


def test_packed_modules_give_their_spans_back_and_the_embedding_keeps_its_own(setting: Setting) -> None:
    with setting.daemon(Script()) as daemon:
        module = load_model(setting.fill)
        assert setting.report() == ("loaded", "store")
        num_spans = len(daemon.chunks_of_spans(setting.checkpoint.partition(0)))
        with daemon.changed:
            if packs(module):
                assert daemon.changed.wait_for(lambda: len(daemon.released) > 0, DEADLINE_S)
            assert len(daemon.released) < num_spans
            assert daemon.num_open == 1
        del module
        gc.collect()
        daemon.wait_released(range(num_spans))
        daemon.wait_idle()


def remote_only(setting: Setting, daemon: LeaseDaemon) -> Checkpoint:
    """Leave of the checkpoint what a daemon keeps of a remote's, and all of it in the daemon's memory."""
    partition = setting.checkpoint.partition(0)
    for span in range(len(daemon.chunks_of_spans(partition))):
        daemon.fill(partition, span)
    assert daemon.found is not None
    daemon.found.parent.mkdir(parents=True)
    (setting.checkpoint.path / MANIFEST_NAME).rename(daemon.found)
    partition.path.unlink()
    partition.path.parent.rmdir()
    setting.checkpoint.path.rmdir()
    return open_checkpoint(daemon.found.parent)


def test_a_checkpoint_that_only_the_store_can_get_is_found_and_loaded(setting: Setting) -> None:
    expected = tensors_after_load_weights(Fill(setting.fill.model_dir))
    found = setting.store / ".store" / "remote" / setting.checkpoint.path.name / MANIFEST_NAME
    with setting.daemon(found=found) as daemon:
        remote_only(setting, daemon)
        assert_same(tensors_after_load_weights(setting.fill), expected)
        load_model(setting.fill)
        assert setting.report() == ("loaded", "store")
        assert {lease.checkpoint for lease in daemon.leases} == {setting.checkpoint.path.name}


def test_what_nobody_has_is_converted_as_ever(setting: Setting) -> None:
    (setting.checkpoint.path / MANIFEST_NAME).rename(setting.store / "manifest")
    setting.checkpoint.partition(0).path.unlink()
    setting.checkpoint.partition(0).path.parent.rmdir()
    setting.checkpoint.path.rmdir()
    with setting.daemon() as daemon:
        load_model(setting.fill)
        wait_until_written()
        assert setting.report() == ("converted", None)
        assert daemon.leases == []


def test_a_daemon_that_ends_while_modules_are_packed_is_not_missed(setting: Setting) -> None:
    expected = tensors_after_load_weights(Fill(setting.fill.model_dir))
    for num_given in (0, 2, 5):
        with setting.daemon(Script(dies_after=num_given)):
            assert_same(tensors_after_load_weights(setting.fill), expected)
