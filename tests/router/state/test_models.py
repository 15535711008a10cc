"""Models deployed by hand over a restart: what is kept, what the file overrules, and what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.state.models import KeptModels
from sllm_vllm.router.state.store import SqliteStore, StateError

WRITTEN = ModelConfig(name="written", source="/models/written")
BY_HAND = ModelConfig(name="meta/by-hand", source="/models/by-hand", min_replicas=1)


def kept(directory: Path, *written: ModelConfig) -> KeptModels:
    return KeptModels(SqliteStore(directory / "state"), written)


async def named(models: KeptModels) -> dict[str, ModelConfig]:
    return {model.name: model for model in await models.all()}


async def test_without_records_the_file_is_served(tmp_path: Path) -> None:
    assert await kept(tmp_path, WRITTEN).all() == [WRITTEN]


async def test_what_was_deployed_by_hand_is_there_again(tmp_path: Path) -> None:
    await kept(tmp_path, WRITTEN).keep(BY_HAND.name, BY_HAND)
    assert await named(kept(tmp_path, WRITTEN)) == {"written": WRITTEN, "meta/by-hand": BY_HAND}


async def test_what_was_changed_by_hand_stays_changed_until_the_file_says_otherwise(tmp_path: Path) -> None:
    changed = WRITTEN.model_copy(update={"min_replicas": 1})
    await kept(tmp_path, WRITTEN).keep("written", changed)
    assert await kept(tmp_path, WRITTEN).all() == [changed]
    edited = WRITTEN.model_copy(update={"keep_alive": 5.0})
    assert await kept(tmp_path, edited).all() == [edited]


async def test_what_was_deleted_by_hand_stays_away_until_the_file_says_otherwise(tmp_path: Path) -> None:
    await kept(tmp_path, WRITTEN).keep("written", None)
    assert await kept(tmp_path, WRITTEN).all() == []
    edited = WRITTEN.model_copy(update={"keep_alive": 5.0})
    assert await kept(tmp_path, edited).all() == [edited]


async def test_what_was_deployed_and_deleted_by_hand_leaves_no_record(tmp_path: Path) -> None:
    models = kept(tmp_path)
    await models.keep(BY_HAND.name, BY_HAND)
    await models.keep(BY_HAND.name, None)
    assert await SqliteStore(tmp_path / "state").items("models/") == {}


async def test_a_file_that_is_read_again_counts_for_what_is_kept_then(tmp_path: Path) -> None:
    models = kept(tmp_path)
    models.reread([WRITTEN])
    await models.keep("written", None)
    assert await kept(tmp_path, WRITTEN).all() == []


@pytest.mark.parametrize(
    "record",
    [b"no json", b"[]", b"{}", b"[" * 100_000, json.dumps({"model": {"nmae": "a"}, "written": ""}).encode()],
    ids=["text", "list", "empty", "deep", "unknown-key"],
)
async def test_a_record_that_cannot_be_read_costs_the_others_nothing(
    tmp_path: Path, record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await SqliteStore(tmp_path / "state").put("models/odd", record)
    await kept(tmp_path).keep(BY_HAND.name, BY_HAND)
    assert await kept(tmp_path).all() == [BY_HAND]
    assert "event=model_not_restored model='odd'" in caplog.text
    assert await SqliteStore(tmp_path / "state").get("models/odd") == record


async def test_a_store_that_fails_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"no database" * 100)
    with pytest.raises(StateError):
        await kept(tmp_path, WRITTEN).all()
