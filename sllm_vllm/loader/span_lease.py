"""A lease on one partition in the store's pool: which spans this process uses, and when the lease ends.

Spans are released one by one, from any thread and from finalisers. The release of the last one closes the connection,
which ends the lease. Nothing else has to keep the lease alive or close it.
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
    """Consecutive chunks in one slot of the pool. ``keep``: the slot may be mapped for as long as it is needed."""

    index: int
    slot: int
    keep: bool
    chunks: range


class SpanLease:
    """A lease, and its connection to the daemon. Only one thread receives spans; any thread may release them.

    Raises:
        StoreRefused: the daemon's lease does not match the partition or the daemon's pool.
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
        """Number of spans in the partition."""
        return self._leased.num_spans

    @property
    def span_nbytes(self) -> int:
        """Bytes of a span; the last one may be shorter."""
        return self._leased.chunks_per_span * self._chunk_nbytes

    @property
    def pool_fd(self) -> int:
        """Read-only descriptor of the pool's file."""
        return self._client.pool_fd

    def slot_offset(self, span: Span) -> int:
        """Offset of a span's slot in the pool's file."""
        return span.slot * self._client.welcome.slot_nbytes

    def next_spans(self) -> list[Span]:
        """Wait for spans from the daemon. The caller has to release each of them.

        Raises:
            StoreUnavailable, StoreRefused: the daemon ended, or sent something invalid.
            CheckpointError, RemoteError: the daemon can't provide a span.
        """
        given = self._client.next_given()
        spans = [self._span(*told) for told in given.spans]
        self._held.update(span.index for span in spans)
        return spans

    def release(self, span: int) -> None:
        """Release a span that this process no longer uses."""
        self._serial.run(partial(self._release, span))

    def end_receiving(self) -> None:
        """Stop receiving spans. The lease ends once all held spans are released."""
        self._serial.run(self._end_receiving)

    def view_pool(self) -> None:
        """Map the pool, which ``slot_bytes`` needs. Call it before any thread uses that."""
        if self._pool is None:
            nbytes = self._client.welcome.num_slots * self._client.welcome.slot_nbytes
            self._pool = AddressSpace(nbytes)
            self._pool.map_file(0, nbytes, fd=self.pool_fd, file_offset=0, shared=True)

    def slot_bytes(self, span: Span) -> ByteArray:
        """The whole slot of a held span, in a read-only mapping."""
        assert self._pool is not None, "view_pool first"
        return self._pool.array(self.slot_offset(span), self._client.welcome.slot_nbytes)

    def _release(self, span: int) -> None:
        if os.getpid() != self._pid:
            return  # this is a forked child, and the lease belongs to its parent
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
    """Ask the daemon for a partition.

    Args:
        hold: ask for spans that may be mapped for as long as they are needed.

    Raises:
        StoreUnavailable, StoreRefused: no daemon answers, or it refuses.
        CheckpointError, RemoteError: the daemon can't provide the checkpoint.
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
    """The daemon's name for a checkpoint: its name in the store or at a remote, or its path."""
    directory, store = partition.directory.absolute(), config.store_dir.absolute()
    if directory.parent in (store, store / STORE_STATE_DIR / "remote"):
        return directory.name
    return str(directory)
