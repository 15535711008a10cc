"""The client of the daemon's socket, used by the loader and the command line. Blocking.

A connection handles one request at a time and holds at most one lease. All failures of a daemon (it is not running, has
another version, dies meanwhile) raise one of two errors: ``StoreUnavailable`` means "continue without it",
``StoreRefused`` means "the daemon refuses, for this reason".
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sllm_vllm import errors
from sllm_vllm.config import REPLY_NBYTES_MAX
from sllm_vllm.errors import SllmError, StoreRefused, StoreUnavailable
from sllm_vllm.store.channel import MEND_UNAVAILABLE, PROTOCOL_VERSION, connect_to
from sllm_vllm.store.protocol import (
    Answer,
    Failed,
    Find,
    FrameReader,
    Given,
    Hello,
    Leased,
    LeaseOrder,
    Order,
    Ping,
    ProtocolError,
    RefusedReply,
    Release,
    Request,
    StoreReply,
    StoreWelcome,
    decode_answer,
    encode,
)

CONNECT_TIMEOUT_S = 5.0
PING_S = 10.0
"""After this long without a message the client sends a ping; after the same time again the daemon counts as dead."""
_RECEIVE_NBYTES = 1 << 16
_POLL_S = 1.0
"""How often a waiting thread checks whether another thread left releases unsent."""
_RELEASE_MAX = 1000
"""Most released spans in one message: a few kilobytes, far less than a socket's buffer takes at once."""
_TOLD = (errors.CheckpointError, errors.StoreError, errors.RemoteError)
"""The errors that a daemon may report; all these classes share one constructor."""


