"""What the agent keeps about a replica beside the core's record: its order, address, key and engine."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from sllm_vllm.node.core.replica import ReplicaRow, State
from sllm_vllm.node.engine import Engine
from sllm_vllm.node.engine_process import EngineProcess
from sllm_vllm.node.ports import PortReservation
from sllm_vllm.node.protocol import ReplicaOrder, ReplicaReport
from sllm_vllm.node.sockets import SocketReservation

_SLUG_MAX = 40


def new_id(model: str, taken: Container[str]) -> str:
    """A new id for a replica of a model: the last part of the model's name and a few random digits."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-._")[:_SLUG_MAX]
    while (replica_id := f"{slug or 'model'}-{secrets.token_hex(2)}") in taken:
        pass
    return replica_id


@dataclass(slots=True)
class ReplicaRecord:
    """One replica. Owned by the agent's loop."""

    order: ReplicaOrder
    api_key: str
    reservation: PortReservation | SocketReservation
    log: Path
    ordered_s: float = field(default_factory=time.monotonic)
    engine: Engine | None = None
    was_ready: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the next change, and then replaced by a new event."""

    @property
    def process(self) -> EngineProcess | None:
        """Its engine's process, once there is one."""
        return self.engine.process if self.engine is not None else None

    def notify(self) -> None:
        """Wake all that wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    def report(self, row: ReplicaRow, *, in_state_s: float) -> ReplicaReport:
        """The replica's report."""
        engine = self.engine
        return ReplicaReport(
            id=row.id,
            model=row.model,
            state=row.state.value,
            reason=row.reason,
            slots=row.slots,
            pid=row.pid,
            status=row.status,
            port=self.reservation.port,
            url=self.reservation.url,
            api_key=self.api_key,
            age_s=time.monotonic() - self.ordered_s,
            in_state_s=in_state_s,
            start=engine.report() if engine is not None else None,
            log=str(self.log),
            tail=tuple(engine.tail) if engine is not None and row.state is State.FAILED else (),
            cause=engine.failure.cause if engine is not None and _ended_by_exception(row) else "",
            labels=self.order.labels,
        )


def _ended_by_exception(row: ReplicaRow) -> bool:
    """Whether it failed with Python's own exit status, or argparse's. The log of a killed one may hold exceptions that
    are not the cause."""
    return row.state is State.FAILED and row.status in {1, 2}
