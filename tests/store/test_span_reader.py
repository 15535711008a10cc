"""A slot's read ends with an answer, whatever breaks on the way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sllm_vllm.config import StoreConfig
from sllm_vllm.errors import CheckpointUnreadable, DiskFull, SllmError
from sllm_vllm.store.core.events import StartRead
from sllm_vllm.store.devices import Device, HopMeter
from sllm_vllm.store.pool import Pool
from sllm_vllm.store.remote import Remote
from sllm_vllm.store.span_reader import KnownPartition, SpanFile, SpanReader, spec_of
from sllm_vllm.units import MIB
from tests.support.store_checkpoints import make_checkpoint
from tests.support.waiting import DEADLINE_S


class Broken(SpanFile):
    """A file whose reading breaks in a way that nobody thought of."""

    def read(self, buffer: memoryview, offset: int, nbytes: int) -> str:
        raise ZeroDivisionError


async def no_room(known: KnownPartition) -> Remote | None:
    raise DiskFull("remote/manifest.json", "no space is left on the device", "free some")


async def test_what_nobody_thought_of_is_told_to_who_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    partition = make_checkpoint(tmp_path, "a", nbytes=MIB).partition(0)
    ended: asyncio.Future[SllmError | None] = asyncio.get_running_loop().create_future()
    device, network = (Device(1, 1, starve_s=1.0, pauses=True) for _ in range(2))
    (tmp_path / "pool").mkdir()
    with Pool(1, 2 * MIB, tmp_path / "pool") as pool:
        reader = SpanReader(
            pool,
            network,
            config=StoreConfig(store_dir=tmp_path),
            meters={"disk": HopMeter(), "cache": HopMeter()},
            find_remote=no_room,
            done=lambda order, error: ended.set_result(error),
        )
        known = KnownPartition(spec_of(partition, "a", 2), partition, 0, "a", 2, device=device, file=Broken(partition))
        reader.start(known, StartRead(known.spec.id, 0, 0, is_urgent=True))
        async with asyncio.timeout(DEADLINE_S):
            error = await ended
        await device.close()
        await network.close()
    assert isinstance(error, CheckpointUnreadable)
    assert "ZeroDivisionError" in str(error)
    assert "event=read_broke" in caplog.text
    assert known.jobs == {}
