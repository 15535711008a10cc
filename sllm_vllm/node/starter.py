"""Starts engines' processes: forked from the warm parent where possible, else cold. Knows the node's hardware."""

from __future__ import annotations

import asyncio
import logging

from sllm_vllm.config import NodeConfig, engine_environment, visible_gpus
from sllm_vllm.errors import ConfigError
from sllm_vllm.node.cold_start import serve_command
from sllm_vllm.node.core.events import ReplicaSpec
from sllm_vllm.node.core.launch import (
    Hardware,
    Launch,
    LaunchPolicy,
    Place,
    default_num_slots,
    describe_slot,
    plan_launch,
)
from sllm_vllm.node.engine import Engine
from sllm_vllm.node.engine_process import EngineProcess, start_cold
from sllm_vllm.node.hardware import detect_hardware, pss_nbytes
from sllm_vllm.node.launcher import moving_environment
from sllm_vllm.node.parent_wait import ParentWait
from sllm_vllm.node.protocol import WarmReport
from sllm_vllm.node.residency import hint_store
from sllm_vllm.node.sockets import Scratch
from sllm_vllm.node.warm_order import WarmOrder
from sllm_vllm.node.warm_pool import NotWarm, WarmPool

logger = logging.getLogger(__name__)

_SWITCHED_OFF = "the warm parent is switched off"


class EngineStarter:
    """Hardware, launch policy and warm parent of a node. Lives on the agent's loop; made by ``open_starter``."""

    def __init__(self, config: NodeConfig, hardware: Hardware, policy: LaunchPolicy) -> None:
        self.hardware = hardware
        self.num_slots = policy.num_slots
        self._config = config
        self._policy = policy
        self._scratch = Scratch(config.node_dir)
        self._scratch.clear()
        self._hints: set[asyncio.Task[None]] = set()
        self._pool: WarmPool | None = None
        num_cpus = len(hardware.cpus)
        self._waits = ParentWait(config.imports_path, num_cpus=num_cpus, wait_s_max=config.warm_wait_s)
        if config.warm and config.engine_command is None:
            log = config.node_dir / "warm-parent.log"  # in the log folder a replica could have this name
            environment = _warm_environment(policy, hardware)
            self._pool = WarmPool(environment, log, forks_max=config.forks_max, on_import=self._waits.imported)

    @property
    def parents(self) -> tuple[int, ...]:
        """Pids of present and past warm parents: a process whose fork was not completed is still in their sessions."""
        return tuple(self._pool.parents) if self._pool is not None else ()

    async def start(self, engine: Engine, spec: ReplicaSpec, place: Place, *, directory: str) -> EngineProcess:
        """Start an engine's process for an order, and record it in ``engine``.

        Raises:
            OSError: no process can be started.
        """
        launch = plan_launch(spec, place, hardware=self.hardware, policy=self._policy)
        if "TMPDIR" not in dict(spec.environment):
            engine.scratch = self._scratch.make()
            launch.environment["TMPDIR"] = str(engine.scratch)
        self._hint(launch)
        try:
            process, reason = await self._fork(launch, engine, directory), ""
        except NotWarm as problem:
            reason = str(problem)
            engine.is_beside_import = self._pool is not None and self._pool.importing_s is not None
            command = (*(self._config.engine_command or serve_command()), *launch.arguments)
            process = start_cold(command, launch.environment, engine.pipe.writer, directory=directory, cpus=launch.cpus)
        engine.started(process, reason)
        return process

    async def wait_warm(self, timeout_s: float) -> bool:
        """Wait until there is a warm parent; returns False if there is none within ``timeout_s``, or ever."""
        return self._pool is not None and await self._pool.wait_warm(timeout_s)

    async def report(self, *, with_memory: bool) -> WarmReport:
        """The current state of the warm parent; measuring its memory takes a moment."""
        pool = self._pool
        if pool is None:
            return WarmReport(pid=None, problem=_SWITCHED_OFF, num_forks=0, import_s=None)
        pid = pool.pid
        pss = await asyncio.to_thread(pss_nbytes, pid) if with_memory and pid is not None else None
        return WarmReport(
            pid=pid,
            problem=pool.problem,
            num_forks=pool.num_forks,
            import_s=pool.import_s,
            ready_in_s=self._waits.ready_in_s(pool),
            pss_nbytes=pss,
        )

    def learn(self, engine: Engine) -> None:
        """Learn from an engine that is ready: a cold start's duration predicts the next one's."""
        self._waits.started(engine.report(), is_beside_import=engine.is_beside_import)

    def tidy(self, engine: Engine) -> None:
        """Remove the files that an engine left; called once it is gone."""
        if engine.scratch is not None:
            self._scratch.remove(engine.scratch)

    def describe_slot(self, slot: int) -> str:
        """Describe a slot for users."""
        return describe_slot(slot, self.hardware, self._policy)

    async def close(self) -> None:
        """End the warm parent."""
        if self._pool is not None:
            await self._pool.close()
        await asyncio.gather(*self._hints, return_exceptions=True)

    async def _fork(self, launch: Launch, engine: Engine, directory: str) -> EngineProcess:
        if self._pool is None:
            raise NotWarm(_SWITCHED_OFF)
        if launch.cold_reason:
            raise NotWarm(launch.cold_reason)
        order = WarmOrder(
            number=0,
            arguments=launch.arguments,
            environment=launch.environment,
            directory=directory,
            cpus=launch.cpus,
            num_threads=launch.num_threads,
        )
        await self._waits.wait(self._pool, engine)
        try:
            return await self._pool.fork(order, engine.pipe.writer)
        except NotWarm:  # the parent was dropped meanwhile, and another one is importing
            await self._waits.wait(self._pool, engine)
            return await self._pool.fork(order, engine.pipe.writer)

    def _hint(self, launch: Launch) -> None:
        """Have the store begin to read, while the engine starts."""
        task = asyncio.get_running_loop().create_task(asyncio.to_thread(hint_store, self._config, launch.arguments))
        self._hints.add(task)
        task.add_done_callback(self._hints.discard)


async def open_starter(config: NodeConfig) -> EngineStarter:
    """Detect the hardware, and let the warm parent import.

    Raises:
        ConfigError: a GPU that was named is not there, or more slots are wanted than there are GPUs.
    """
    environment = engine_environment(config.secret_variables, SLLM_STORE_DIR=str(config.store_dir))
    hardware = await asyncio.to_thread(
        detect_hardware, config.gpus, config.memory_bytes, visible_gpus(), environment=environment
    )
    num_slots = config.slots or default_num_slots(hardware)
    if hardware.gpus and num_slots > len(hardware.gpus) and config.ray_address is None:
        raise ConfigError(f"{num_slots} slots are configured, but there are {len(hardware.gpus)} GPUs")
    if config.store_socket is not None:
        environment["SLLM_STORE_SOCKET"] = str(config.store_socket)
    if config.migration:
        environment |= moving_environment(environment)
    policy = LaunchPolicy(
        num_slots=num_slots,
        kv_nbytes=config.kv_bytes,
        pin=config.pin,
        load_format=config.load_format,
        ray_address=config.ray_address,
        environment=environment,
    )
    return EngineStarter(config, hardware, policy)


def _warm_environment(policy: LaunchPolicy, hardware: Hardware) -> dict[str, str]:
    """The environment in which vLLM is imported."""
    fixed = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if not hardware.gpus:
        fixed["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return {**policy.environment, **fixed}
