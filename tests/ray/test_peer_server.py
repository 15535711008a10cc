"""A node's checkpoints as another node pulls them: whole, checked, by its key alone, and nothing else of the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.reader import open_checkpoint, verify_checkpoint
from sllm_vllm.errors import RemoteCorrupt, RemoteMissing, RemoteRefused
from sllm_vllm.ray import peer_server
from sllm_vllm.ray.peer_server import PeerServer
from sllm_vllm.store.transfer import pull_checkpoint
from tests.support.cases import every_case
from tests.support.checkpoints import blob, files_below, make_checkpoint

TENSORS = (blob("large", 600, 1000), blob("tail", 77))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[PeerServer]:
    """With one checkpoint, `m`, and a secret beside it."""
    checkpoint = make_checkpoint(tmp_path / "there", tensors=TENSORS)
    checkpoint.path.rename(tmp_path / "there" / "m")
    (tmp_path / "there" / "secret").write_text("s")
    (tmp_path / "there" / "m" / "secret").write_text("s")
    running = PeerServer(tmp_path / "there", "127.0.0.1")
    await running.start()
    yield running
    await running.close()


async def status_of(url: str) -> int:
    async with aiohttp.ClientSession() as client, client.get(url) as answer:
        return answer.status


async def test_a_peer_pulls_it_whole(server: PeerServer, tmp_path: Path) -> None:
    pulled = await pull_checkpoint(f"{server.url}/m", tmp_path / "here")
    verify_checkpoint(open_checkpoint(Path(pulled.place)))
    (tmp_path / "there" / "m" / "secret").unlink()
    assert files_below(tmp_path / "here" / "m") == files_below(tmp_path / "there" / "m")
    assert (await pull_checkpoint(f"{server.url}/m", tmp_path / "here")).was_there


async def test_a_chunk_that_changed_on_the_peers_disk_is_found_out(server: PeerServer, tmp_path: Path) -> None:
    partition = next((tmp_path / "there" / "m" / "partitions").iterdir())
    data = bytearray(partition.read_bytes())
    data[len(data) // 2] ^= 1
    partition.write_bytes(data)
    with pytest.raises(RemoteCorrupt):
        await pull_checkpoint(f"{server.url}/m", tmp_path / "here")
    assert not (tmp_path / "here" / "m").exists()


async def test_without_its_key_nobody_gets_anything(server: PeerServer, tmp_path: Path) -> None:
    host = server.url.rpartition("@")[2]
    for url in (f"http://{host}", f"http://peer:wrong@{host}", server.url.replace("peer:", "other:")):
        with pytest.raises(RemoteRefused):
            await pull_checkpoint(f"{url}/m", tmp_path / "here")
    assert await status_of(f"http://{host}/m/{MANIFEST_NAME}") == 401


@every_case(
    "path",
    [
        "secret",
        "m/secret",
        "m/partitions",
        "m/../secret",
        "m/%2e%2e/secret",
        "%2e%2e/secret",
        "m/partitions/../secret",
        "",
    ],
)
async def test_nothing_but_checkpoints_is_served(server: PeerServer, path: str) -> None:
    assert await status_of(f"{server.url}/{path}") in {403, 404}


async def test_what_is_not_there_is_missing(server: PeerServer, tmp_path: Path) -> None:
    with pytest.raises(RemoteMissing):
        await pull_checkpoint(f"{server.url}/other", tmp_path / "here")


async def test_more_than_so_many_answers_are_put_off(server: PeerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server.url}/m/{MANIFEST_NAME}"
    monkeypatch.setattr(peer_server, "ANSWERS_MAX", 0)
    assert await status_of(url) == 503
    monkeypatch.undo()
    assert set(await asyncio.gather(*(status_of(url) for _ in range(8)))) == {200}


async def test_two_servers_have_different_keys(server: PeerServer, tmp_path: Path) -> None:
    other = PeerServer(tmp_path / "there", "127.0.0.1")
    await other.start()
    try:
        key = server.url.partition("@")[0]
        assert await status_of(f"{key}@{other.url.rpartition('@')[2]}/m/{MANIFEST_NAME}") == 401
    finally:
        await other.close()
