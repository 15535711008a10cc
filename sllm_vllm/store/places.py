"""Which checkpoint lies where: on this machine's disk, at a remote, or both. Holds parsed manifests, bounded.

A checkpoint is named as its directory in the store is, or by an absolute path. One that only a remote has gets its
manifest into ``<state>/remote/<name>/``, so that any process can open it like a checkpoint without partitions.
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
"""Parsed manifests that are kept; one of a large model takes a few megabytes."""
LOOKUP_S = 30.0
"""How long a remote's manifest is believed before it is fetched again."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A checkpoint and where it can be had. ``checkpoint.path`` has partitions only if ``is_on_disk``."""

    name: str
    checkpoint: Checkpoint
    is_on_disk: bool
    remote: Remote | None = None

    def partition(self, rank: int) -> RankPartition:
        """A rank's partition.

        Raises:
            CheckpointMissing: the checkpoint has no such rank.
        """
        if rank >= len(self.checkpoint.manifest.partitions):
            raise CheckpointMissing(self.checkpoint.path, f"it has no rank {rank}", "convert for more ranks")
        return self.checkpoint.partition(rank)


@dataclass(frozen=True, slots=True)
class _Known:
    """What is remembered of a manifest: enough to find it by its model without parsing it again."""

    model: str
    tensor_parallel_size: int
    changed_s: float


class Places:
    """Finds checkpoints. Every method but ``close`` may do slow input and output, away from the loop."""

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
        """One manifest of a remote at a time: a hostile one costs a quarter of a gigabyte while it is read."""

    async def find(self, name: str) -> Placed:
        """Where the checkpoint of this name or absolute path is; the disk is asked first, then each remote.

        Raises:
            CheckpointMissing: nobody has it. CheckpointError, RemoteError: somebody has, but it can't be used.
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
        """A remote that has the very same checkpoint.

        Raises:
            RemoteError, CheckpointError: those that could be asked lack it, and others could not be asked.
        """
        found = None if os.path.isabs(name) else await self._find_remote(name)
        return found.remote if found is not None and found.checkpoint.manifest == checkpoint.manifest else None

    def names_for_model(self, model: str, tensor_parallel_size: int | None) -> list[str]:
        """Checkpoints on disk that were made from a model: the one that was used or written last comes first."""
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
        """Name and bytes of every checkpoint of the store on disk."""
        usage = []
        for path in self._paths():
            try:
                files = [entry for entry in (path / "partitions").iterdir() if entry.is_file()]
                usage.append((path.name, sum(file.stat().st_size for file in files)))
            except OSError:
                continue  # removed meanwhile
        return usage

    def note_origin(self, placed: Placed) -> None:
        """Remember that a remote has what was written to disk: it may be removed from there when room is needed."""
        assert placed.remote is not None
        with write_errors(self._origin_dir):
            self._origin_dir.mkdir(parents=True, exist_ok=True)
            write_file_durably(self._origin_dir / placed.name, placed.remote.shown.encode())

    def removable(self, names: Iterable[str]) -> list[str]:
        """Those of the checkpoints that came from a remote."""
        return [name for name in names if (self._origin_dir / name).exists()]

    def last_used_s(self, name: str) -> float:
        """When it was asked for last, since the epoch; 0 if never since the daemon began."""
        return self._used_s.get(name, 0.0)

    async def _find_remote(self, name: str) -> Placed | None:
        """The first remote that has it, asked once for all who want to know now.

        Raises:
            RemoteError, CheckpointError: see ``_ask_remotes``.
        """
        if name not in self._lookups:
            self._lookups[name] = asyncio.get_running_loop().create_task(self._ask_remotes(name))
            self._lookups[name].add_done_callback(functools.partial(self._looked_up, name))
        return await asyncio.shield(self._lookups[name])

    def _looked_up(self, name: str, lookup: asyncio.Task[Placed | None]) -> None:
        """What was found is believed for a while; what was not is asked for again."""
        found = not lookup.cancelled() and lookup.exception() is None and lookup.result() is not None
        delay = LOOKUP_S if found else 0.0
        asyncio.get_running_loop().call_later(delay, self._lookups.pop, name, None)

    async def _ask_remotes(self, name: str) -> Placed | None:
        """The first remote that has it; a remote that fails is passed over, unless all that answer lack it."""
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
            raise CheckpointMissing(path, "this is no name of a checkpoint", "see `sllm-vllm list`")
        return path

    def _paths(self) -> list[Path]:
        try:
            return [path for path in sorted(self.repository.root.iterdir()) if not path.name.startswith(".")]
        except OSError:
            return []

    def _open(self, path: Path) -> Checkpoint:
        """Open a checkpoint; its manifest is parsed again only if it changed."""
        try:
            status = (path / MANIFEST_NAME).stat()
        except OSError:
            return open_checkpoint(path)  # says what is wrong
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
