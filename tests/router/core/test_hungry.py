"""Who lacks a replica, in order, held against sorting all of them."""

from __future__ import annotations

import random

from sllm_vllm.router.core.facts import ModelSpec, RequestFacts
from sllm_vllm.router.core.queues import SPARE, Hungry, ModelQueues
from tests.support.cases import every_case


@every_case("seed", range(20))
def test_the_order_is_that_of_sorting(seed: int) -> None:
    chance = random.Random(seed)
    queues = ModelQueues(1000)
    hungry = Hungry(queues)
    specs = [ModelSpec(f"m{index}", priority=chance.choice((0, 0, 1))) for index in range(6)]
    inside: set[str] = set()
    for moment in range(200):
        spec = chance.choice(specs)
        match chance.randrange(4):
            case 0:
                queues.push(RequestFacts(f"r{moment}", spec.name), float(moment), spec=spec)
                if spec.name in inside:
                    hungry.add(spec)  # as the core does with every model that something happens to
            case 1:
                queues.pop(spec.name)
            case 2:
                hungry.add(spec)
                inside.add(spec.name)
            case _:
                hungry.discard(spec.name)
                inside.discard(spec.name)
        expected = sorted(
            ((oldest := queues.oldest_s(one.name)) is None, -one.priority, oldest or 0.0, one.name)
            for one in specs
            if one.name in inside
        )
        num_max = chance.randint(1, 6)
        assert hungry.first(num_max) == [name for *_, name in expected][:num_max]
        assert all((spec.name in hungry) == (spec.name in inside) for spec in specs)


def test_what_is_stale_behind_others_is_forgotten() -> None:
    queues = ModelQueues(100)
    hungry = Hungry(queues)
    for index in range(4):
        first = ModelSpec(f"first{index}", priority=10)
        queues.push(RequestFacts(f"f{index}", first.name), 0.0, spec=first)
        hungry.add(first)
    last = ModelSpec("last")
    for moment in range(2000):
        queues.push(RequestFacts(f"r{moment}", last.name), float(moment), spec=last)
        hungry.add(last)
        hungry.first(4)
        queues.pop(last.name)
    assert len(hungry._heap) <= 2 * 5 + SPARE
    assert hungry.first(5)[-1] == "last"
