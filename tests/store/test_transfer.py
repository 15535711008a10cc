"""Pushing and pulling whole checkpoints: bit-identical over every kind of remote, and never half of one."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import typer
from typer.testing import CliRunner

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint, verify_checkpoint
from sllm_vllm.cli.transfer import add_transfer_commands
from sllm_vllm.config import StoreConfig
from sllm_vllm.errors import (
    CheckpointCorrupt,
    CheckpointMissing,
    ConfigError,
    DiskFull,
    RemoteCorrupt,
    RemoteMissing,
    RemoteUnreachable,
    WriteError,
    WriterBusy,
)
from sllm_vllm.store.remote import open_checkpoint_url
from sllm_vllm.store.transfer import pull_checkpoint, push_checkpoint
from sllm_vllm.units import MIB
from tests.checkpoint import conftest
from tests.store.faulty_http import Fault, FaultyServer, faulty_server
from tests.support.checkpoints import (
    CHUNK_NBYTES,
    blob,
    files_below,
    files_but_locks,
    make_checkpoint,
    make_key,
    write_rank,
)
from tests.support.servers import BUCKET, nginx_server, s3_server

mount = conftest.mount

TENSORS = (blob("large", 6 * CHUNK_NBYTES), blob("odd", 1000, dtype="float32", item_nbytes=4), blob("tail", 77))
NUM_RANKS = 2
NUM_CHUNKS = 7  # a rank
FOLDER = ".staging/.received/m"
STEPS = ("open", "pwrite", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate", "posix_fallocate")
GROWTH_MIB_MAX = 80


@pytest.fixture
def original(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path / "elsewhere", key=make_key(NUM_RANKS), tensors=TENSORS)


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    return tmp_path / "store"


def limits(store_dir: Path, retries_max: int = 0) -> StoreConfig:
    return StoreConfig(store_dir=store_dir, retries_max=retries_max)


def files_of(original: Checkpoint) -> dict[str, bytes]:
    """What a server at whose root it lies as `m` has."""
    names = [MANIFEST_NAME, *(record.path for record in original.manifest.partitions)]
    return {f"/m/{name}": (original.path / name).read_bytes() for name in names}


def assert_same(found: Path, original: Checkpoint) -> None:
    checkpoint = open_checkpoint(found)
    assert verify_checkpoint(checkpoint) == original.manifest.nbytes
    for path, content in files_of(original).items():
        assert (found / path.removeprefix("/m/")).read_bytes() == content
    assert {name.partition("/")[0] for name in files_but_locks(found.parent)} == {found.name}


def assert_all_or_nothing(store_dir: Path, original: Checkpoint) -> bool:
    try:
        open_checkpoint(store_dir / "m")
    except CheckpointMissing:
        return False
    assert_same(store_dir / "m", original)
    return True


@contextlib.contextmanager
def folder_urls(root: Path) -> Iterator[tuple[str, str, str | None]]:
    yield f"file://{root}/deep/m", f"{root}/deep/m", None


@contextlib.contextmanager
def http_urls(root: Path) -> Iterator[tuple[str, str, str | None]]:
    with nginx_server(root) as server:
        yield f"file://{root}/deep/m", f"{server.url}/deep/m", None


@contextlib.contextmanager
def hub_urls(root: Path) -> Iterator[tuple[str, str, str | None]]:
    with nginx_server(root) as server:
        yield f"file://{root}/org/repo/resolve/v1/m", "hf://org/repo@v1/m", server.url


@contextlib.contextmanager
def s3_urls(root: Path) -> Iterator[tuple[str, str, str | None]]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}/deep/m", f"s3://{BUCKET}/deep/m", server.endpoint


@pytest.mark.parametrize("urls", [folder_urls, http_urls, hub_urls, s3_urls])
async def test_pushed_and_pulled_it_is_the_same(
    original: Checkpoint, tmp_path: Path, store_dir: Path, urls: Callable[[Path], Any]
) -> None:
    told: list[tuple[int, int]] = []
    nbytes = original.manifest.nbytes
    with urls(tmp_path / "remote") as (target, source, endpoint):
        pushed = await push_checkpoint(original, target, on_progress=lambda *bytes_done: told.append(bytes_done))
        assert (pushed.nbytes, pushed.was_there) == (nbytes, False)
        assert told[-1] == (nbytes, nbytes)
        again = await push_checkpoint(original, target)
        assert again.was_there
        told.clear()
        pulled = await pull_checkpoint(
            source, store_dir, endpoint=endpoint, on_progress=lambda *bytes_done: told.append(bytes_done)
        )
        assert (pulled.place, pulled.nbytes, pulled.was_there) == (str(store_dir / "m"), nbytes, False)
        assert told[-1] == (nbytes, nbytes)
        assert_same(store_dir / "m", original)
        assert (await pull_checkpoint(source, store_dir, endpoint=endpoint)).was_there


async def test_large_partition_goes_in_parts_to_s3(tmp_path: Path, store_dir: Path) -> None:
    write_rank(tmp_path, make_key(), tensors=[blob("large", 20 * MIB)], chunk_nbytes=3 * MIB)
    original = open_checkpoint(tmp_path / make_key().name)
    with s3_urls(tmp_path) as (target, source, endpoint):
        await push_checkpoint(original, target)
        await pull_checkpoint(source, store_dir, endpoint=endpoint)
    assert_same(store_dir / "m", original)


async def test_manifest_is_pushed_last(original: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    put = obstore.put_async

    async def watched(store: Any, key: str, *args: Any, **options: Any) -> Any:
        keys.append(key)
        return await put(store, key, *args, **options)

    monkeypatch.setattr(obstore, "put_async", watched)
    await push_checkpoint(original, f"{tmp_path}/remote/m")
    assert keys == [f"m/{record.path}" for record in original.manifest.partitions] + ["m/manifest.json"]


async def test_other_checkpoint_is_replaced_only_if_asked(original: Checkpoint, tmp_path: Path) -> None:
    url = f"{tmp_path}/remote/m"
    await push_checkpoint(make_checkpoint(tmp_path / "other", tensors=TENSORS), url)
    before = files_below(tmp_path / "remote")
    with pytest.raises(WriteError, match="--overwrite"):
        await push_checkpoint(original, url)
    assert files_below(tmp_path / "remote") == before
    await push_checkpoint(original, url, overwrite=True)
    assert_same(tmp_path / "remote" / "m", original)


@pytest.mark.parametrize("urls", [folder_urls, s3_urls])
async def test_corrupt_checkpoint_is_never_pushed(
    original: Checkpoint, tmp_path: Path, urls: Callable[[Path], Any]
) -> None:
    path = original.partition(1).path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with urls(tmp_path / "remote") as (target, _, endpoint):
        with pytest.raises(CheckpointCorrupt, match="differs from its checksum"):
            await push_checkpoint(original, target)
        remote, name = open_checkpoint_url(target, endpoint=endpoint)
        with pytest.raises(RemoteMissing):
            await remote.read_manifest(name)


async def test_push_to_what_can_only_be_read_is_refused(original: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="can only be read"):
        await push_checkpoint(original, "https://host/m")


async def test_flipped_bit_is_fetched_once_more(original: Checkpoint, store_dir: Path) -> None:
    faults = [Fault(flips=7), Fault(), Fault(flips=7)]  # the header, and the first chunk
    with faulty_server(files_of(original), faults) as server:
        await pull_checkpoint(f"{server.url}/m", store_dir, parallel=1)
        assert len(server.ranges) == NUM_RANKS * (NUM_CHUNKS + 1) + 2
    assert_same(store_dir / "m", original)


async def test_bit_that_always_flips_is_corrupt_and_nothing_is_published(original: Checkpoint, store_dir: Path) -> None:
    with (
        faulty_server(files_of(original), [Fault()], forever=Fault(flips=7)) as server,
        pytest.raises(RemoteCorrupt, match=r"chunk \d+ differs from its checksum \(tensors: "),
    ):
        await pull_checkpoint(f"{server.url}/m", store_dir, limits=limits(store_dir))
    assert not assert_all_or_nothing(store_dir, original)


async def test_manifest_that_breaks_the_format_is_corrupt(store_dir: Path) -> None:
    with (
        faulty_server({"/m/manifest.json": b'{"format": "other"}'}) as server,
        pytest.raises(RemoteCorrupt, match="format is 'other'"),
    ):
        await pull_checkpoint(f"{server.url}/m", store_dir)
    assert files_below(store_dir) == set()


async def test_missing_checkpoint_and_missing_partition(original: Checkpoint, store_dir: Path) -> None:
    files = files_of(original)
    del files["/m/" + original.manifest.partitions[1].path]
    with faulty_server(files) as server:
        with pytest.raises(RemoteMissing):
            await pull_checkpoint(f"{server.url}/another", store_dir)
        with pytest.raises(RemoteMissing):
            await pull_checkpoint(f"{server.url}/m", store_dir)
    assert not assert_all_or_nothing(store_dir, original)


async def test_broken_pull_goes_on_where_it_stopped(original: Checkpoint, store_dir: Path) -> None:
    def asked(server: FaultyServer) -> list[tuple[str, str | None]]:
        return [(request.path, request.range) for request in server.requests if request.range]

    with faulty_server(files_of(original), [Fault()] * 12, forever=Fault(status=500)) as server:
        with pytest.raises(RemoteUnreachable):
            await pull_checkpoint(f"{server.url}/m", store_dir, parallel=1, limits=limits(store_dir))
        first = asked(server)[:12]
    with faulty_server(files_of(original)) as server:
        await pull_checkpoint(f"{server.url}/m", store_dir)
        header = asked(server)[0]
        assert header in first, "the header of the partition that was not finished comes again"
        assert set(asked(server)[1:]).isdisjoint(first)
        assert len(set(first) | set(asked(server))) == NUM_RANKS * (NUM_CHUNKS + 1)
    assert_same(store_dir / "m", original)


async def test_two_pullers_at_once_make_one_good_checkpoint(original: Checkpoint, store_dir: Path) -> None:
    with faulty_server(files_of(original)) as server:
        pulls = [pull_checkpoint(f"{server.url}/m", store_dir) for _ in range(2)]
        outcomes = await asyncio.gather(*pulls, return_exceptions=True)
    assert all(isinstance(outcome, WriterBusy) or not isinstance(outcome, BaseException) for outcome in outcomes)
    assert not all(isinstance(outcome, WriterBusy) for outcome in outcomes)
    assert_same(store_dir / "m", original)


async def test_other_checkpoint_of_the_same_name_stays(original: Checkpoint, tmp_path: Path, store_dir: Path) -> None:
    other = make_checkpoint(tmp_path / "other", tensors=TENSORS)
    await push_checkpoint(other, f"{store_dir}/m")
    await push_checkpoint(original, f"{tmp_path}/remote/m")
    with pytest.raises(WriteError, match="another checkpoint has this name"):
        await pull_checkpoint(f"{tmp_path}/remote/m", store_dir)
    assert_same(store_dir / "m", other)


async def test_full_disk_leaves_nothing(original: Checkpoint, mount: conftest.Mount) -> None:
    mounted = mount(options="size=64k")
    with faulty_server(files_of(original)) as server:
        with pytest.raises(DiskFull):
            await pull_checkpoint(f"{server.url}/m", mounted.path)
        assert server.ranges == [], "nothing is fetched in vain"
    assert files_but_locks(mounted.path) == set()


def pull_in_child(url: str, store_dir: str, dies_at: int | None, num_done: Any) -> None:
    """Pull, and be killed in place of one of the file-system steps, counted from 0."""

    counting = threading.Lock()

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with counting:
                if num_done.value == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                num_done.value += 1
            return step(*args, **kwargs)

        return run

    for name in STEPS:
        setattr(os, name, watched(getattr(os, name)))
    asyncio.run(pull_checkpoint(url, Path(store_dir), parallel=3))


def memory_in_child(url: str, target: str, store_dir: str, growth_mib: Any) -> None:
    """Pull and push, and tell by how much the largest memory grew."""
    asyncio.run(pull_checkpoint(url, Path(store_dir) / "small", parallel=4))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asyncio.run(pull_checkpoint(url.replace("small", "m"), Path(store_dir), parallel=4))
    asyncio.run(push_checkpoint(open_checkpoint(Path(store_dir) / "m"), target))
    growth_mib.value = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


@pytest.fixture(scope="module")
def children() -> Any:
    """Processes that are forked from one that has all modules and no thread: obstore does not survive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__name__, "sllm_vllm.store.transfer", "tests.store.faulty_http", "tests.support.servers"]
    )
    return context


