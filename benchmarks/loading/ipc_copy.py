"""Copies from the store's pool into a worker's CUDA memory by a separate process that keeps the pool page-locked.

Used by benchmarks only. Registering memory with CUDA takes longer than copying from it once, and a registration is
valid in one process only. A *copier* would therefore keep running: a client of the store with a CUDA context and the
whole pool registered. A worker sends it the addresses of its parameters (as CUDA IPC handles), then, span by span,
which bytes of which slot go where. The worker's own lease holds the spans meanwhile. To measure what this would gain,
the copier here is a child of the worker, not part of the daemon.

Messages are JSON, one per line, over a socket pair; nothing is unpickled. Parameters on the CPU, in tests or because
they are offloaded, are shared by name instead of by handle.
"""

from __future__ import annotations

import base64
import collections
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from sllm_vllm.errors import StoreUnavailable
from sllm_vllm.loader.address_space import AddressSpace
from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.cuda_sink import CudaSink
from sllm_vllm.loader.report import HopCounter
from sllm_vllm.loader.sink import Target
from sllm_vllm.loader.span_lease import Span, SpanLease
from sllm_vllm.store.client import StoreClient

T = TypeVar("T")
BytesCopy = tuple[int, int, int, int]
"""Offset in the pool, index of the target tensor, offset in that tensor, number of bytes."""

_READ_ONLY = 0x08
_STOP_TIMEOUT_S = 10.0
_RECEIVE_NBYTES = 1 << 16


# -------------------------------------------------------------------------------------------------- memory, as JSON


def share_memory(target: torch.Tensor) -> dict[str, Any]:
    """Describe a contiguous uint8 tensor's memory for another process on this machine.

    The tensor must be kept until the other process no longer uses it.
    """
    storage = target.untyped_storage()
    is_cuda = target.device.type == "cuda"
    shared = storage._share_cuda_() if is_cuda else storage._share_filename_cpu_()
    handle = [{"b64": base64.b64encode(part).decode()} if isinstance(part, bytes) else part for part in shared]
    return {"cuda": is_cuda, "handle": handle, "offset": target.storage_offset(), "nbytes": target.numel()}


def open_memory(told: dict[str, Any]) -> torch.Tensor:
    """Open memory that another process described with ``share_memory``."""
    handle = [base64.b64decode(part["b64"]) if isinstance(part, dict) else part for part in told["handle"]]
    kind = torch.UntypedStorage
    storage = kind._new_shared_cuda(*handle) if told["cuda"] else kind._new_shared_filename_cpu(*handle)
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, told["offset"], (told["nbytes"],), (1,))


# ----------------------------------------------------------------------------------------------------- the copier


class Copier:
    """The copier's process: serves one worker until that closes the connection.

    Args:
        pool: the pool's bytes, as a uint8 tensor on the CPU.
    """

    def __init__(self, channel: socket.socket, pool: torch.Tensor, device: torch.device) -> None:
        self._channel = channel
        self._pool = pool
        self._memory: list[torch.Tensor] = []
        self._pending: collections.deque[tuple[int, torch.cuda.Event]] = collections.deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self) -> None:
        """Read and answer messages. While copies run, new messages are handled before waiting for a copy to end."""
        buffer = bytearray()
        while True:
            timeout = 0.0 if self._pending else None
            if not select.select([self._channel], [], [], timeout)[0]:
                number, copied = self._pending.popleft()
                copied.synchronize()
                self._tell({"copied": number})
                continue
            data = self._channel.recv(_RECEIVE_NBYTES)
            if not data:
                return
            buffer += data
            *lines, rest = bytes(buffer).split(b"\n")
            buffer = bytearray(rest)
            for line in lines:
                self._obey(json.loads(line))

    def _obey(self, message: dict[str, Any]) -> None:
        if "bind" in message:
            self._memory = [open_memory(told) for told in message["bind"]]
            self._tell({"bound": len(self._memory)})
        elif "copy" in message:
            self._copy(message["number"], message["copy"])
        else:
            self._memory = []  # release the worker's memory
            self._tell({"ended": True})

    def _copy(self, number: int, copies: Sequence[BytesCopy]) -> None:
        if self._stream is None:
            self._copy_bytes(copies)
            self._tell({"copied": number})
            return
        with torch.cuda.stream(self._stream):
            self._copy_bytes(copies)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        self._pending.append((number, copied))

    def _copy_bytes(self, copies: Sequence[BytesCopy]) -> None:
        for start, index, offset, nbytes in copies:
            target = self._memory[index][offset : offset + nbytes]
            target.copy_(self._pool[start : start + nbytes], non_blocking=True)

    def _tell(self, message: dict[str, Any]) -> None:
        self._channel.sendall(json.dumps(message).encode() + b"\n")


