"""A small daemon of the store that does as it is told: which spans, in which order, to keep or not, and when to die.

Real socket, real pool, real protocol, real bytes of a real checkpoint; none of the real daemon's decisions. Slots are
filled once a span and never reused, and lie in the pool the other way round than in the partition.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from sllm_vllm.checkpoint.reader import RankPartition, open_checkpoint
from sllm_vllm.config import REQUEST_NBYTES_MAX
from sllm_vllm.store.channel import PROTOCOL_VERSION, short_address
from sllm_vllm.store.pool import Pool
from sllm_vllm.store.protocol import (
    Answer,
    Failed,
    Find,
    FrameReader,
    Given,
    Hello,
    Leased,
    LeaseOrder,
    RefusedReply,
    Release,
    Request,
    StoreReply,
    StoreWelcome,
    decode_request,
    encode,
)
from tests.support.waiting import DEADLINE_S


@dataclass(frozen=True, slots=True)
class Script:
    """What a daemon does with a lease."""

    order: Sequence[int] | None = None
    keep: Callable[[int], bool] = lambda span: True
    """Whether a span may be kept; only asked for leases that hold."""
    gates: Mapping[int, threading.Event] = field(default_factory=dict)
    """A span is given when its event is set."""
    dies_after: int | None = None
    """Spans given before everything is closed."""
    fails_at: tuple[int, str] | None = None
    """Spans given before ``Failed`` with this error."""
    refuses: str | None = None
    """The error with which every lease is refused."""
    batch: int = 1
    """Spans in one message."""
    transit: int = 1 << 20
    """Spans to be copied that may be unreleased at once."""


class LeaseDaemon:
    """Runs inside its context, one thread a connection. ``released`` and ``leases`` may be looked at at any time."""

    def __init__(
        self, store_dir: Path, script: Script, *, slot_nbytes: int, num_slots: int = 256, found: Path | None = None
    ) -> None:
        self.store_dir = store_dir
        self.script = script
        self.found = found
        self.state_dir = store_dir / ".store"
        self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.pool = Pool(num_slots, slot_nbytes, self.state_dir)
        self.leases: list[LeaseOrder] = []
        self.released: list[int] = []
        self.num_open = 0
        self.changed = threading.Condition()
        self._slots: dict[tuple[str, int], int] = {}
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> Self:
        path = self.state_dir / "socket"
        path.unlink(missing_ok=True)
        with short_address(path) as address:
            self._listener.bind(address)
        self._listener.listen()
        self.start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.die()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        self.pool.close()

    def die(self) -> None:
        """Close everything, as a process that ends; but for the pool, whose memory clients have mapped, too."""
        with self.changed:
            sockets = [self._listener, *self._connections]
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def wait_released(self, spans: Sequence[int]) -> None:
        """Return once exactly these spans were released, each as often as it is named."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.released) >= len(spans), DEADLINE_S), self.released
            assert sorted(self.released) == sorted(spans), self.released

    def wait_idle(self) -> None:
        """Return once no connection is open."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_open == 0, DEADLINE_S), self.num_open

    def slot_bytes(self, span: int) -> bytes:
        """What a span's slot holds; one partition only."""
        (slot,) = [slot for (_, index), slot in self._slots.items() if index == span]
        return bytes(self.pool.slot_view(slot))

    def start(self, target: Callable[[], None]) -> None:
        """Run something until the daemon ends."""
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def chunks_of_spans(self, partition: RankPartition) -> list[range]:
        """The chunks of each span of a partition."""
        per_span = self.pool.slot_nbytes // partition.manifest.chunk_nbytes
        num_chunks = len(partition.record.chunks)
        return [range(first, min(first + per_span, num_chunks)) for first in range(0, num_chunks, per_span)]

    def fill(self, partition: RankPartition, span: int) -> int:
        """The slot that holds a span, read from disk when it is asked for first."""
        with self.changed:
            key = (partition.content_digest, span)
            if key not in self._slots:
                self._slots[key] = self.pool.num_slots - 1 - len(self._slots)
                view = self.pool.slot_view(self._slots[key])
                buffer = memoryview(mmap.mmap(-1, partition.manifest.chunk_nbytes))
                with partition.open() as file:
                    for number, chunk in enumerate(self.chunks_of_spans(partition)[span]):
                        offset, nbytes = partition.chunk_range(chunk)
                        file.read_into(buffer, offset, nbytes)
                        start = number * partition.manifest.chunk_nbytes
                        view[start : start + nbytes] = buffer[:nbytes]
            return self._slots[key]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with self.changed:
                    self._connections.append(connection)
                    self.num_open += 1
                self.start(_Conversation(self, connection).run)


