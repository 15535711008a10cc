"""Compares the load time of our loader with every stock format of vLLM and with the limits of the machine, in one run.

Each measurement is the whole of vLLM's ``load_model``, in its own process, pinned as vLLM pins its CPU worker. Loaders
take turns, round by round, so that disturbances of the machine affect all alike. *Warm* means that the files are in the
page cache when the clock starts, *cold* that they are not; a virtual machine's host may still have them cached. Free
memory is claimed from such a host beforehand, unless ``--memory-as-is`` is given. All loaders must fill the module with
the same bits, or the run fails.

On a machine without vLLM, ``python -m benchmarks.loading --no-vllm`` fills a plain module and compares our loader with
safetensors' ``load_file``; on a CUDA device it also compares the ways from the store's memory to the device. At the end
each hop of the store is compared with its own limit (``store/hops.py``), unless ``--store row`` or ``no`` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.cached_model import SIZES, ensure_model, weight_files
from benchmarks.common.machine import has_cuda, machine
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.loading.bytecode import environment_of
from benchmarks.loading.formats import PLAIN_REFERENCE, missing, plain_loaders, vllm_loaders
from benchmarks.loading.h2d_ways import WAYS, compare_ways
from benchmarks.loading.job import (
    OURS,
    OURS_RESIDENT,
    REFERENCE,
    Action,
    Answer,
    ChildFailed,
    Job,
    Loader,
    Measurement,
    run_child,
)
from benchmarks.loading.page_cache import Tier
from benchmarks.loading.report import Verdict, limits_as_json, process_alone_s, rows_of, table_of, verdicts_of
from benchmarks.store.daemon import DaemonFailed
from benchmarks.store.device_limits import Limits, measure_limits
from benchmarks.store.hops import run_shares, setting_in
from benchmarks.store.job import StoreJobFailed
from benchmarks.store.setting import StoreSetting
from sllm_vllm.checkpoint.core.manifest import PARTITION_DIR

ROUNDS_MIN = 1
TIERS: tuple[Tier, ...] = ("warm", "cold")
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "auto",
    "VLLM_NO_USAGE_STATS": "1",
}


class BenchFailed(Exception):
    """The run can't continue, or the loaders disagree. The message is written for the user."""


