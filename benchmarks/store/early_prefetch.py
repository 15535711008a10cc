"""What the plugin's hint to the daemon saves: real ``vllm serve`` of a cold checkpoint, with and without the hint.

With the hint, the daemon reads the checkpoint while vLLM is still being imported. The two ways take turns, with nothing
of the checkpoint in the page cache. The figure that matters is how long the engine's load waits for the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.common.cached_model import SIZES, ensure_model, weight_files
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.common.vllm_server import ServerFailed, VllmServer
from benchmarks.loading import page_cache
from benchmarks.loading.bytecode import environment_of, warm_up
from benchmarks.loading.formats import vllm_loaders
from benchmarks.loading.job import Job, run_child
from benchmarks.store.daemon import DaemonFailed, StoreDaemon
from benchmarks.store.hops import setting_in, write_lines
from benchmarks.store.setting import StoreSetting
from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository

Hint = Literal["yes", "no"]
HINTS: tuple[Hint, ...] = ("yes", "no")
ENGINE_ARGUMENTS = ("--enforce-eager", "--max-model-len", "512", "--load-format", "sllm")
FOLDER = "store"


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the engine."""

    hint: Hint
    wait_s: float
    """How long the load waited for bytes."""
    total_s: float
    """The whole of ``load_model``."""
    weights_s: float
    healthy_s: float
    """From the start of the process until ``/health`` reports healthy."""
    resident_before: bool
    """Whether the daemon had read the whole checkpoint when the load began, so that nothing was left to read."""


def run_starts(setting: StoreSetting, model: Path) -> list[Start]:
    """Convert the model once, then start the engine round by round."""
    store_dir = setting.scratch / FOLDER
    setting.say("converting the model")
    loader = vllm_loaders(setting.scratch)[0]
    converted = run_child(Job(action="measure", loader=loader, model=model), setting.scratch, dict(setting.environment))
    if converted.measurement is None or converted.measurement.outcome != "converted":
        raise DaemonFailed(f"the model was not converted: {converted}")
    (checkpoint,) = [each for each in CheckpointRepository(store_dir).list() if isinstance(each, Checkpoint)]
    with setting.daemon(FOLDER, nbytes=checkpoint.manifest.nbytes) as daemon:
        starts = []
        for number in range(1, setting.rounds + 1):
            for hint in HINTS:
                setting.say(f"round {number} of {setting.rounds}: hint {hint}")
                starts.append(_start(setting, daemon, model, checkpoint=checkpoint, hint=hint))
    return starts


def _start(setting: StoreSetting, daemon: StoreDaemon, model: Path, *, checkpoint: Checkpoint, hint: Hint) -> Start:
    report = setting.scratch / "report.json"
    extra = json.dumps({"store_dir": str(daemon.config.store_dir), "report_path": str(report)})
    report.unlink(missing_ok=True)
    daemon.evict(checkpoint.path.name)
    page_cache.prepare([checkpoint.partition(0).path], "cold")
    server = VllmServer(
        model,
        [*ENGINE_ARGUMENTS, "--model-loader-extra-config", extra],
        environment=setting.environment,
        log=setting.scratch / "vllm.log",
        command=[sys.executable, "-m", "benchmarks.store.serve_hinting", hint],
    )
    num_hints = _num_hints(daemon)
    with server:
        server.wait_loading()
        is_resident = _is_resident(daemon, checkpoint)
        server.wait_healthy()
        healthy_s = time.monotonic() - server.start_s
    if (_num_hints(daemon) > num_hints) != (hint == "yes"):
        raise ServerFailed(f"hint {hint}: the daemon had {_num_hints(daemon) - num_hints} hints")
    told = json.loads(report.read_text())
    if (told["outcome"], told["source"]) != ("loaded", "store"):
        raise ServerFailed(f"it was {told['outcome']} from {told['source']}, not loaded from the store")
    return Start(
        hint=hint,
        wait_s=told["wait_s"],
        total_s=told["total_s"],
        weights_s=told["weights_s"],
        healthy_s=healthy_s,
        resident_before=is_resident,
    )


def _is_resident(daemon: StoreDaemon, checkpoint: Checkpoint) -> bool:
    """Whether the whole checkpoint is in the pool now."""
    rows = [row for row in daemon.status()["checkpoints"] if row["name"] == checkpoint.path.name]
    return any(row["resident_nbytes"] >= checkpoint.partition(0).record.data_nbytes for row in rows)


def _num_hints(daemon: StoreDaemon) -> int:
    return daemon.log.read_text().count("reason=hint")


def summary_of(starts: Sequence[Start]) -> list[dict[str, Any]]:
    """A line of JSON for each way, with its starts."""
    by_hint: dict[Hint, list[Start]] = defaultdict(list)
    for start in starts:
        by_hint[start.hint].append(start)
    return [
        {
            "kind": "hint",
            "hint": hint,
            **{
                name: round(statistics.median(getattr(start, name) for start in found), 4)
                for name in ("wait_s", "total_s", "weights_s", "healthy_s")
            },
            "resident_before": sum(start.resident_before for start in found),
            "starts": [_rounded(start) for start in found],
        }
        for hint, found in by_hint.items()
    ]


def _rounded(start: Start) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(start).items()}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="starts each way (default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="1.2GB", help="the random model (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON (default: standard output)")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory on the disk to measure")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: give 1 at least")
    if arguments.json is not None:
        arguments.json = arguments.json.resolve()

    def work(workspace: Workspace) -> int:
        setting = setting_in(workspace, rounds=arguments.rounds, num_layers=0, claims_memory=False)
        setting.say(f"a random Llama of {arguments.size}")
        model = ensure_model(workspace, arguments.size)
        page_cache.prepare(weight_files(model), "warm")
        setting.say("importing vLLM once")
        warm_up(environment_of(workspace))
        try:
            starts = run_starts(setting, model)
        except ServerFailed as error:
            kept = shutil.copy(setting.scratch / "vllm.log", workspace.cache / "failed.log")
            print(f"{error}; the server's log: {kept}")
            return 1
        lines = summary_of(starts)
        for line in lines:
            print({key: value for key, value in line.items() if key != "starts"})
        write_lines(lines, arguments.json)
        return 0

    return run_supervised(work, arguments.cache.resolve())


if __name__ == "__main__":
    raise SystemExit(main())
