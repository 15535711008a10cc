"""Random numbers that depend only on seed and position, so that a sampler's state never has to be moved.

vLLM's runner V1 gives each seeded request a generator whose state advances with every draw; V2 hashes seed and position
itself. Here V1's generator is seeded again before each step, so that its draws, too, depend only on these two.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def step_seed(seed: int, position: int) -> int:
    """The 64-bit seed of the step that samples the token at ``position`` of the sequence (prompt included).

    It is ``mix(mix(seed) + position)``, where ``mix`` adds the golden ratio and applies SplitMix64's finaliser (Steele,
    Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014). The seed is mixed before the addition,
    because the choices of a request have consecutive seeds, just as positions are consecutive.
    """
    return _mix(_mix(seed & _MASK) + position)


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class PositionGenerator(torch.Generator):
    """A generator that is seeded before each step; until ``seed_step`` is first called, it acts like a stock one.

    If vLLM discards a step's token (of a chunk of a prefill), it undoes the draw by setting the generator's offset. A
    CPU generator refuses that, and the engine dies. Here nothing has to be undone.
    """

    _is_seeded_by_step = False

    @classmethod
    def replacing(cls, stock: torch.Generator) -> PositionGenerator:
        """A generator that draws what ``stock``, from which nothing was drawn yet, would draw."""
        made = cls(device=stock.device)
        made.manual_seed(stock.initial_seed())
        return made

    def get_offset(self) -> int:
        """The stock offset, or 0 once steps are seeded: draws are not counted then."""
        return 0 if self._is_seeded_by_step else super().get_offset()

    def set_offset(self, offset: int) -> torch.Generator:
        """Set the stock offset; does nothing once steps are seeded."""
        return self if self._is_seeded_by_step else super().set_offset(offset)

    def seed_step(self, seed: int, position: int) -> None:
        """Seed the generator for sampling the token at ``position``."""
        self._is_seeded_by_step = True
        self.manual_seed(step_seed(seed, position))
