"""Random edits of source weights in every layout: a checkpoint that is found always holds what the files hold now.

The store is imitated by a table from fingerprints to the bytes that a conversion read; the records are the real ones.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm_vllm.checkpoint import source_records
from sllm_vllm.checkpoint.fingerprint import fingerprint_directory, scan_source
from sllm_vllm.checkpoint.source_records import SourceRecords
from sllm_vllm.errors import ConfigError
from tests.support.cases import every_case
from tests.support.waiting import wait_until

SETTLED_NS = 30_000_000
"""Longer than the tick of any kernel's clock, so that a run meets states that prove something, and others."""
COMMITS = ("0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef")
NBYTES = 40_000
LAYOUTS = (
    "plain",
    "sharded",
    "bin",
    "gguf",
    "hub",
    "links to a mount",
    "links to blobs elsewhere",
    "from object store",
)


def content(seed: int) -> bytes:
    return random.Random(seed).randbytes(NBYTES)


@dataclass(slots=True)
class World:
    """A model in one layout, and the starts that load it. ``directories`` may be more than one revision."""

    root: Path
    directories: list[Path]
    chance: random.Random
    checkpoints: dict[str, dict[str, bytes]] = field(default_factory=dict)
    num_found: int = 0

    def start(self) -> None:
        """Find a checkpoint and hold it against the files, or convert."""
        directory = self.chance.choice(self.directories)
        records = SourceRecords(self.root / "store")
        try:
            files = scan_source(directory)
            found = records.known(directory, files) or records.identify(directory, files)
        except ConfigError:
            return  # no start without weights
        now = {file.name: file.path.read_bytes() for file in files}
        if found.fingerprint in self.checkpoints:
            self.num_found += 1
            assert self.checkpoints[found.fingerprint] == now
        elif records.identify(directory, files, effort="named").fingerprint == found.fingerprint:
            self.checkpoints[found.fingerprint] = now
        if self.chance.random() < 0.3:
            assert records.identify(directory, files, effort="all").fingerprint == fingerprint_directory(directory)

    def names(self) -> list[Path]:
        """Weight files by the names under which a start finds them."""
        return [file for directory in self.directories for file in sorted(directory.iterdir()) if file.exists()]

    def pick(self) -> Path:
        return self.chance.choice(self.names())


def make(layout: str, root: Path, chance: random.Random) -> World:
    model, suffix = root / "model", {"bin": "bin", "gguf": "gguf"}.get(layout, "safetensors")
    names = [f"model-{i}.{suffix}" for i in range(1 if layout in ("plain", "gguf") else 3)]
    if layout == "hub":
        repository = root / "models--org--name"
        folders = [repository / "snapshots" / commit for commit in COMMITS]
        for folder in folders:
            link_all(folder, repository / "blobs", names, hashed=True)
        return World(root, folders, chance)
    if layout == "from object store":
        model = root / "models--s3---bucket" / "snapshots" / ("0" * 40)
    if layout.startswith("links"):
        link_all(model, root / ("blobs" if "blobs" in layout else "mount"), names, hashed="blobs" in layout)
    else:
        model.mkdir(parents=True)
        for seed, name in enumerate(names):
            (model / name).write_bytes(content(seed))
    return World(root, [model], chance)


def link_all(folder: Path, target: Path, names: list[str], *, hashed: bool) -> None:
    folder.mkdir(parents=True)
    target.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        file = target / (hashlib.sha256(content(seed)).hexdigest() if hashed else name)
        file.write_bytes(content(seed))
        (folder / name).symlink_to(file)


def write_in_place(world: World) -> None:
    """Some bytes; size kept, and mtime, as tools for reproducible images do."""
    file = world.pick()
    times = file.stat()
    with file.open("r+b") as handle:
        handle.seek(world.chance.randrange(max(times.st_size, 1)))
        handle.write(world.chance.randbytes(2))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def write_back(world: World) -> None:
    """What a file held at first, in place."""
    file = world.pick()
    times = file.stat()
    file.write_bytes(content(world.chance.randrange(3)))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_keeping_times(world: World) -> None:
    """As ``rsync -t`` does."""
    file = world.pick().resolve()
    new = file.with_name("new")
    shutil.copy2(file, new)
    with new.open("r+b") as handle:
        handle.write(world.chance.randbytes(1))
    shutil.copystat(file, new)
    new.rename(file)


def halve(world: World) -> None:
    file = world.pick()
    os.truncate(file, file.stat().st_size // 2)


def swap_names(world: World) -> None:
    """Two files of one folder: the links where there are links."""
    first = world.pick()
    second = world.chance.choice(sorted(first.parent.iterdir()))
    first.rename(first.with_name("swapped"))
    if second != first:
        second.rename(first)
    first.with_name("swapped").rename(second)


def rename(world: World) -> None:
    file = world.pick()
    file.rename(file.with_name(f"model-{world.chance.randrange(4)}{file.suffix}"))


def hard_link(world: World) -> None:
    """A second name of the same file."""
    file = world.pick()
    other = file.with_name(f"model-{world.chance.randrange(4)}{file.suffix}")
    if not other.exists():
        other.unlink(missing_ok=True)
        os.link(file.resolve(), other)


def link_elsewhere(world: World) -> None:
    file = world.pick()
    target = world.chance.choice(world.names()).resolve()
    if target != file.resolve():
        file.unlink()
        file.symlink_to(target)


def touch(world: World) -> None:
    os.utime(world.pick())


def copy_whole(world: World) -> None:
    """Every file gets another inode and other times, and keeps what it holds."""
    directory = world.chance.choice(world.directories)
    for file in sorted(directory.iterdir()):
        if file.exists():
            place = file.resolve()
            shutil.copyfile(place, place.with_name("new"))
            place.with_name("new").rename(place)


def lose_records(world: World) -> None:
    """A record that a full disk cut short."""
    for record in (world.root / "store" / ".sources").glob("*.json"):
        os.truncate(record, 10)


def let_time_pass(world: World) -> None:
    """Until what was written is settled."""
    deadline_ns = time.time_ns() + SETTLED_NS + 10_000_000
    wait_until(lambda: time.time_ns() > deadline_ns, "the clock")


EDITS: list[Callable[[World], None]] = [
    write_in_place,
    write_back,
    replace_keeping_times,
    halve,
    swap_names,
    rename,
    hard_link,
    link_elsewhere,
    touch,
    copy_whole,
    lose_records,
    let_time_pass,
    let_time_pass,
]


@pytest.fixture(autouse=True, scope="module")
def _settled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_records, "_SETTLED_NS", SETTLED_NS)
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), edits=st.lists(st.sampled_from(EDITS), min_size=1, max_size=12))
def test_found_checkpoint_holds_what_the_files_hold(
    layout: str, seed: int, edits: list[Callable[[World], None]]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        world = make(layout, Path(root), random.Random(seed))
        world.start()
        for edit in edits:
            if world.names():
                edit(world)
            world.start()
            world.start()


@every_case("layout", LAYOUTS)
def test_unchanged_files_are_found_again_without_being_read(layout: str, tmp_path: Path) -> None:
    world = make(layout, tmp_path, random.Random(0))
    world.directories = world.directories[:1]
    let_time_pass(world)
    world.start()
    files = scan_source(world.directories[0])
    known = SourceRecords(tmp_path / "store").known(world.directories[0], files)
    assert known is not None
    assert known.nbytes_read == 0
    world.start()
    assert world.num_found == 1
