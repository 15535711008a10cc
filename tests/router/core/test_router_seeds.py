"""The core through 200 seeds of random traffic and faults: every invariant after every event, nobody waits for ever."""

from __future__ import annotations

from tests.router.core.router_bench import drive
from tests.support.cases import every_case

NUM_STEPS = 150


@every_case("seed", range(200))
def test_a_random_life_keeps_every_invariant_and_serves_or_tells_everybody(seed: int) -> None:
    bench = drive(seed, NUM_STEPS)
    assert bench.books.ended or bench.books.rejected
    assert not bench.books.waiting
    assert not bench.books.running
    assert len(bench.books.ended) + len(bench.books.rejected) == bench.num_requests
