"""Where this node's checkpoints are, as reported by its store, or by its disk where no store runs. Blocking: call it in
a thread."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.reader import open_checkpoint
from sllm_vllm.config import NodeConfig, default_store_socket
from sllm_vllm.errors import CheckpointError, StoreError, StoreUnavailable
from sllm_vllm.node.protocol import CheckpointReport
from sllm_vllm.store.channel import send_hint
from sllm_vllm.store.client import StoreClient
from sllm_vllm.store.protocol import Order
from sllm_vllm.store.start_hint import plan_hint

_ASK_S = 5.0
_REPORTS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Residency:
    """Checkpoints with their tiers, and the rates between tiers. ``problem``: why no store reports them; empty if one
    does."""

    checkpoints: tuple[CheckpointReport, ...] = ()
    hops: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    problem: str = ""


def read_residency(config: NodeConfig) -> Residency:
    """The current residency."""
    try:
        with StoreClient(_socket_of(config), timeout_s=_ASK_S) as client:
            facts = client.order(Order(order="status"))
    except StoreUnavailable as error:
        return Residency(checkpoints=_on_disk(config.store_dir), problem=error.problem)
    except StoreError as error:
        return Residency(checkpoints=_on_disk(config.store_dir), problem=str(error))
    hops = {name: {key: entry[key] for key in ("bps", "limit_bps")} for name, entry in facts["hops"].items()}
    return Residency(checkpoints=_by_name(facts["checkpoints"], _on_disk(config.store_dir)), hops=hops)


def prefetch_checkpoint(config: NodeConfig, checkpoint: str) -> None:
    """Have the store read a checkpoint into memory; returns at once.

    Raises:
        SllmError: there is no store, or it can't.
    """
    with StoreClient(_socket_of(config), timeout_s=_ASK_S) as client:
        client.order(Order(order="prefetch", checkpoint=checkpoint))


def hint_store(config: NodeConfig, arguments: Sequence[str]) -> None:
    """Tell the store what a starting engine will load, as a cold engine's plugin does. Never raises.

    Args:
        arguments: of ``vllm serve``, the model first.
    """
    hint = plan_hint(["vllm", "serve", *arguments])
    if hint is not None:
        socket = default_store_socket(Path(hint.store_dir)) if hint.store_dir is not None else _socket_of(config)
        send_hint(socket, hint.model, hint.tensor_parallel_size)


def _socket_of(config: NodeConfig) -> Path:
    return config.store_socket or default_store_socket(config.store_dir)


def _on_disk(store_dir: Path) -> tuple[CheckpointReport, ...]:
    """The usable checkpoints on disk; loading another one reports why it can't be used."""
    found = []
    with contextlib.suppress(OSError):
        for directory in sorted(store_dir.iterdir()):
            with contextlib.suppress(OSError):
                changed_ns = (directory / MANIFEST_NAME).stat().st_mtime_ns
                found.append(_read_report(str(directory), changed_ns))
    return tuple(report for report in found if report is not None)


@functools.lru_cache(_REPORTS_MAX)
def _read_report(directory: str, changed_ns: int) -> CheckpointReport | None:
    """Read a checkpoint's manifest. Cached until the file changes: a large model's manifest has megabytes."""
    try:
        manifest = open_checkpoint(Path(directory)).manifest
    except CheckpointError:
        return None
    return CheckpointReport(
        name=Path(directory).name,
        nbytes=manifest.nbytes,
        resident_nbytes=0,
        tiers=("DISK",),
        model=manifest.source.model,
    )


def _by_name(entries: Sequence[Mapping[str, Any]], on_disk: Sequence[CheckpointReport]) -> tuple[CheckpointReport, ...]:
    """Merge the store's entries, one for each partition, into one for each checkpoint. Models come from manifests on
    disk."""
    models = {report.name: report.model for report in on_disk}
    found: dict[str, CheckpointReport] = {}
    for entry in entries:
        known = found.get(entry["name"])
        found[entry["name"]] = CheckpointReport(
            name=entry["name"],
            nbytes=entry["nbytes"] + (known.nbytes if known else 0),
            resident_nbytes=entry["resident_nbytes"] + (known.resident_nbytes if known else 0),
            tiers=tuple(sorted({*entry["tiers"], *(known.tiers if known else ())})),
            model=models.get(entry["name"], ""),
        )
    return tuple(found.values())
