"""Finds where checkpoints are stored: on the local disk, at a remote, or both. Caches a bounded number of manifests.

A checkpoint is named by its directory's name in the store, or by an absolute path. The manifest of a checkpoint that
only a remote has is copied to ``<state>/remote/<name>/``, so that any process can open it, like a checkpoint without
partitions.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, parse_manifest
from sllm_vllm.checkpoint.reader import Checkpoint, RankPartition, open_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.checkpoint.writer import write_errors, write_file_durably
from sllm_vllm.errors import CheckpointError, CheckpointMissing, RemoteError, RemoteMissing

if TYPE_CHECKING:
    from sllm_vllm.store.remote import Remote

MANIFESTS_MAX = 256
"""Most parsed manifests that are cached; that of a large model takes a few megabytes."""
LOOKUP_S = 30.0
"""How long a remote's manifest is used before it is fetched again."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A checkpoint and where it can be read from. ``checkpoint.path`` has partitions only if ``is_on_disk``."""

    name: str
    checkpoint: Checkpoint
    is_on_disk: bool
    remote: Remote | None = None

    def partition(self, rank: int) -> RankPartition:
        """Return a rank's partition.

        Raises:
            CheckpointMissing: the checkpoint has no such rank.
        """
        if rank >= len(self.checkpoint.manifest.partitions):
            raise CheckpointMissing(self.checkpoint.path, f"it has no rank {rank}", "convert for more ranks")
        return self.checkpoint.partition(rank)


@dataclass(frozen=True, slots=True)
class _Known:
    """The facts remembered about a manifest, so that it can be found by its model without parsing it again."""

    model: str
    tensor_parallel_size: int
    changed_s: float