class StoreClient:
    """A connection to the daemon. Any thread may release spans; only one thread at a time may do anything else.

    Args:
        path: the daemon's socket.
        timeout_s: timeout for connecting, and for each answer unless a method has its own timeout.

    Raises:
        StoreUnavailable: no daemon answers. StoreRefused: the daemon is of another version or another user.
    """

    def __init__(self, path: Path, *, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self.path = path
        self.pool_fd = -1
        self._timeout_s = timeout_s
        self._frames = FrameReader(REPLY_NBYTES_MAX)
        self._inbox: collections.deque[Answer] = collections.deque()
        self._given: collections.deque[Given | Failed] = collections.deque()
        self._sending = threading.Lock()
        self._unreleased: tuple[int, tuple[int, ...]] = (0, ())
        self._socket = connect_to(path, timeout_s)
        try:
            self._send(Hello(version=PROTOCOL_VERSION))
            self.welcome = self._expect_welcome()
        except BaseException:
            self.close()
            raise

    def find(self, checkpoint: str) -> dict[str, Any]:
        """Find a checkpoint on disk or at a remote. Returns ``manifest`` (a file's path) and ``tier``.

        Raises:
            CheckpointMissing, RemoteError: neither the disk nor a remote has it. StoreError: see the module docstring.
        """
        return self._ask(Find(checkpoint=checkpoint), timeout_s=60.0)

    def lease(self, checkpoint: str, rank: int, digest: str, *, hold: bool) -> Leased:
        """Request a partition. Afterwards ``next_given`` returns its spans.

        Raises:
            StoreRefused: the partition's chunks are too large for the daemon's slots.
            CheckpointError, RemoteError, StoreUnavailable: see ``errors.py``.
        """
        self._send(LeaseOrder(checkpoint=checkpoint, rank=rank, digest=digest, hold=hold))
        answer = self._receive(60.0)
        if not isinstance(answer, Leased):
            raise self._unexpected(answer)
        return answer

    def next_given(self, timeout_s: float | None = None) -> Given:
        """Return the next spans of the lease. Without ``timeout_s``, waits as long as the daemon is alive.

        Raises:
            StoreUnavailable: the daemon ended, hangs, or gave nothing within ``timeout_s``.
            CheckpointError, RemoteError: a span can't be read.
        """
        answer: Answer | None = self._given.popleft() if self._given else None
        while answer is None or isinstance(answer, StoreReply):  # a StoreReply answers a ping
            answer = self._receive(timeout_s) if timeout_s is not None else self._receive_or_ping()
        if isinstance(answer, Failed):
            raise _error_of(answer)
        if not isinstance(answer, Given):
            raise self._unexpected(answer)
        return answer

    def release(self, token: int, spans: tuple[int, ...]) -> None:
        """Release spans. Never waits: releases that a busy daemon does not accept at once are sent later.

        Any thread may call it, but it is not reentrant: a finalizer that runs during a call must not call it. Does
        nothing if the daemon has ended.
        """
        with self._sending:
            self._unreleased = (token, (*self._unreleased[1], *spans))
            self._try_release()

    def order(self, order: Order, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Send an operator's order. Returns the reply's data.

        Raises:
            SllmError: the error that the daemon reported.
        """
        return self._ask(order, timeout_s=timeout_s or self._timeout_s)

    def close(self) -> None:
        """Close the connection, which ends its lease. Existing mappings of the pool stay."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that is waiting in `next_given`
        self._socket.close()
        if self.pool_fd >= 0:
            os.close(self.pool_fd)
            self.pool_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _ask(self, request: Request, *, timeout_s: float) -> dict[str, Any]:
        self._send(request)
        while not isinstance(answer := self._receive(timeout_s), StoreReply):
            if not isinstance(answer, Given | Failed):
                raise self._unexpected(answer)
            self._given.append(answer)
        return answer.data

    def _send(self, message: Request) -> None:
        try:
            with self._sending:
                self._socket.sendall(encode(message))
        except OSError as error:
            raise self._gone(error) from None

    def _receive_or_ping(self) -> Answer:
        try:
            return self._receive(PING_S)
        except StoreUnavailable:
            self._send(Ping())  # raises if the daemon has ended
            return self._receive(PING_S)

    def _try_release(self) -> None:
        """Send pending releases if the socket accepts them at once; otherwise they stay pending for a later call."""
        token, spans = self._unreleased
        if not spans:
            return
        frame = encode(Release(token=token, spans=spans[:_RELEASE_MAX]))
        try:
            sent = os.write(self._socket.fileno(), frame)  # unlike `send`, does not wait until the timeout
            if sent < len(frame):  # unlikely for so small a frame; but half a frame would break the connection
                self._socket.sendall(frame[sent:])
        except BlockingIOError:
            return
        except OSError:
            self._unreleased = (token, ())
            return
        self._unreleased = (token, spans[_RELEASE_MAX:])

    def _receive(self, timeout_s: float | None) -> Answer:
        while not self._inbox:
            try:
                self._wait_readable(timeout_s)
                self._take(self._socket.recv(_RECEIVE_NBYTES))
            except (OSError, ValueError) as error:  # ValueError: another thread closed the socket meanwhile
                raise self._gone(error) from None
        return self._inbox.popleft()

    def _wait_readable(self, timeout_s: float | None) -> None:
        """Wait until there is something to receive, and send pending releases as soon as the socket accepts them."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poll = select.poll()
        while deadline is None or time.monotonic() < deadline:
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unreleased[1] else 0))
            left_s = _POLL_S if deadline is None else min(_POLL_S, deadline - time.monotonic())
            found = sum(events for _, events in poll.poll(max(0.0, left_s) * 1e3))
            if found & select.POLLOUT:
                with self._sending:
                    self._try_release()
            if found & ~select.POLLOUT:
                return
        raise TimeoutError

    def _take(self, data: bytes) -> None:
        if not data:
            raise StoreUnavailable(self.path, "the daemon ended the connection", MEND_UNAVAILABLE)
        try:
            self._inbox.extend(decode_answer(body) for body in self._frames.feed(data))
        except ProtocolError as error:
            raise StoreRefused(self.path, f"its daemon can't be understood: {error}", "use one version") from None

    def _expect_welcome(self) -> StoreWelcome:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _RECEIVE_NBYTES, 1)
        except OSError as error:
            raise self._gone(error) from None
        self.pool_fd = fds[0] if fds else -1
        self._take(data)
        answer = self._receive(self._timeout_s)
        if not isinstance(answer, StoreWelcome):
            raise self._unexpected(answer)
        if self.pool_fd < 0:
            raise StoreRefused(self.path, "its daemon sent no memory", "see its log")
        os.set_inheritable(self.pool_fd, False)
        return answer

    def _unexpected(self, answer: Answer) -> SllmError:
        if isinstance(answer, RefusedReply | Failed):
            return _error_of(answer)
        return StoreRefused(self.path, f"its daemon answered {answer.kind!r} out of turn", "use one version")

    def _gone(self, error: OSError | ValueError) -> StoreUnavailable:
        said = getattr(error, "strerror", None) or str(error)
        if isinstance(error, TimeoutError):
            said = "it did not answer in time"
        return StoreUnavailable(self.path, f"no daemon of the store: {said}", MEND_UNAVAILABLE)


def _error_of(told: Failed | RefusedReply) -> SllmError:
    """Make the exception that a daemon reported; ``StoreRefused`` if its class is unknown."""
    kind = getattr(errors, told.error, StoreRefused)
    if not (
        isinstance(kind, type) and issubclass(kind, errors.CheckpointError | errors.StoreError | errors.RemoteError)
    ):
        kind = StoreRefused
    return kind(told.path, told.problem, told.mend)
