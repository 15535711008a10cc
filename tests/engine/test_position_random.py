"""Random numbers of a step: the same for the same seed and position, whatever was drawn before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.engine.position_random import PositionGenerator, step_seed
from tests.support.cases import every_case


def test_the_seed_of_a_step_is_what_is_documented() -> None:
    """Engines with different versions of this package must agree."""
    assert step_seed(0, 0) == 0xA706DD2F4D197E6F  # mix(mix(0)); mix(0) is SplitMix64's first output, 0xE220A8397B1DCDAF
    assert step_seed(5, 7) == step_seed(2**64 + 5, 7) == 0x9DBC62F2A125FA9D
    assert 0 <= step_seed(-1, 7) < 2**64


@given(st.integers(0, 2**63), st.integers(0, 2**20))
def test_neighbours_in_seed_and_position_share_nothing(seed: int, position: int) -> None:
    """The choices of a request have seeds that follow one another."""
    near = {step_seed(seed + i, position + j) for i in range(4) for j in range(4)}
    assert len(near) == 16


def test_a_generator_draws_by_position_alone() -> None:
    first, second = PositionGenerator(), PositionGenerator()
    for position in range(5):
        first.seed_step(3, position)
        torch.rand(position + 1, generator=first)
    first.seed_step(3, 9)
    second.seed_step(3, 9)
    assert torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=second))


def test_taking_back_a_draw_does_not_fail() -> None:
    """Stock vLLM's engine core dies here on the CPU."""
    generator = PositionGenerator(device=torch.device("cpu"))
    generator.seed_step(3, 1)
    generator.set_offset(generator.get_offset() - 4)
    drawn = torch.rand(2, generator=generator)
    generator.seed_step(3, 1)
    assert torch.equal(torch.rand(2, generator=generator), drawn)


@every_case("seed", [0, 3, -1, 2**63 - 1])
def test_until_its_first_step_it_is_the_generator_it_replaced(seed: int) -> None:
    """Nobody seeds it where the runner's hook is refused, or the engine speculates."""
    stock = torch.Generator().manual_seed(seed)
    generator = PositionGenerator.replacing(stock)
    assert torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=stock))
    with pytest.raises(RuntimeError):  # as the stock one's on the CPU
        generator.get_offset()