def register_pool(pool: torch.Tensor) -> bool:
    """Page-lock the pool for this process's device, read-only if the driver can. Returns whether it worked."""
    runtime = torch.cuda.cudart()
    flags = (_READ_ONLY, 0)
    return any(int(runtime.cudaHostRegister(pool.data_ptr(), pool.numel(), flag)) == 0 for flag in flags)


def main(channel_fd: int, socket_path: Path, device: torch.device) -> None:
    """The main function of the copier's process."""
    with StoreClient(socket_path) as client, socket.socket(fileno=channel_fd) as channel:
        nbytes = client.welcome.num_slots * client.welcome.slot_nbytes
        space = AddressSpace(nbytes)
        space.map_file(0, nbytes, fd=client.pool_fd, file_offset=0, shared=True)
        pool = torch.from_numpy(space.array(0, nbytes))
        start = time.perf_counter()
        is_registered = device.type == "cuda" and register_pool(pool)
        ready = {"ready": True, "registered": is_registered, "seconds": time.perf_counter() - start}
        channel.sendall(json.dumps(ready).encode() + b"\n")
        Copier(channel, pool, device).run()


# ----------------------------------------------------------------------------------------------------- the worker


class CopierProcess:
    """The worker's side: starts the copier; the end of its context ends it. Any thread may order copies.

    Args:
        socket_path: socket of the store's daemon.

    Raises:
        StoreUnavailable: the copier did not start.
    """

    def __init__(self, socket_path: Path, device: torch.device) -> None:
        self._path = socket_path
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "benchmarks.loading.ipc_copy", str(theirs.fileno()), str(socket_path)]
            self._process = subprocess.Popen([*command, str(device)], pass_fds=[theirs.fileno()])
        self._channel = ours
        self._answers = ours.makefile("rb")
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._number = 0
        self._done: set[int] = set()
        self._other: collections.deque[dict[str, Any]] = collections.deque()
        self._is_lost = False
        self._receiver = threading.Thread(target=self._receive, name="sllm-copier", daemon=True)
        self._receiver.start()
        self.ready = self._wait(lambda: bool(self._other), self._other.popleft)
        """The copier's first message: whether the pool is registered, and how many seconds that took."""

    def bind(self, memory: Sequence[torch.Tensor]) -> None:
        """Set the tensors that copies go to: contiguous uint8 tensors, which must be kept until ``end``."""
        self._send({"bind": [share_memory(target) for target in memory]})
        self._wait(lambda: bool(self._other), self._other.popleft)

    def copy(self, copies: Sequence[BytesCopy]) -> None:
        """Copy; return once all bytes are copied.

        Raises:
            StoreUnavailable: the copier ended.
        """
        with self._changed:
            self._number += 1
            number = self._number
        self._send({"copy": copies, "number": number})
        self._wait(lambda: number in self._done, lambda: self._done.discard(number))

    def end(self) -> None:
        """Make the copier release the tensors given to ``bind``."""
        self._send({"end": True})
        self._wait(lambda: bool(self._other), self._other.popleft)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._channel.shutdown(socket.SHUT_RDWR)
        self._receiver.join()
        self._answers.close()
        self._channel.close()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> None:
        try:
            for line in self._answers:
                answer = json.loads(line)
                with self._changed:
                    if "copied" in answer:
                        self._done.add(answer["copied"])
                    else:
                        self._other.append(answer)
                    self._changed.notify_all()
        except OSError:
            pass  # reported below: `_is_lost` makes every call raise
        with self._changed:
            self._is_lost = True
            self._changed.notify_all()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise self._lost() from None

    def _wait(self, is_there: Callable[[], bool], take: Callable[[], T]) -> T:
        with self._changed:
            self._changed.wait_for(lambda: is_there() or self._is_lost)
            if not is_there():
                raise self._lost()
            return take()

    def _lost(self) -> StoreUnavailable:
        return StoreUnavailable(self._path, "the process that copies to the device ended", "load without h2d=ipc")


