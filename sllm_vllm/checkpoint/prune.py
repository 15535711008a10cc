"""Finds the checkpoints in a store that no engine on this machine can use any more.

Source weights that changed since they were last seen are read to identify them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sllm_vllm.checkpoint.core.manifest import Manifest
from sllm_vllm.checkpoint.fingerprint import is_from_hub, scan_source
from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.checkpoint.source_records import SourceRecords
from sllm_vllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Unused:
    """A checkpoint that can't be used, and the reason on one line."""

    name: str
    nbytes: int
    reason: str


def find_unused(repository: CheckpointRepository, *, vllm_version: str | None) -> list[Unused]:
    """Return the readable checkpoints that can't be used with any model on this machine and the installed vLLM.

    Args:
        vllm_version: the installed version; None if vLLM is not installed, in which case versions are not compared.

    Raises:
        CheckpointUnreadable: the store can't be read.
    """
    sources = _Sources(SourceRecords(repository.root))
    sound = [checkpoint for checkpoint in repository.list() if isinstance(checkpoint, Checkpoint)]
    reasons = [_reason(checkpoint.manifest, sources, vllm_version) for checkpoint in sound]
    return [
        Unused(checkpoint.path.name, checkpoint.manifest.nbytes, reason)
        for checkpoint, reason in zip(sound, reasons, strict=True)
        if reason is not None
    ]


def _reason(manifest: Manifest, sources: _Sources, vllm_version: str | None) -> str | None:
    if vllm_version is not None and _public(manifest.layout.vllm_version) != _public(vllm_version):
        return f"it is for vLLM {manifest.layout.vllm_version}, installed is {vllm_version}"
    if not manifest.source.files:
        return "it was written by an earlier version of sllm-vllm"
    if manifest.source.fingerprint in sources.fingerprints_with(manifest.source.model):
        return None
    if sources.is_here(manifest.source.model):
        return f"{manifest.source.model} has other weights now"
    if is_from_hub(manifest.source.files):
        return None  # an engine finds it by the model's commit alone, and it may be the only copy here
    return f"{manifest.source.model} is not on this machine"


def _public(version: str) -> str:
    """A version without its local part: a build's metadata says 0.32.0+cpu where ``vllm.__version__`` says 0.32.0."""
    return version.partition("+")[0]


class _Sources:
    """The fingerprints of the model directories that were seen on this machine."""

    def __init__(self, records: SourceRecords) -> None:
        self._records = records
        self._known = {directory: self._fingerprint(directory) for directory in records.folders()}

    def fingerprints_with(self, model: str) -> set[str]:
        """Return the fingerprints of all known directories, and of ``model`` too if it is a directory's path."""
        if (directory := Path(model)).is_absolute() and directory not in self._known:
            self._known[directory] = self._fingerprint(directory)
        return {fingerprint for fingerprint in self._known.values() if fingerprint is not None}

    def is_here(self, model: str) -> bool:
        """Whether the model's own directory, or a snapshot of it in a Hub cache, holds weights."""
        names = {str(path) for path in self._present()} | set(self._hub_names())
        return model in names

    def _present(self) -> Iterator[Path]:
        return (directory for directory, fingerprint in self._known.items() if fingerprint is not None)

    def _hub_names(self) -> Iterator[str]:
        for directory in self._present():
            if directory.parent.name == "snapshots":
                yield directory.parent.parent.name.removeprefix("models--").replace("--", "/")

    def _fingerprint(self, directory: Path) -> str | None:
        try:
            files = scan_source(directory)
            found = self._records.known(directory, files) or self._records.identify(directory, files)
        except ConfigError:
            return None
        return found.fingerprint