@dataclass(slots=True)
class Bench:
    """One run: its loaders, and what was measured so far."""

    workspace: Workspace
    progress: Progress
    loaders: list[Loader]
    reference: str
    is_plain: bool
    has_cuda: bool
    claims_memory: bool = True
    model: Path = Path()
    environment: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    samples: dict[tuple[str, Tier], list[Measurement]] = field(default_factory=dict)
    limits: list[Limits] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Lines of JSON from outside the rounds: those of the store's hops and the ways to the device."""

    def run(self, rounds: int) -> None:
        """Prepare the loaders, compare their digests, then measure all rounds.

        Raises:
            BenchFailed: our loader or the reference failed, or the loaders disagree.
        """
        self._set_environment()
        self._sort_out()
        self._convert()
        with contextlib.ExitStack() as stack:
            self._make_resident(stack)
            self._compare_digests()
            for number in range(1, rounds + 1):
                self._round(number, rounds)

    def run_store(self, *, rounds: int, ways: Sequence[str]) -> None:
        """Compare each hop of the store with its limit; on a CUDA device, also the ways to it."""
        setting = setting_in(self.workspace, rounds=rounds, claims_memory=self.claims_memory)
        for share in run_shares(setting):
            self.progress.say(share.line())
            self.lines.append(share.as_json())
        if self.has_cuda and self.is_plain:
            try:
                self.lines += compare_ways(setting, ways)
            except (DaemonFailed, StoreJobFailed) as error:
                self.progress.say(f"ways to the device: not measured: {error}")

    def _set_environment(self) -> None:
        """Set the environment that a vLLM worker would get."""
        self.environment = environment_of(self.workspace)
        if self.is_plain:
            return
        self.environment |= VLLM_ENVIRONMENT
        try:
            with self.progress.step("asking vLLM how it pins its worker"):
                pinned = self._child(self._job("worker_environment", self.loaders[0])).environment
        except ChildFailed as error:
            raise BenchFailed(f"vLLM can't be imported: {error} (try --no-vllm)") from None
        self.progress.say(f"worker's environment: {pinned or 'nothing set'}")
        self.environment |= pinned

    def _sort_out(self) -> None:
        for loader in list(self.loaders):
            if reason := missing(loader, has_cuda=self.has_cuda):
                self._drop(loader, reason)
        for needed in (OURS, self.reference):
            if needed not in {loader.name for loader in self.loaders}:
                raise BenchFailed(f"{needed} must take part: {self.unavailable.get(needed, 'it was left out')}")

    def _convert(self) -> None:
        """Write the checkpoints that loaders need; our loader writes its own in its first start."""
        for loader in list(self.loaders):
            if not loader.is_prepared and loader.name != OURS:
                continue
            action: Action = "prepare" if loader.is_prepared else "measure"
            try:
                with self.progress.step(f"{loader.name}: writing its checkpoint"):
                    found = self._child(self._job(action, loader)).measurement
            except ChildFailed as error:
                self._drop(loader, str(error))
                continue
            if found is not None and found.outcome != "converted":
                raise BenchFailed(f"{loader.name}: the first start {found.outcome}, it did not convert")

    def _make_resident(self, stack: contextlib.ExitStack) -> None:
        """Start a daemon that has our checkpoint in memory; it runs until the stack closes."""
        for loader in [loader for loader in self.loaders if loader.needs_store]:
            setting = StoreSetting(
                scratch=self.workspace.run, environment=environment_of(self.workspace), rounds=0, say=self.progress.say
            )
            file = self._partition()
            try:
                with self.progress.step(f"{loader.name}: a daemon, and the checkpoint in its memory"):
                    daemon = stack.enter_context(setting.daemon("store", nbytes=file.stat().st_size))
                    daemon.prefetch_s(file.parent.parent.name)
            except DaemonFailed as error:
                self._drop(loader, str(error))

    def _compare_digests(self) -> None:
        """Compare what every loader fills the module with; nothing is timed. Our loader verifies its checksums here."""
        digests: dict[str, str] = {}
        for loader in list(self.loaders):
            try:
                with self.progress.step(f"{loader.name}: digest of what it fills"):
                    digests[loader.name] = self._child(self._job("digest", loader)).digest
            except ChildFailed as error:
                self._drop(loader, str(error))
        different = [name for name, digest in digests.items() if digest != digests.get(self.reference)]
        if different:
            raise BenchFailed(f"these fill the module with other bits than {self.reference}: {', '.join(different)}")

    def _round(self, number: int, rounds: int) -> None:
        with self.progress.step(f"round {number} of {rounds}: limits of the machine"):
            try:
                self.limits.append(measure_limits(self._partition(), with_cuda=self.has_cuda))
            except OSError as error:
                raise BenchFailed(f"O_DIRECT reads fail ({error}); give a --cache on a disk") from None
        for tier in TIERS:
            for loader in self.loaders:
                with self.progress.step(f"round {number} of {rounds}: {loader.name}, {tier}"):
                    job = self._job("measure", loader, tier=tier, files=self._files(loader))
                    try:
                        found = self._child(job).measurement
                    except ChildFailed as error:
                        raise BenchFailed(f"{loader.name}, {tier}: {error}") from None
                assert found is not None
                if loader.load_format == "sllm" and found.outcome != "loaded":
                    raise BenchFailed(f"{loader.name}, {tier}: {found.outcome} instead of loaded")
                if loader.needs_store and found.source != "store":
                    raise BenchFailed(f"{loader.name}, {tier}: its bytes came from the {found.source}")
                self.samples.setdefault((loader.name, tier), []).append(found)

    def _job(self, action: Action, loader: Loader, *, tier: Tier = "warm", files: Sequence[Path] = ()) -> Job:
        target = self.workspace.run / loader.name if loader.is_prepared else None
        model = target if loader.load_format == "sharded_state" and action != "prepare" else self.model
        return Job(
            action=action,
            loader=loader,
            model=model or self.model,
            tier=tier,
            files=list(files),
            target=target,
            plain=self.is_plain,
            claims_memory=self.claims_memory,
            device="cuda:0" if self.has_cuda else "cpu",
        )

    def _files(self, loader: Loader) -> list[Path]:
        """The files that a loader reads. Our loader also reads samples of the source."""
        source = weight_files(self.model)
        if loader.load_format == "sllm":
            return [*source, self._partition()]
        if loader.is_prepared:
            folder = self.workspace.run / loader.name
            return [*folder.glob("*.safetensors"), *folder.glob("*.tensors")]
        return source

    def _partition(self) -> Path:
        return next((self.workspace.run / "store").glob(f"*/{PARTITION_DIR}/*"))

    def _drop(self, loader: Loader, reason: str) -> None:
        """Continue without a loader, unless the run makes no sense without it."""
        self.loaders.remove(loader)
        self.unavailable[loader.name] = reason
        self.progress.say(f"{loader.name}: not available: {reason}")
        if loader.name in (OURS, self.reference):
            raise BenchFailed(f"{loader.name}: {reason}")

    def _child(self, job: Job) -> Answer:
        return run_child(job, self.workspace.run, self.environment)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's directory (default: a random Llama of --size)")
    parser.add_argument("--size", choices=SIZES, default="2GB", help="size of the random model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements a loader and tier (default: %(default)s)")
    parser.add_argument("--formats", help="only these, separated by commas; ours and the reference always take part")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON (default: standard output)")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for model and checkpoints")
    parser.add_argument(
        "--memory-as-is", action="store_true", help="don't have a virtual machine's host back free memory beforehand"
    )
    parser.add_argument("--no-vllm", action="store_true", help="fill a plain module; vLLM is not needed")
    parser.add_argument(
        "--store", choices=("all", "row", "no"), default="all", help="its loader and its hops, or less (all)"
    )
    parser.add_argument(
        "--h2d", choices=WAYS, action="append", help="a way from the store to a CUDA device, with --no-vllm (all)"
    )
    arguments = parser.parse_args()
    if arguments.rounds < ROUNDS_MIN:
        parser.error(f"--rounds: {arguments.rounds} is too few; give {ROUNDS_MIN} at least")
    if arguments.json is not None:
        arguments.json = arguments.json.resolve()
    return run_supervised(lambda workspace: run_bench(workspace, arguments), arguments.cache.resolve())


