"""The daemon's status as one plain dictionary, which the command line prints and the metrics are made from."""

from __future__ import annotations

import time
from typing import Any

from sllm_vllm import __version__
from sllm_vllm.store.core.partition import Slot
from sllm_vllm.store.core.schedule import Urgency
from sllm_vllm.store.core.snapshot import Snapshot
from sllm_vllm.store.store import Store

Status = dict[str, Any]


def describe(store: Store, disk_usage: list[tuple[str, int]], *, started_s: float, pid: int, clients: int) -> Status:
    """Return the current status of a store.

    Args:
        disk_usage: name and size in bytes of every checkpoint on disk.
        started_s: when the daemon started, on the monotonic clock.
    """
    now, seen = time.monotonic(), store.cache.snapshot()
    slot_nbytes, counters = store.pool.slot_nbytes, seen.counters
    given = counters.num_hits + counters.num_misses
    return {
        "version": __version__,
        "pid": pid,
        "uptime_s": now - started_s,
        "socket": str(store.config.socket_path),
        "policy": store.config.policy,
        "pool": {
            "slots": store.pool.num_slots,
            "slot_nbytes": slot_nbytes,
            "page_nbytes": store.pool.page_nbytes,
            "free": seen.num_free,
            "filling": seen.num_filling,
            "ready": seen.num_ready,
            "kept": seen.num_kept,
            "pinned": seen.num_pinned,
        },
        "tiers": _tiers(store, disk_usage, num_ready=seen.num_ready),
        "checkpoints": _checkpoints(store, seen, disk_usage, now_s=now),
        "leases": _leases(store, seen, now),
        "hits": counters.num_hits,
        "misses": counters.num_misses,
        "hit_rate": counters.num_hits / given if given else None,
        "evictions": counters.num_evicted,
        "reads_failed": counters.num_failed,
        "clients": clients,
        "nbytes_in_flight": seen.num_filling * slot_nbytes,
        "hops": _hops(store),
        "jobs": _jobs(store),
    }


def _tiers(store: Store, disk_usage: list[tuple[str, int]], *, num_ready: int) -> Status:
    resident = {known.checkpoint for known in store.known.values() if store.cache.residency(known.spec.id).num_resident}
    slot_nbytes = store.pool.slot_nbytes
    return {
        "HOST": {
            "nbytes": num_ready * slot_nbytes,
            "capacity_nbytes": store.pool.num_slots * slot_nbytes,
            "checkpoints": len(resident),
        },
        "DISK": {
            "nbytes": sum(nbytes for _, nbytes in disk_usage),
            "capacity_nbytes": store.config.disk_bytes,
            "checkpoints": len(disk_usage),
        },
        "REMOTE": {"urls": [remote.shown for remote in store.places.remotes]},
    }


def _checkpoints(store: Store, seen: Snapshot, disk_usage: list[tuple[str, int]], *, now_s: float) -> list[Status]:
    """Return one row per known partition, and one per checkpoint on disk that has no known partition."""
    rows, on_disk = [], dict(disk_usage)

    def slots_of(partition: str) -> list[Slot]:
        return list(store.cache.partitions[partition].slots.values())

    for row in seen.partitions:
        known = store.known[row.id]
        nbytes = sum(known.span_nbytes(slot.span) for slot in slots_of(row.id) if slot.is_ready)
        tiers = [("HOST", nbytes), ("DISK", known.file), ("REMOTE", known.remote)]
        rows.append(
            {
                "name": known.checkpoint,
                "rank": known.rank,
                "nbytes": known.spec.nbytes,
                "resident_nbytes": nbytes,
                "tiers": [name for name, has_it in tiers if has_it],
                "pinned": row.is_pinned,
                "uses": row.uses,
                "last_used_s": None if row.last_used_s is None else now_s - row.last_used_s,
            }
        )
    names = {known.checkpoint for known in store.known.values()}
    for name in sorted(on_disk.keys() - names):
        idle = {"resident_nbytes": 0, "tiers": ["DISK"], "pinned": False, "uses": 0, "last_used_s": None}
        rows.append({"name": name, "rank": None, "nbytes": on_disk[name], **idle})
    return sorted(rows, key=lambda row: (row["name"], row["rank"] or 0))


def _leases(store: Store, seen: Snapshot, now_s: float) -> list[Status]:
    rows = []
    for lease in seen.leases:
        record, known = store.leases[lease.token], store.known[lease.partition]
        rows.append(
            {
                "token": lease.token,
                "name": known.checkpoint,
                "rank": known.rank,
                "pid": record.pid,
                "hold": lease.hold,
                "wanted": lease.num_wanted,
                "given": lease.num_given,
                "kept": lease.num_kept,
                "age_s": now_s - record.opened_s,
            }
        )
    return rows


def _hops(store: Store) -> Status:
    calibration = store.calibration
    limits = {"disk": calibration.read_bps, "write": calibration.write_bps} if calibration else {}
    return {
        name: {"nbytes": hop.nbytes, "seconds": hop.seconds, "bps": hop.bps, "limit_bps": limits.get(name)}
        for name, hop in store.meters.items()
    }


def _jobs(store: Store) -> Status:
    names = {Urgency.LOAD: "load", Urgency.FILL: "fill", Urgency.WRITE: "write"}
    jobs = {name: {"queued": 0, "running": 0} for name in names.values()}
    for device in (store.network, *store.devices.values()):
        for urgency, (queued, running) in device.counts().items():
            jobs[names[urgency]]["queued"] += queued
            jobs[names[urgency]]["running"] += running
    return jobs
