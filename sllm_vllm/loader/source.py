"""Sources of chunks; today only the disk. A source is used by several threads at once."""

from __future__ import annotations

import time
from typing import Protocol

from sllm_vllm.checkpoint.chunk_file import ChunkFile
from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.errors import CheckpointUnreadable
from sllm_vllm.loader.report import HopCounter


class ChunkSource(Protocol):
    """Provides the chunks of one partition. Thread-safe."""

    def read(self, chunk: int, buffer: memoryview) -> int:
        """Read a chunk into the page-aligned ``buffer``, and verify it if the source does that.

        Returns:
            Number of bytes.

        Raises:
            CheckpointCorrupt: the bytes differ from those that were written.
            CheckpointUnreadable: the device failed.
        """
        ...


class DiskSource:
    """Reads chunks from the partition's file in this process, without a daemon."""

    def __init__(self, partition: RankPartition, file: ChunkFile, *, verify: bool, counter: HopCounter) -> None:
        self._partition = partition
        self._file = file
        self._verify = verify
        self._counter = counter

    def read(self, chunk: int, buffer: memoryview) -> int:
        """See ``ChunkSource``."""
        offset, nbytes = self._partition.chunk_range(chunk)
        start = time.perf_counter()
        try:
            tier = self._file.read_into(buffer, offset, nbytes)
        except OSError as error:
            problem = f"chunk {chunk} can't be read ({error.strerror})"
            raise CheckpointUnreadable(
                self._file.path, problem, "mend the device, or remove and convert again"
            ) from None
        read = time.perf_counter()
        self._counter.add("read_disk" if tier == "disk" else "read_cache", nbytes, start_s=start, end_s=read)
        if self._verify:
            self._partition.check_chunk(chunk, buffer[:nbytes])
            self._counter.add("verify", nbytes, start_s=read, end_s=time.perf_counter())
        return nbytes