def run_child(children: Any, target: Callable[..., None], *args: object) -> tuple[int, int]:
    """Exit code, and what it told."""
    told = children.Value("l", 0, lock=False)  # whoever is killed would keep the lock
    process = children.Process(target=target, args=(*args, told))
    process.start()
    process.join()
    return process.exitcode, told.value


async def test_killed_pull_leaves_all_or_nothing_and_goes_on(
    original: Checkpoint, tmp_path: Path, children: Any
) -> None:
    url = f"{tmp_path}/remote/m"
    await push_checkpoint(original, url)
    exit_code, num_steps = await asyncio.to_thread(
        run_child, children, pull_in_child, url, str(tmp_path / "count"), None
    )
    assert exit_code == 0
    assert num_steps > 30
    found = []
    for step in sorted(random.Random(0).sample(range(num_steps - 8), 12)) + list(range(num_steps - 8, num_steps)):
        store_dir = tmp_path / str(step)
        exit_code, _ = await asyncio.to_thread(run_child, children, pull_in_child, url, str(store_dir), step)
        found.append(assert_all_or_nothing(store_dir, original))
        assert exit_code in {-signal.SIGKILL, 0}  # 0: another order of threads took fewer steps
        await pull_checkpoint(url, store_dir)
        assert_same(store_dir / "m", original)
    assert found == sorted(found), "once published, it stays so"
    assert False in found


