"""What the store's I/O schedule saves: a cold load beside a large fill and a write-behind, with and without it.

Three cases take turns: *alone*; *paused* (``pause_fills``, the default: fills and writes wait while an engine waits);
*unpaused*. The fill is a prefetch of another cold checkpoint, twice as large; the write-behind writes a checkpoint that
came from a remote. Both are under way when the load's clock starts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.loading.plain_checkpoint import write_plain_checkpoint
from benchmarks.store.daemon import DaemonFailed, StoreDaemon
from benchmarks.store.hops import setting_in, write_lines
from benchmarks.store.job import end_store_job, start_store_job
from benchmarks.store.setting import StoreSetting, data_nbytes, drop_pages, forget_on_disk, load_job
from sllm_vllm.checkpoint.reader import Checkpoint

Case = Literal["alone", "paused", "unpaused"]
CASES: tuple[Case, ...] = ("alone", "paused", "unpaused")
NUM_LAYERS = 6
"""0.60 GB each for the load and the write-behind; the fill is twice that."""
HEAD_START_S = 0.1
"""How long before the load the fill and the write-behind start."""
READY_TIMEOUT_S = 120.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Files:
    """The checkpoints of one store: two cold ones on its disk, and one that only its remote has."""

    loaded: Checkpoint
    filled: Checkpoint
    written: Checkpoint

    @property
    def nbytes(self) -> int:
        """Bytes of all three together."""
        return sum(data_nbytes(each) for each in (self.loaded, self.filled, self.written))


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one case: the seconds that each operation took."""

    case: Case
    load_s: float
    fill_s: float | None = None
    write_s: float | None = None


def run_cases(setting: StoreSetting) -> list[Sample]:
    """Run all rounds. One daemon pauses fills, the other does not; each has its own store with the same files."""
    files = _write_files(setting)
    _link_store(setting.scratch / "pausing", setting.scratch / "not-pausing")
    samples = []
    with contextlib.ExitStack() as stack:
        pausing = stack.enter_context(_daemon(setting, "pausing", files, pauses=True))
        not_pausing = stack.enter_context(_daemon(setting, "not-pausing", files, pauses=False))
        for number in range(1, setting.rounds + 1):
            for case in CASES:
                setting.say(f"round {number} of {setting.rounds}: {case}")
                daemon = not_pausing if case == "unpaused" else pausing
                samples.append(_run_case(setting, daemon, files, case=case))
    return samples


def _write_files(setting: StoreSetting) -> Files:
    setting.say("writing three checkpoints")
    store, remote = setting.scratch / "pausing", setting.scratch / "remote"
    return Files(
        loaded=write_plain_checkpoint(store, "loaded", num_layers=setting.num_layers),
        filled=write_plain_checkpoint(store, "filled", num_layers=2 * setting.num_layers),
        written=write_plain_checkpoint(remote, "written", num_layers=setting.num_layers),
    )


def _link_store(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link, ignore=shutil.ignore_patterns(".*"))


@contextlib.contextmanager
def _daemon(setting: StoreSetting, folder: str, files: Files, *, pauses: bool) -> Iterator[StoreDaemon]:
    remotes = (f"file://{setting.scratch / 'remote'}",)
    with setting.daemon(folder, nbytes=files.nbytes, remotes=remotes, pause_fills=pauses) as daemon:
        yield daemon


def _run_case(setting: StoreSetting, daemon: StoreDaemon, files: Files, *, case: Case) -> Sample:
    store_dir, loaded = daemon.config.store_dir, files.loaded.path.name
    gate, answer = setting.scratch / "gate", setting.scratch / "store-load.json"
    for path in (gate, gate.with_suffix(".ready")):
        path.unlink(missing_ok=True)
    if case != "alone":
        daemon.prefetch_s(files.written.path.name)  # into the pool; a lease makes the daemon write it to disk
    job = load_job(store_dir / loaded, store_dir).model_copy(
        update={"gate": gate, "claims_memory": setting.claims_memory}
    )
    with ThreadPoolExecutor(2) as others:
        process = start_store_job(job, answer, setting.environment)
        _wait_for(gate.with_suffix(".ready"), process.poll)
        drop_pages(files.loaded)
        drop_pages(files.filled)
        fill = write = None
        if case != "alone":
            fill = others.submit(daemon.prefetch_s, files.filled.path.name)
            write = others.submit(_write_behind_s, daemon, files.written)
            time.sleep(HEAD_START_S)
        gate.touch()
        load_s = end_store_job(process, answer).seconds
        sample = Sample(case, load_s, fill.result() if fill else None, write.result() if write else None)
    daemon.wait_idle()
    for checkpoint in (files.loaded, files.filled, files.written):
        daemon.evict(checkpoint.path.name)
    forget_on_disk(store_dir, files.written.path.name)
    return sample


def _write_behind_s(daemon: StoreDaemon, checkpoint: Checkpoint) -> float:
    """Lease a resident checkpoint as an engine would, so that the daemon writes it to disk; returns the seconds until
    then.
    """
    name, start = checkpoint.path.name, time.perf_counter()
    num_written = daemon.log.read_text().count("event=written_behind")
    with daemon.client() as client:
        leased = client.lease(name, 0, checkpoint.partition(0).content_digest, hold=False)
        left = leased.num_spans
        while left:
            spans = tuple(span for span, _, _ in client.next_given(60.0).spans)
            client.release(leased.token, spans)
            left -= len(spans)
    while daemon.log.read_text().count("event=written_behind") == num_written:
        if time.perf_counter() - start > READY_TIMEOUT_S:
            raise DaemonFailed(f"{name}: it was not written behind the load")
        time.sleep(_POLL_S)
    return time.perf_counter() - start


def _wait_for(path: Path, poll: Callable[[], int | None]) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not path.exists() and poll() is None:
        if time.monotonic() > deadline_s:
            raise DaemonFailed("the load was not ready in time")
        time.sleep(_POLL_S)


def summary_of(samples: list[Sample]) -> list[dict[str, Any]]:
    """A line of JSON for each case, and one with the ratios between them."""
    by_case: dict[Case, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_case[sample.case].append(sample)
    load_s = {case: statistics.median(each.load_s for each in found) for case, found in by_case.items()}
    lines: list[dict[str, Any]] = [
        {"kind": "case", "case": case, "load_s": round(load_s[case], 4), "samples": [_rounded(each) for each in found]}
        for case, found in by_case.items()
    ]
    worth = {
        "kind": "worth",
        "paused_over_alone": round(load_s["paused"] / load_s["alone"], 3),
        "unpaused_over_alone": round(load_s["unpaused"] / load_s["alone"], 3),
        "unpaused_over_paused": round(load_s["unpaused"] / load_s["paused"], 3),
    }
    return [*lines, worth]


def _rounded(sample: Sample) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(sample).items() if isinstance(value, float)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each case (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=NUM_LAYERS, help="size of the load (default: 6, 0.60 GB)")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON (default: standard output)")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory on the disk to measure")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: give 1 at least")
    if arguments.json is not None:
        arguments.json = arguments.json.resolve()

    def work(workspace: Workspace) -> int:
        setting = setting_in(workspace, rounds=arguments.rounds, num_layers=arguments.layers, claims_memory=True)
        lines = summary_of(run_cases(setting))
        for line in lines:
            print({key: value for key, value in line.items() if key != "samples"})
        write_lines(lines, arguments.json)
        return 0

    return run_supervised(work, arguments.cache.resolve())


if __name__ == "__main__":
    raise SystemExit(main())