class _Conversation:
    """One connection: the reading thread answers, another gives a lease's spans."""

    def __init__(self, daemon: LeaseDaemon, connection: socket.socket) -> None:
        self._daemon = daemon
        self._connection = connection
        self._sending = threading.Lock()
        self._in_transit: set[int] = set()
        self._is_open = True

    def run(self) -> None:
        frames = FrameReader(REQUEST_NBYTES_MAX)
        with contextlib.suppress(OSError):
            while data := self._connection.recv(1 << 16):
                for body in frames.feed(data):
                    self._handle(decode_request(body))
        with self._daemon.changed:
            self._is_open = False
            self._daemon.num_open -= 1
            self._daemon.changed.notify_all()
        self._connection.close()

    def _handle(self, request: Request) -> None:
        daemon = self._daemon
        if isinstance(request, Hello):
            self._send_welcome()
        elif isinstance(request, Release):
            with daemon.changed:
                daemon.released.extend(request.spans)
                self._in_transit.difference_update(request.spans)
                daemon.changed.notify_all()
        elif isinstance(request, LeaseOrder):
            daemon.leases.append(request)
            self._lease(request)
        elif isinstance(request, Find) and daemon.found is not None:
            self._send(StoreReply(data={"manifest": str(daemon.found), "tier": "remote"}))
        elif isinstance(request, Find):
            self._send(RefusedReply(error="CheckpointMissing", path=request.checkpoint, problem="none", mend="convert"))

    def _send_welcome(self) -> None:
        pool = self._daemon.pool
        welcome = StoreWelcome(
            version=PROTOCOL_VERSION,
            slot_nbytes=pool.slot_nbytes,
            num_slots=pool.num_slots,
            page_nbytes=pool.page_nbytes,
        )
        socket.send_fds(self._connection, [encode(welcome)], [pool.client_fd])

    def _lease(self, request: LeaseOrder) -> None:
        daemon = self._daemon
        if daemon.script.refuses is not None:
            self._send(RefusedReply(error=daemon.script.refuses, path="daemon", problem="no", mend="ask another"))
            return
        path = daemon.store_dir / request.checkpoint  # an absolute path stays what it is
        if not path.exists() and daemon.found is not None:
            path = daemon.found.parent
        partition = open_checkpoint(path).partition(request.rank)
        assert partition.content_digest == request.digest
        per_span = daemon.pool.slot_nbytes // partition.manifest.chunk_nbytes
        num_spans = len(daemon.chunks_of_spans(partition))
        self._send(Leased(token=1, chunks_per_span=per_span, num_spans=num_spans))

        def give() -> None:
            with contextlib.suppress(OSError):
                self._give(request, partition, num_spans)

        daemon.start(give)

    def _give(self, request: LeaseOrder, partition: RankPartition, num_spans: int) -> None:
        script, batch = self._daemon.script, list[tuple[int, int, bool]]()
        order = list(script.order if script.order is not None else range(num_spans))
        for number, span in enumerate(order):
            if script.dies_after == number:
                self._daemon.die()
                return
            if script.fails_at is not None and script.fails_at[0] == number:
                self._send(Failed(token=1, error=script.fails_at[1], path="daemon", problem="bad", mend="mend it"))
                return
            if span in script.gates:
                assert script.gates[span].wait(DEADLINE_S)
            keep = request.hold and script.keep(span)
            self._await_transit(span, keep)
            batch.append((span, self._daemon.fill(partition, span), keep))
            if len(batch) == script.batch or number == len(order) - 1:
                self._send(Given(token=1, spans=tuple(batch)))
                batch.clear()
        if script.dies_after == len(order):
            self._daemon.die()

    def _await_transit(self, span: int, keep: bool) -> None:
        if keep:
            return
        with self._daemon.changed:
            limit = self._daemon.script.transit
            self._daemon.changed.wait_for(lambda: not self._is_open or len(self._in_transit) < limit, DEADLINE_S)
            self._in_transit.add(span)

    def _send(self, answer: Answer) -> None:
        with self._sending:
            self._connection.sendall(encode(answer))


def open_fds() -> set[str]:
    """This process's open descriptors."""
    return set(os.listdir("/proc/self/fd"))