async def test_memory_is_bounded(tmp_path: Path, children: Any) -> None:
    key, small = make_key(), make_key(model="org/small")
    for one, num_tensors in ((key, 5), (small, 1)):
        tensors = [blob(f"large-{number}", 32 * MIB) for number in range(num_tensors)]
        write_rank(tmp_path, one, tensors=tensors, chunk_nbytes=2 * MIB)
    (tmp_path / key.name).rename(tmp_path / "m")
    (tmp_path / small.name).rename(tmp_path / "small")
    args = (f"{tmp_path}/small", f"{tmp_path}/remote/m", str(tmp_path / "store"))
    exit_code, growth_mib = await asyncio.to_thread(run_child, children, memory_in_child, *args)
    assert exit_code == 0
    print(f"grew by {growth_mib} MiB")
    assert growth_mib < GROWTH_MIB_MAX


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    add_transfer_commands(app)
    return app


def test_commands_push_and_pull(app: typer.Typer, original: Checkpoint, tmp_path: Path, store_dir: Path) -> None:
    def run(*words: str) -> str:
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0
        return " ".join(result.output.split())

    url = f"file://{tmp_path}/remote/m"
    assert run("push", str(original.path), url).startswith(f"pushed: file://{tmp_path}/remote/m (")
    assert run("push", original.path.name, url, "--store-dir", str(original.path.parent)).startswith("already there: ")
    assert run("pull", url, "--store-dir", str(store_dir)).startswith(f"pulled: {store_dir}/m (")
    assert_same(store_dir / "m", original)
    other = make_checkpoint(tmp_path / "other", tensors=TENSORS)
    assert run("push", str(other.path), url, "--overwrite").startswith("pushed: ")
    with pytest.raises(WriteError):
        CliRunner().invoke(app, ["pull", url, "--store-dir", str(store_dir)], catch_exceptions=False)


