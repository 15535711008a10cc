"""Measures each hop of the store against the machine's own limit for it, in one run.

Uses plain modules, a real daemon, real files, and real servers on loopback; needs no vLLM. ``python -m
benchmarks.loading`` runs it at its end. Measurements take turns, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.loading.bytecode import environment_of
from benchmarks.loading.plain_checkpoint import NUM_LAYERS
from benchmarks.store.daemon import DaemonFailed
from benchmarks.store.job import StoreJobFailed
from benchmarks.store.memory_hops import disk_shares, memory_shares
from benchmarks.store.setting import StoreSetting
from benchmarks.store.shares import Share

PARTS = ("memory", "disk", "s3", "http", "slow-http")


def run_shares(setting: StoreSetting, parts: Sequence[str] = PARTS) -> list[Share]:
    """Measure part by part. A part that can't be measured (no nginx, no obstore) is reported and left out."""
    shares: list[Share] = []
    for part in parts:
        measure = _measure_of(part)
        try:
            shares += measure(setting)
        except (ImportError, DaemonFailed, StoreJobFailed) as error:
            setting.say(f"{part}: not measured: {error}")
    return shares


def _measure_of(part: str) -> Callable[[StoreSetting], list[Share]]:
    match part:
        case "memory":
            return memory_shares
        case "disk":
            return disk_shares
    from benchmarks.store.remote_hops import http_shares, s3_shares, slow_http_shares

    return {"s3": s3_shares, "http": http_shares, "slow-http": slow_http_shares}[part]


def setting_in(
    workspace: Workspace, *, rounds: int, num_layers: int = NUM_LAYERS, claims_memory: bool = True
) -> StoreSetting:
    """A setting in a benchmark's workspace; its ``say`` prints a line with the seconds since now."""
    scratch, start_s = workspace.run / "shares", time.monotonic()
    scratch.mkdir()
    return StoreSetting(
        scratch=scratch,
        environment=environment_of(workspace),
        rounds=rounds,
        say=lambda text: print(f"[{time.monotonic() - start_s:6.1f} s] {text}", flush=True),
        num_layers=num_layers,
        claims_memory=claims_memory,
    )


def write_lines(lines: Sequence[object], file: Path | None) -> None:
    """Write lines of JSON to a file, or to standard output."""
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    if file is None:
        print(text, end="")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(f"lines of JSON: {file}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=NUM_LAYERS, help="size of the module (default: 13, 1.22 GB)")
    parser.add_argument("--parts", default=",".join(PARTS), help="only these (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON (default: standard output)")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory on the disk to measure")
    parser.add_argument("--memory-as-is", action="store_true", help="don't have a host back free memory beforehand")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: unknown: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if arguments.rounds < 1:
        parser.error("--rounds: give 1 at least")
    if arguments.json is not None:
        arguments.json = arguments.json.resolve()

    def work(workspace: Workspace) -> int:
        setting = setting_in(
            workspace,
            rounds=arguments.rounds,
            num_layers=arguments.layers,
            claims_memory=not arguments.memory_as_is,
        )
        shares = run_shares(setting, arguments.parts.split(","))
        for share in shares:
            print(share.line())
        write_lines([share.as_json() for share in shares], arguments.json)
        return 0

    return run_supervised(work, arguments.cache.resolve())


if __name__ == "__main__":
    raise SystemExit(main())
