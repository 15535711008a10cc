"""The other end of the daemon's socket: what the loader and the command line talk through. Blocking.

One connection is one conversation, and holds one lease at most. Everything a daemon may do wrong (not be there, be
another version, die in the middle) is one of two errors: ``StoreUnavailable`` means "go on without it",
``StoreRefused`` "it will not, and here is why".
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
    Lease,
    Leased,
    Order,
    Ping,
    ProtocolError,
    Refused,
    Release,
    Reply,
    Request,
    Welcome,
    decode_answer,
    encode,
)

CONNECT_TIMEOUT_S = 5.0
PING_S = 10.0
"""After such a silence the daemon is asked whether it is there; after another one it counts as gone."""
_RECEIVE_NBYTES = 1 << 16
_POLL_S = 1.0
"""How often a thread that waits looks whether another one could not send its releases."""
_RELEASE_MAX = 1000
"""Released spans in one message: a few kilobytes, far below what a socket takes at once."""
_TOLD = (errors.CheckpointError, errors.StoreError, errors.RemoteError)
"""What a daemon may tell of; the classes share one constructor."""


class StoreClient:
    """A connection to the daemon. Any thread may send; one thread at a time may ask or receive.

    Args:
        path: the daemon's socket.
        timeout_s: longest wait for the connection and for each answer that isn't said to take longer.

    Raises:
        StoreUnavailable: nobody answers there. StoreRefused: another version's daemon, or another user's, does.
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
        """Where a checkpoint lies that this machine's disk may lack: ``manifest`` (a file's path) and ``tier``.

        Raises:
            CheckpointMissing, RemoteError: nobody has it. StoreError: see the module.
        """
        return self._ask(Find(checkpoint=checkpoint), timeout_s=60.0)

    def lease(self, checkpoint: str, rank: int, digest: str, *, hold: bool) -> Leased:
        """Ask for a partition; from then on ``next_given`` tells of its spans.

        Raises:
            StoreRefused: the daemon has no such partition, or chunks that are too large for it.
            CheckpointError, RemoteError, StoreUnavailable: see ``errors.py``.
        """
        self._send(Lease(checkpoint=checkpoint, rank=rank, digest=digest, hold=hold))
        answer = self._receive(60.0)
        if not isinstance(answer, Leased):
            raise self._unexpected(answer)
        return answer

    def next_given(self, timeout_s: float | None = None) -> Given:
        """The next spans of the lease; waits for as long as the daemon is alive, unless told otherwise.

        Raises:
            StoreUnavailable: the daemon ended or hangs, or gave nothing in time.
            CheckpointError, RemoteError: a span can't be had.
        """
        answer: Answer | None = self._given.popleft() if self._given else None
        while answer is None or isinstance(answer, Reply):  # to a ping
            answer = self._receive(timeout_s) if timeout_s is not None else self._receive_or_ping()
        if isinstance(answer, Failed):
            raise _error_of(answer)
        if not isinstance(answer, Given):
            raise self._unexpected(answer)
        return answer

    def release(self, token: int, spans: tuple[int, ...]) -> None:
        """Tell that spans are no longer looked at. Never waits: what a busy daemon doesn't take goes out later.

        Safe to call from any thread, but not from within itself (a finaliser may run anywhere). A daemon that has ended
        is not missed.
        """
        with self._sending:
            self._unreleased = (token, (*self._unreleased[1], *spans))
            self._try_release()

    def order(self, order: Order, *, timeout_s: float | None = None) -> dict[str, Any]:
        """An operator's order; the reply's data.

        Raises:
            SllmError: as the daemon says.
        """
        return self._ask(order, timeout_s=timeout_s or self._timeout_s)

    def close(self) -> None:
        """End the connection, and with it the lease. What is mapped stays mapped."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in `next_given`
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
        while not isinstance(answer := self._receive(timeout_s), Reply):
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
            self._send(Ping())  # a daemon that is gone raises here, too
            return self._receive(PING_S)

    def _try_release(self) -> None:
        """Send what is to be released, if the socket takes all of it at once; else a later call does."""
        token, spans = self._unreleased
        if not spans:
            return
        frame = encode(Release(token=token, spans=spans[:_RELEASE_MAX]))
        try:
            sent = os.write(self._socket.fileno(), frame)  # unlike `send`, it does not wait for the timeout
            if sent < len(frame):  # one this small is taken whole or not at all; but a half one would end the lease
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
            except (OSError, ValueError) as error:  # ValueError: closed meanwhile, by another thread
                raise self._gone(error) from None
        return self._inbox.popleft()

    def _wait_readable(self, timeout_s: float | None) -> None:
        """Return when there is something to receive; send what is to be released as soon as that is possible."""
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

    def _expect_welcome(self) -> Welcome:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _RECEIVE_NBYTES, 1)
        except OSError as error:
            raise self._gone(error) from None
        self.pool_fd = fds[0] if fds else -1
        self._take(data)
        answer = self._receive(self._timeout_s)
        if not isinstance(answer, Welcome):
            raise self._unexpected(answer)
        if self.pool_fd < 0:
            raise StoreRefused(self.path, "its daemon sent no memory", "see its log")
        os.set_inheritable(self.pool_fd, False)
        return answer

    def _unexpected(self, answer: Answer) -> SllmError:
        if isinstance(answer, Refused | Failed):
            return _error_of(answer)
        return StoreRefused(self.path, f"its daemon answered {answer.kind!r} out of turn", "use one version")

    def _gone(self, error: OSError | ValueError) -> StoreUnavailable:
        said = getattr(error, "strerror", None) or str(error)
        if isinstance(error, TimeoutError):
            said = "it did not answer in time"
        return StoreUnavailable(self.path, f"no daemon of the store: {said}", MEND_UNAVAILABLE)


def _error_of(told: Failed | Refused) -> SllmError:
    """The exception a daemon told of, if it is one of ours."""
    kind = getattr(errors, told.error, StoreRefused)
    if not (
        isinstance(kind, type) and issubclass(kind, errors.CheckpointError | errors.StoreError | errors.RemoteError)
    ):
        kind = StoreRefused
    return kind(told.path, told.problem, told.mend)
