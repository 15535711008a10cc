"""A lease on one partition in the store's pool: which spans this process looks at, and its end.

Spans are released one by one, from any thread and from finalisers; the connection, and the lease with it, ends with the
last of them. Nothing else has to keep it alive or to close it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.config import STORE_STATE_DIR, LoaderConfig, default_store_socket
from sllm_vllm.errors import StoreRefused
from sllm_vllm.loader.address_space import AddressSpace, ByteArray
from sllm_vllm.loader.partition_memory import Serial
from sllm_vllm.store.client import StoreClient
from sllm_vllm.store.protocol import Leased

_MEND = "use one version"


@dataclass(frozen=True, slots=True)
class Span:
    """Chunks that lie one behind the other in a slot of the pool. ``keep``: it may be looked at for long."""

    index: int
    slot: int
    keep: bool
    chunks: range


class SpanLease:
    """Owns the connection. One thread receives; the rest is anybody's.

    Raises:
        StoreRefused: what the daemon leases does not fit the partition or its own pool.
    """

    def __init__(self, client: StoreClient, leased: Leased, partition: RankPartition) -> None:
        self._client = client
        self._leased = leased
        self._chunk_nbytes = partition.manifest.chunk_nbytes
        self._num_chunks = len(partition.record.chunks)
        self._serial = Serial()
        self._pid = os.getpid()
        self._held: set[int] = set()
        self._is_receiving = True
        self._pool: AddressSpace | None = None
        self._seen: set[int] = set()
        self.is_closed = False
        self._check_sizes()

    @property
    def num_spans(self) -> int:
        """Spans of the partition."""
        return self._leased.num_spans

    @property
    def span_nbytes(self) -> int:
        """Bytes of a span; the last one may be shorter."""
        return self._leased.chunks_per_span * self._chunk_nbytes

    @property
    def pool_fd(self) -> int:
        """The pool's file, read-only."""
        return self._client.pool_fd

    def slot_offset(self, span: Span) -> int:
        """Where a span's slot begins in the pool's file."""
        return span.slot * self._client.welcome.slot_nbytes

    def next_spans(self) -> list[Span]:
        """Wait for spans. Each has to be released.

        Raises:
            StoreUnavailable, StoreRefused: the daemon ended, or talks nonsense.
            CheckpointError, RemoteError: a span can't be had.
        """
        given = self._client.next_given()
        spans = [self._span(*told) for told in given.spans]
        self._held.update(span.index for span in spans)
        return spans

    def release(self, span: int) -> None:
        """Nobody here looks at a span any more."""
        self._serial.run(partial(self._release, span))

    def end_receiving(self) -> None:
        """Nothing more is wanted: the lease ends when what is held was released."""
        self._serial.run(self._end_receiving)

    def view_pool(self) -> None:
        """Make ``slot_bytes`` possible; once, before threads ask for it."""
        if self._pool is None:
            nbytes = self._client.welcome.num_slots * self._client.welcome.slot_nbytes
            self._pool = AddressSpace(nbytes)
            self._pool.map_file(0, nbytes, fd=self.pool_fd, file_offset=0, shared=True)

    def slot_bytes(self, span: Span) -> ByteArray:
        """The whole slot of a span that is held, in a mapping that must not be written."""
        assert self._pool is not None, "view_pool first"
        return self._pool.array(self.slot_offset(span), self._client.welcome.slot_nbytes)

    def _release(self, span: int) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: the lease is its parent's
        self._held.discard(span)
        if not self.is_closed:
            self._client.release(self._leased.token, (span,))
            self._close_if_done()

    def _end_receiving(self) -> None:
        self._is_receiving = False
        self._close_if_done()

    def _close_if_done(self) -> None:
        if not self._is_receiving and not self._held and not self.is_closed and os.getpid() == self._pid:
            self.is_closed = True
            self._client.close()

    def _span(self, index: int, slot: int, keep: bool) -> Span:
        known = 0 <= index < self.num_spans and 0 <= slot < self._client.welcome.num_slots
        if not known or index in self._seen:
            raise StoreRefused(self._client.path, f"its daemon gives span {index} in slot {slot} out of turn", _MEND)
        self._seen.add(index)
        first = index * self._leased.chunks_per_span
        return Span(index, slot, keep, range(first, min(first + self._leased.chunks_per_span, self._num_chunks)))

    def _check_sizes(self) -> None:
        welcome = self._client.welcome
        fits_slot = self.span_nbytes <= welcome.slot_nbytes
        fits_data = self.num_spans == -(-self._num_chunks // self._leased.chunks_per_span)
        fits_file = 0 < welcome.slot_nbytes * welcome.num_slots <= os.fstat(self.pool_fd).st_size
        if not (fits_slot and fits_data and fits_file):
            raise StoreRefused(self._client.path, "its daemon's lease does not fit the partition", _MEND)


def open_lease(partition: RankPartition, config: LoaderConfig, *, hold: bool) -> SpanLease:
    """Ask the daemon for a partition. With ``hold`` spans may be looked at for as long as they are needed.

    Raises:
        StoreUnavailable, StoreRefused: no daemon, or it will not.
        CheckpointError, RemoteError: it has no such checkpoint.
    """
    client = StoreClient(default_store_socket(config.store_dir))
    try:
        name = _name_of(partition, config)
        leased = client.lease(name, partition.record.rank, partition.content_digest, hold=hold)
        return SpanLease(client, leased, partition)
    except BaseException:
        client.close()
        raise


def _name_of(partition: RankPartition, config: LoaderConfig) -> str:
    """What the daemon calls a checkpoint: its name in the store or at a remote, or its path."""
    directory, store = partition.directory.absolute(), config.store_dir.absolute()
    if directory.parent in (store, store / STORE_STATE_DIR / "remote"):
        return directory.name
    return str(directory)