class IpcSink(CudaSink):
    """A ``CudaSink`` whose targets a copier fills. Its own buffers are used only if the disk has to take over."""

    def __init__(self, plan: LoadPlan, device: torch.device, *, counter: HopCounter, copier: CopierProcess) -> None:
        super().__init__(plan, device, num_slots=2, counter=counter)
        self._copier = copier
        self._shared = threading.Event()
        self._indices: list[range] = []

    def bind(self, targets: Sequence[Target]) -> None:
        """See ``ChunkSink``. Nothing is copied before the memory is shared, because sharing may move it."""
        self._targets = targets
        memory: list[torch.Tensor] = []
        for tensor in range(len(targets)):
            pieces = self._byte_targets(tensor)
            self._indices.append(range(len(memory), len(memory) + len(pieces)))
            memory += pieces
        self._copier.bind(memory)
        self._shared.set()
        super().bind(targets)

    def copy_from_pool(self, chunk_starts: Sequence[tuple[int, int]]) -> None:
        """Copy chunks, given with their offsets in the pool. Waits until the sink is bound.

        Raises:
            InterruptedError: the sink was stopped.
            StoreUnavailable: the copier ended.
        """
        self._shared.wait()
        self._check_not_stopped()
        self._copier.copy(
            [
                (start + copy.chunk_offset, index, copy.tensor_offset, copy.nbytes)
                for chunk, start in chunk_starts
                for copy in self._plan.copies[chunk]
                for index in self._indices[copy.tensor]
            ]
        )

    def finish(self) -> None:
        """See ``ChunkSink``."""
        self._copier.end()
        super().finish()

    def stop(self) -> None:
        """See ``ChunkSink``."""
        super().stop()
        self._shared.set()


class IpcWay:
    """Implements ``SpanWay``: the copier reads the slots; this process never does."""

    def __init__(self, lease: SpanLease, plan: LoadPlan, sink: IpcSink, *, counter: HopCounter) -> None:
        self._lease = lease
        self._plan = plan
        self._sink = sink
        self._counter = counter

    def map(self, span: Span) -> bool:
        """See ``SpanWay``."""
        return False

    def populate(self, span: Span) -> None:
        """See ``SpanWay``."""

    def copy(self, span: Span, on_chunk: Callable[[int], None]) -> None:
        """See ``SpanWay``."""
        slot, start = self._lease.slot_offset(span), time.perf_counter()
        self._sink.copy_from_pool(
            [(chunk, slot + number * self._plan.chunk_nbytes) for number, chunk in enumerate(span.chunks)]
        )
        nbytes = sum(self._plan.chunk_size(chunk) for chunk in span.chunks)
        self._counter.add("copy", nbytes, start_s=start, end_s=time.perf_counter())
        for chunk in span.chunks:
            on_chunk(chunk)

    def close(self) -> None:
        """See ``SpanWay``."""


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), torch.device(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)
