"""The pipeline: order, bounded window, errors that reach the consumer, and an end without leftovers."""

from __future__ import annotations

import threading
from collections.abc import Sequence, Set

import pytest

from sllm_vllm.loader.pipeline import ChunkPipeline
from sllm_vllm.loader.sink import Target
from tests.support.waiting import DEADLINE_S


class FakeSource:
    """Gives every chunk at once, but ``held`` ones only when released; ``broken`` ones fail."""

    def __init__(self, held: Set[int] = frozenset(), broken: Set[int] = frozenset()) -> None:
        self.begun: list[int] = []
        self.started = threading.Condition()
        self.release = threading.Event()
        self._held = held
        self._broken = broken

    def read(self, chunk: int, buffer: memoryview) -> int:
        with self.started:
            self.begun.append(chunk)
            self.started.notify_all()
        if chunk in self._held:
            assert self.release.wait(DEADLINE_S)
        if chunk in self._broken:
            raise OSError(5, "the device failed")
        return len(buffer)

    def wait_begun(self, count: int) -> None:
        with self.started:
            assert self.started.wait_for(lambda: len(self.begun) >= count, DEADLINE_S)


class FakeSink:
    """Remembers what was delivered."""

    def __init__(self) -> None:
        self.delivered: list[int] = []
        self.stopped = False

    def buffer(self, chunk: int) -> memoryview:
        return memoryview(bytearray(4))

    def deliver(self, chunk: int, buffer: memoryview, nbytes: int) -> None:
        self.delivered.append(chunk)

    def bind(self, targets: Sequence[Target]) -> None: ...

    def attach(self, tensor: int) -> None: ...

    def finish(self) -> None: ...

    def stop(self) -> None:
        self.stopped = True


def test_wait_returns_when_all_chunks_up_to_the_position_are_delivered() -> None:
    source, sink, order = FakeSource(), FakeSink(), [3, 0, 1, 2]
    with ChunkPipeline(source, sink, order, num_threads=2, window=1) as pipeline:
        for position in range(4):
            pipeline.wait(position)
            assert set(order[: position + 1]) <= set(sink.delivered)
    assert sorted(sink.delivered) == [0, 1, 2, 3]


def test_wait_for_a_later_position_holds_until_an_earlier_chunk_has_come() -> None:
    source, sink = FakeSource(held={0}), FakeSink()
    waited = threading.Event()
    with ChunkPipeline(source, sink, [0, 1], num_threads=2, window=2) as pipeline:

        def consume() -> None:
            pipeline.wait(1)
            waited.set()

        consumer = threading.Thread(target=consume)
        consumer.start()
        source.wait_begun(2)
        assert not waited.is_set()
        source.release.set()
        consumer.join(DEADLINE_S)
    assert waited.is_set()


def test_readers_stay_within_the_window() -> None:
    source, sink = FakeSource(), FakeSink()
    with ChunkPipeline(source, sink, range(100), num_threads=4, window=3) as pipeline:
        pipeline.wait(10)
    assert max(source.begun) <= 10 + 3


def test_waiting_beyond_the_window_widens_it() -> None:
    source, sink = FakeSource(), FakeSink()
    with ChunkPipeline(source, sink, range(50), num_threads=1, window=1) as pipeline:
        pipeline.wait(49)
    assert sink.delivered == list(range(50))


def test_an_error_of_a_reader_reaches_the_consumer() -> None:
    source, sink = FakeSource(broken={2}), FakeSink()
    with (
        pytest.raises(OSError, match="the device failed"),
        ChunkPipeline(source, sink, range(10), num_threads=3, window=4) as pipeline,
    ):
        pipeline.wait(9)
    assert sink.stopped


def test_no_thread_is_left_after_an_error_of_the_consumer() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), ChunkPipeline(FakeSource(), FakeSink(), range(9), num_threads=4, window=1):
        raise KeyError
    assert threading.active_count() == before


def test_an_empty_partition_needs_no_thread() -> None:
    with ChunkPipeline(FakeSource(), FakeSink(), [], num_threads=4, window=1) as pipeline:
        pipeline.wait(-1)
