"""Random numbers that depend on seed and position alone, so that a sampler's state never has to be moved.

vLLM's runner V1 gives a seeded request a generator and draws on from it; V2 hashes seed and position itself. Here V1's
generator is seeded again before each step, so V1 too is a function of the two.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def step_seed(seed: int, position: int) -> int:
    """Seed of the step that samples the token at ``position`` of the sequence (prompt included): 64 bits.

    ``mix(mix(seed) + position)``, where ``mix`` adds the golden ratio and applies SplitMix64's finaliser (Steele, Lea
    and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014). Mixed twice, since the choices of a
    request have seeds that follow one another, as positions do.
    """
    return _mix(_mix(seed & _MASK) + position)


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class PositionGenerator(torch.Generator):
    """A generator that its owner seeds before each step; until it does, a stock one.

    vLLM takes back the draw of a step whose token it discards (a chunk of a prefill) by setting the offset, which a
    generator of the CPU refuses: the engine dies. Nothing has to be taken back here.
    """

    _is_seeded_by_step = False

    @classmethod
    def replacing(cls, stock: torch.Generator) -> PositionGenerator:
        """One that draws what ``stock``, not drawn from yet, would draw."""
        made = cls(device=stock.device)
        made.manual_seed(stock.initial_seed())
        return made

    def get_offset(self) -> int:
        """No draw is counted."""
        return 0 if self._is_seeded_by_step else super().get_offset()

    def set_offset(self, offset: int) -> torch.Generator:
        """Take back nothing."""
        return self if self._is_seeded_by_step else super().set_offset(offset)

    def seed_step(self, seed: int, position: int) -> None:
        """Get ready to sample the token at ``position``."""
        self._is_seeded_by_step = True
        self.manual_seed(step_seed(seed, position))