_LATE = """
import asyncio.selector_events, sys, threading, time
wake, ending = asyncio.selector_events.BaseSelectorEventLoop._write_to_self, threading.Event()

def wake_late(loop):
    wake(loop)
    if isinstance(threading.current_thread(), threading._DummyThread):  # none of Python's own
        ending.wait(120)  # without the GIL: the main thread goes on, and ends

class Last:
    def __del__(self, ending=ending, sleep=time.sleep):
        ending.set()
        sleep(1)  # without the GIL: the other thread wants it while the interpreter ends

sys.last_of_all = Last()
asyncio.selector_events.BaseSelectorEventLoop._write_to_self = wake_late
from sllm_vllm.cli.main import main
main()
"""


@pytest.mark.parametrize("is_there", [True, False])
def test_a_transfer_ends_with_its_status_though_obstores_threads_still_run(
    original: Checkpoint, tmp_path: Path, is_there: bool
) -> None:
    """A thread that came back to a Python that ends was ended by it, through Rust: SIGABRT."""
    (tmp_path / "remote").mkdir()
    if is_there:
        shutil.copytree(original.path, tmp_path / "remote" / "m")
    words = ["pull", f"file://{tmp_path}/remote/m", "--store-dir", str(tmp_path / "store")]
    done = subprocess.run([sys.executable, "-c", _LATE, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == (0 if is_there else 1), done.stderr
    assert ("pulled: " in done.stdout) if is_there else ("there is no such file" in done.stderr)
