"""Moves in the simulated world that come to nothing."""

from __future__ import annotations

from collections.abc import Sequence

from sllm_vllm.router.core.events import Event, FirstByte, MoveFailed, MoveRequest
from sllm_vllm.simulate.policy import Order
from sllm_vllm.simulate.run import End
from sllm_vllm.simulate.world import World
from tests.simulate.scripted import SMALL, Scripted, asked
from tests.simulate.test_world import serving, start
from tests.support.cases import every_case


@every_case("target", ["b", "nobody"])
def test_move_to_an_engine_that_is_not_there_is_told_and_changes_nothing(target: str) -> None:
    inner = serving(start("a"))

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        return [MoveRequest("r0", "a", target)] if isinstance(event, FirstByte) else inner(event, now_s)

    policy = Scripted(answer)
    run = World(SMALL, policy, seed=1, is_validated=True).run([asked(0)])
    assert policy.all_of(MoveFailed) == [MoveFailed("r0", target, "an engine died")]
    assert (run.num_moves, run.outcomes["r0"].end) == (0, End.ANSWERED)