class Places:
    """Finds checkpoints. Its coroutines do slow I/O in threads; its other methods may block the event loop."""

    def __init__(self, store_dir: Path, state_dir: Path, remotes: Sequence[Remote]) -> None:
        self.repository = CheckpointRepository(store_dir)
        self._remote_dir = state_dir / "remote"
        self._origin_dir = state_dir / "origins"
        self.remotes = remotes
        self._parsed: collections.OrderedDict[tuple[Path, int, int, int], Checkpoint] = collections.OrderedDict()
        self._known: dict[Path, _Known] = {}
        self._used_s: dict[str, float] = {}
        self._lookups: dict[str, asyncio.Task[Placed | None]] = {}
        self._parsing = threading.Lock()
        """Parses one remote manifest at a time: parsing a hostile one can take a quarter of a gigabyte of memory."""

    async def find(self, name: str) -> Placed:
        """Find a checkpoint by name or absolute path: first on disk, then at each remote.

        Raises:
            CheckpointMissing: neither the disk nor a remote has it.
            CheckpointError, RemoteError: it can't be used, or remotes that might have it can't be reached.
        """
        self._used_s[name] = time.time()
        if os.path.isabs(name):
            return Placed(name, await asyncio.to_thread(self._open, Path(name)), is_on_disk=True)
        path = self._checked(name)
        try:
            return Placed(name, await asyncio.to_thread(self._open, path), is_on_disk=True)
        except CheckpointError as error:
            if (placed := await self._find_remote(name)) is None:
                raise error from None
            return placed

    async def remote_for(self, name: str, checkpoint: Checkpoint) -> Remote | None:
        """Return a remote that has exactly this checkpoint, if any.

        Raises:
            RemoteError, CheckpointError: no remote that answered has it, and a remote failed.
        """
        found = None if os.path.isabs(name) else await self._find_remote(name)
        return found.remote if found is not None and found.checkpoint.manifest == checkpoint.manifest else None

    def names_for_model(self, model: str, tensor_parallel_size: int | None) -> list[str]:
        """Return the names of checkpoints on disk that were made from a model, most recently used or written first."""
        wanted = {model, os.path.realpath(model)}
        found = []
        for path in self._paths():
            known = self._know(path)
            if known is None or known.model not in wanted:
                continue
            if tensor_parallel_size in (None, known.tensor_parallel_size):
                found.append((self._used_s.get(path.name, known.changed_s), path.name))
        return [name for _, name in sorted(found, reverse=True)]

    def disk_usage(self) -> list[tuple[str, int]]:
        """Return the name and size of every checkpoint in the store on disk."""
        usage = []
        for path in self._paths():
            try:
                files = [entry for entry in (path / "partitions").iterdir() if entry.is_file()]
                usage.append((path.name, sum(file.stat().st_size for file in files)))
            except OSError:
                continue  # removed meanwhile
        return usage

    def note_origin(self, placed: Placed) -> None:
        """Record that a remote has a checkpoint that was written to disk, so that it may be removed to free space."""
        assert placed.remote is not None
        with write_errors(self._origin_dir):
            self._origin_dir.mkdir(parents=True, exist_ok=True)
            write_file_durably(self._origin_dir / placed.name, placed.remote.shown.encode())

    def removable(self, names: Iterable[str]) -> list[str]:
        """Return those of the checkpoints that came from a remote."""
        return [name for name in names if (self._origin_dir / name).exists()]

    def last_used_s(self, name: str) -> float:
        """Return when a checkpoint was last requested, in epoch seconds; 0 if not since the daemon started."""
        return self._used_s.get(name, 0.0)

    async def _find_remote(self, name: str) -> Placed | None:
        """Return the checkpoint at the first remote that has it, if any. Concurrent calls share one lookup.

        Raises:
            RemoteError, CheckpointError: see ``_ask_remotes``.
        """
        if name not in self._lookups:
            self._lookups[name] = asyncio.get_running_loop().create_task(self._ask_remotes(name))
            self._lookups[name].add_done_callback(functools.partial(self._looked_up, name))
        return await asyncio.shield(self._lookups[name])

    def _looked_up(self, name: str, lookup: asyncio.Task[Placed | None]) -> None:
        """Keep a successful lookup for ``LOOKUP_S``; drop any other at once, so that the next call asks again."""
        found = not lookup.cancelled() and lookup.exception() is None and lookup.result() is not None
        delay = LOOKUP_S if found else 0.0
        asyncio.get_running_loop().call_later(delay, self._lookups.pop, name, None)

    async def _ask_remotes(self, name: str) -> Placed | None:
        """Ask the remotes in order. Returns the checkpoint at the first that has it; None if all answer and lack it.

        Raises:
            RemoteError: a remote failed, and no other remote has it.
            CheckpointError: the manifest is invalid.
        """
        failure: RemoteError | None = None
        for remote in self.remotes:
            try:
                raw = await remote.read_manifest(name)
            except RemoteMissing:
                continue
            except RemoteError as error:
                failure = error
                continue
            checkpoint = await asyncio.to_thread(self._keep_manifest, name, raw, remote)
            return Placed(name, checkpoint, is_on_disk=False, remote=remote)
        if failure is not None:
            raise failure
        return None

    def _keep_manifest(self, name: str, raw: bytes, remote: Remote) -> Checkpoint:
        with self._parsing:
            manifest = parse_manifest(raw, f"{remote.shown}/{name}/{MANIFEST_NAME}")
        directory = self._remote_dir / name
        with write_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            write_file_durably(directory / MANIFEST_NAME, raw)
        return Checkpoint(directory, manifest)

    def _checked(self, name: str) -> Path:
        path = self.repository.root / name
        if Path(name).name != name or name.startswith("."):
            raise CheckpointMissing(path, "this is not the name of a checkpoint", "see `sllm-vllm list`")
        return path

    def _paths(self) -> list[Path]:
        try:
            return [path for path in sorted(self.repository.root.iterdir()) if not path.name.startswith(".")]
        except OSError:
            return []

    def _open(self, path: Path) -> Checkpoint:
        """Open a checkpoint. Its manifest is parsed again only if it changed."""
        try:
            status = (path / MANIFEST_NAME).stat()
        except OSError:
            return open_checkpoint(path)  # raises the right error
        key = (path, status.st_ino, status.st_size, status.st_mtime_ns)
        checkpoint = self._parsed.get(key)
        if checkpoint is None:
            checkpoint = self._parsed[key] = open_checkpoint(path)
            while len(self._parsed) > MANIFESTS_MAX:
                self._parsed.popitem(last=False)
        layout = checkpoint.manifest.layout
        self._known[path] = _Known(checkpoint.manifest.source.model, layout.tensor_parallel_size, status.st_mtime)
        return checkpoint

    def _know(self, path: Path) -> _Known | None:
        try:
            changed_s = (path / MANIFEST_NAME).stat().st_mtime
            if path not in self._known or self._known[path].changed_s != changed_s:
                self._open(path)
        except (OSError, CheckpointError):
            return None
        return self._known.get(path)