def run_bench(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run the benchmark in its workspace; return 1 if it could not be done, else 0, whatever the verdicts."""
    console = Console(soft_wrap=True)
    bench = Bench(
        workspace=workspace,
        progress=Progress(console),
        loaders=plain_loaders(workspace.run) if arguments.no_vllm else vllm_loaders(workspace.run),
        reference=PLAIN_REFERENCE if arguments.no_vllm else REFERENCE,
        is_plain=arguments.no_vllm,
        has_cuda=has_cuda(),
        claims_memory=not arguments.memory_as_is,
    )
    try:
        if arguments.formats:
            bench.loaders = chosen(bench.loaders, arguments.formats.split(","), bench.reference)
        if arguments.store == "no":
            bench.loaders = [loader for loader in bench.loaders if not loader.needs_store]
        bench.model = model_of(bench, arguments)
        bench.run(arguments.rounds)
        if arguments.store == "all":
            bench.run_store(rounds=arguments.rounds, ways=arguments.h2d or WAYS)
    except BenchFailed as error:
        console.print(str(error), style="bold red", markup=False)
        return 1
    tell(bench, console, arguments.json)
    return 0


def model_of(bench: Bench, arguments: argparse.Namespace) -> Path:
    """The model to load; made if necessary."""
    if arguments.model is not None:
        return Path(arguments.model).resolve()
    if bench.is_plain:
        from benchmarks.loading.plain_module import write_plain_model

        with bench.progress.step("writing a plain model of 2 GB"):
            return write_plain_model(bench.workspace.run / "plain")
    with bench.progress.step(f"a random Llama of {arguments.size}, kept in {bench.workspace.cache}"):
        return ensure_model(bench.workspace, arguments.size)


def chosen(loaders: Sequence[Loader], names: Sequence[str], reference: str) -> list[Loader]:
    """The named loaders, our own, and the reference.

    Raises:
        BenchFailed: a name is unknown.
    """
    known = {loader.name for loader in loaders}
    if unknown := [name for name in names if name.strip() not in known]:
        raise BenchFailed(f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    wanted = {OURS, OURS_RESIDENT, reference, *(name.strip() for name in names)}
    return [loader for loader in loaders if loader.name in wanted]


def tell(bench: Bench, console: Console, file: Path | None) -> None:
    """Print the table and the verdicts; write the lines of JSON."""
    rows = rows_of(bench.samples, bench.limits, reference=bench.reference)
    process_s = process_alone_s(bench.samples, tier="cold", reference=bench.reference)
    read_s = statistics.median(limit.best_read_s for limit in bench.limits)
    verdicts: list[Verdict] = []
    if not bench.is_plain:
        verdicts = verdicts_of(rows, read_s=read_s, process_s=process_s, reference=bench.reference)
    limits = limits_as_json(bench.limits, process_s)
    Console(width=max(console.width, 140)).print(table_of(rows))
    for name, reason in bench.unavailable.items():
        console.print(f"{name}: not available: {reason}", style="dim", markup=False, highlight=False)
    console.print(f"limits: {json.dumps(limits)}", markup=False, highlight=False)
    for verdict in verdicts:
        console.print(f"{verdict.name}: {verdict.figures}: {'yes' if verdict.is_met else 'NO'}", highlight=False)
    told = machine(bench.environment, model=bench.model.name, claims_memory=bench.claims_memory)
    lines = [told, limits, *(row.as_json() for row in rows)]
    lines += [{"kind": "unavailable", "loader": name, "reason": why} for name, why in bench.unavailable.items()]
    lines += [verdict.as_json() for verdict in verdicts] + bench.lines
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    if file is None:
        print(text, end="")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        console.print(f"lines of JSON: {file}", markup=False, highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
