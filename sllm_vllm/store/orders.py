"""Handles requests of operators and starting engines other than leases. Runs on the daemon's event loop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.writer import write_file_durably
from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.errors import SllmError, StoreRefused
from sllm_vllm.store.core.events import PrefetchEnded
from sllm_vllm.store.places import Placed
from sllm_vllm.store.protocol import Find, Hint, Order, StoreReply
from sllm_vllm.store.status import Status, describe
from sllm_vllm.store.store import Store
from sllm_vllm.store.write_behind import WriteBehind

logger = logging.getLogger(__name__)

_PINS = "pins.json"
PINS_MAX = 10_000
PINS_NBYTES_MAX = 16 << 20


class Orders:
    """Carries out orders.

    Args:
        stop: stops the daemon.
        num_clients: returns the number of open connections.
        problem: returns which of the daemon's loops are failing, if any.
    """

    def __init__(
        self, store: Store, *, stop: Callable[[], None], num_clients: Callable[[], int], problem: Callable[[], str]
    ) -> None:
        self._store = store
        self._stop = stop
        self._num_clients = num_clients
        self._problem = problem
        self._started_s = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._write_behind = WriteBehind(store)
        self._pinned: set[str] = set()
        self._writing_pins = asyncio.Lock()

    async def start(self) -> None:
        """Restore the pins that were saved before the daemon was restarted."""
        for name in await asyncio.to_thread(self._read_pins):
            self._in_background(self._pin(name), f"pin {name}")

    async def close(self) -> None:
        """Cancel all background tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._write_behind.close()

    async def find(self, request: Find) -> StoreReply:
        """Find a checkpoint and return the path of its manifest and its tier.

        Raises:
            CheckpointError, RemoteError: neither the disk nor a remote has it, or it can't be used.
        """
        placed = await self._store.places.find(request.checkpoint)
        tier = "DISK" if placed.is_on_disk else "REMOTE"
        return StoreReply(data={"manifest": str(placed.checkpoint.path / MANIFEST_NAME), "tier": tier})

    async def carry_out(self, order: Order) -> StoreReply:
        """Carry out an operator's order.

        Raises:
            SllmError: the order can't be carried out.
        """
        if order.order == "status":
            return StoreReply(data=await self.status())
        if order.order == "stop":
            asyncio.get_running_loop().call_soon(self._stop)
            return StoreReply(data={"pid": os.getpid()})
        if order.checkpoint is None:
            problem = f"{order.order} needs the name of a checkpoint"
            raise StoreRefused(self._store.config.socket_path, problem, "see `sllm-vllm list`")
        placed = await self._store.places.find(order.checkpoint)
        match order.order:
            case "prefetch":
                return StoreReply(data=await self._prefetch(placed, wait=order.wait))
            case "evict":
                remaining = await self._store.evict(placed)
                await self._remember_pin(placed.name, pinned=False)
                return StoreReply(data={"remaining_spans": remaining})
            case "pin":
                await self._store.pin(placed, pinned=True)
                await self._remember_pin(placed.name, pinned=True)
                return StoreReply(data=await self._prefetch(placed, wait=order.wait))
            case _:
                await self._store.pin(placed, pinned=False)
                await self._remember_pin(placed.name, pinned=False)
                return StoreReply()

    async def status(self) -> Status:
        """Return the daemon's status; see ``status.py``."""
        usage = await asyncio.to_thread(self._store.places.disk_usage)
        told = describe(self._store, usage, started_s=self._started_s, pid=os.getpid(), clients=self._num_clients())
        return {**told, "problem": self._problem()}

    def hint(self, hint: Hint) -> None:
        """Start prefetching the checkpoint that a starting vLLM process will load, if one is on disk for its model."""
        self._in_background(self._follow(hint), f"hint {hint.model}")

    def lease_opened(self, placed: Placed) -> None:
        """Start the write-behind if a checkpoint that is being loaded is only at a remote."""
        if not placed.is_on_disk and placed.remote is not None:
            self._write_behind.start(placed)

    async def _follow(self, hint: Hint) -> None:
        places = self._store.places
        names = await asyncio.to_thread(places.names_for_model, hint.model, hint.tensor_parallel_size)
        if names:
            logger.info("event=prefetch reason=hint checkpoint=%s", names[0])
            await self._store.prefetch(await places.find(names[0]))

    async def _prefetch(self, placed: Placed, *, wait: bool) -> dict[str, Any]:
        futures = await self._store.prefetch(placed)
        if not wait:
            return {"ranks": len(futures)}
        ended: list[PrefetchEnded] = await asyncio.gather(*futures)
        for end in ended:
            if isinstance(end.error, SllmError):
                raise end.error
        spans = [
            len(self._store.known[end.partition].spec.order) for end in ended if end.partition in self._store.known
        ]
        resident = sum(end.num_resident for end in ended)
        return {"ranks": len(futures), "resident_spans": resident, "spans": sum(spans)}

    async def _pin(self, name: str) -> None:
        placed = await self._store.places.find(name)
        await self._store.pin(placed, pinned=True)
        self._pinned.add(name)
        await self._prefetch(placed, wait=False)

    async def _remember_pin(self, name: str, *, pinned: bool) -> None:
        (self._pinned.add if pinned else self._pinned.discard)(name)
        async with self._writing_pins:
            content = json.dumps(sorted(self._pinned)).encode()
            try:
                await asyncio.to_thread(write_file_durably, self._store.config.state_dir / _PINS, content)
            except OSError as error:
                logger.warning("event=pins_not_written reason=%s", error)

    def _read_pins(self) -> list[str]:
        try:
            found = json.loads(read_plain(self._store.config.state_dir / _PINS, PINS_NBYTES_MAX))
        except (OSError, ValueError, RecursionError):
            return []
        return [name for name in found if isinstance(name, str)][:PINS_MAX] if isinstance(found, list) else []

    def _in_background(self, work: Coroutine[Any, Any, None], what: str) -> None:
        async def run() -> None:
            try:
                await work
            except SllmError as error:
                logger.warning("event=not_done what=%r reason=%s", what, error)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
