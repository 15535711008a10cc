"""One live migration, as decisions: rounds of prefill at the target, the switch-over, or giving up. Pure.

Tokens are moved, not KV (ServerlessLLM, section 5): the target computes the KV of prompt and output so far into its
prefix cache while the source goes on; the next round has only what is new. ``router/mover.py`` does what is said here.

When to switch. The target's cache holds whole blocks, so whatever was done before, what lies beyond the last whole
block is computed at the switch: while the client waits. Another round pays if it makes one more block whole, and if the
target computes faster than the source generates: else what is left never gets less. Otherwise, and after
``rounds_max``, switch; but where computing what lies in the open block takes the target long enough to be noticed, by
its speed in the rounds, the source is first let run to the end of that block, which one more round makes whole. So a
slow target, or one with large blocks, makes the client wait for a few tokens and not for up to a whole block of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

MOVE_ROUNDS_MAX = 6
ROUND_TOKENS_MAX = 2048
UNNOTICED_SHARE = 0.25
"""Of the time from one token to the next: what the open block may take at the switch, before its end is waited for."""
WAITS_MAX = 4
"""Looks at a source that is let run to the end of a block; one that has stopped is not waited for."""


@dataclass(frozen=True, slots=True)
class MigrationLimits:
    """``rounds_max``: rounds in which the target catches up. ``round_tokens_max``: tokens that one prefill of a round
    computes at the target, at most, and ``round_pause_s``: between two of them; both spare whom else it serves."""

    rounds_max: int = MOVE_ROUNDS_MAX
    round_tokens_max: int = ROUND_TOKENS_MAX
    round_pause_s: float = 0.0


# ------------------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class SourceTold:
    """What the request has at a time: tokens of its prompt, and of each choice's output that has not ended."""

    num_prompt: int
    num_outputs: tuple[int, ...]
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Filled:
    """The target has computed a round, in so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class WentOn:
    """The target generated a token that the source was not asked for."""


@dataclass(frozen=True, slots=True)
class Refused:
    """One side said no, died, or did not answer in time. ``is_lasting``: it would say so again."""

    reason: str
    is_lasting: bool = False


@dataclass(frozen=True, slots=True)
class SourceEnded:
    """The source's answer is complete, or nobody waits for it any more."""


MigrationEvent = SourceTold | Filled | WentOn | Refused | SourceEnded

# ----------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class AskSource:
    """Ask what the request has now, after a pause."""

    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Fill:
    """Have the target compute so many tokens of prompt and output of each open choice, after a pause; ``num_new`` of
    them it has not computed before."""

    num_tokens: tuple[int, ...]
    num_new: int
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Switch:
    """Hold the source's stream, ask it once more, and have the target go on from there."""


@dataclass(frozen=True, slots=True)
class TakeOver:
    """The target's answer is the client's from now on; close the source's."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The source's answer stays the client's; close whatever there is at the target."""

    reason: str
    is_lasting: bool


MigrationAction = AskSource | Fill | Switch | TakeOver | GiveUp


class Phase(Enum):
    """Where a migration is."""

    ASKING = "asking"
    FILLING = "filling"
    SWITCHING = "switching"
    MOVED = "moved"
    ENDED = "ended"
    """Given up, or the source was done first."""


NEXT: Mapping[Phase, frozenset[Phase]] = {
    Phase.ASKING: frozenset({Phase.FILLING, Phase.SWITCHING, Phase.ENDED}),
    Phase.FILLING: frozenset({Phase.ASKING, Phase.FILLING, Phase.ENDED}),
    Phase.SWITCHING: frozenset({Phase.MOVED, Phase.ENDED}),
    Phase.MOVED: frozenset(),
    Phase.ENDED: frozenset(),
}


class Migration:
    """One request on its way from a source to a target: ``begin``, then ``handle`` until it says no more.

    Args:
        block_tokens: of the target's KV cache.
        model_tokens_max: that the target takes, prompt and output together.
    """

    def __init__(self, limits: MigrationLimits, *, block_tokens: int, model_tokens_max: int) -> None:
        self.phase = Phase.ASKING
        self.num_rounds = 0
        self.num_filled = 0
        """Tokens that the target computed for it in all rounds."""
        self._limits = limits
        self._block_tokens = block_tokens
        self._model_tokens_max = model_tokens_max
        self._num_prompt = 0
        self._goal: tuple[int, ...] = ()
        """What a round is to reach, choice by choice; cut into fills of ``round_tokens_max``."""
        self._reached: tuple[int, ...] = ()
        self._seen: tuple[int, ...] = ()
        """What the source had when the last round began."""
        self._num_last = 0
        """Tokens of that round, of the choice with the most."""
        self._filled_s = 0.0
        """All rounds together."""
        self._first: tuple[float, int] | None = None
        """When the source was asked first, and the tokens of its first choice."""
        self._is_waiting = False
        """For the end of the source's block."""
        self._num_waits = 0

    def begin(self) -> list[MigrationAction]:
        """What is to be done first."""
        return [AskSource()]

    def handle(self, event: MigrationEvent) -> list[MigrationAction]:
        """Take note of what happened; returns what is to be done. What comes after the end is passed over."""
        match event:
            case SourceTold() if self.phase is Phase.ASKING:
                return self._source_told(event)
            case Filled() if self.phase is Phase.FILLING:
                self._filled_s += event.seconds
                return self._filled()
            case WentOn() if self.phase is Phase.SWITCHING:
                self._become(Phase.MOVED)
                return [TakeOver()]
            case Refused() if self.phase not in (Phase.MOVED, Phase.ENDED):
                self._become(Phase.ENDED)
                return [GiveUp(event.reason, event.is_lasting)]
            case SourceEnded() if self.phase not in (Phase.MOVED, Phase.ENDED):
                self._become(Phase.ENDED)
                return [GiveUp("its source was done first", is_lasting=False)]
        return []

    def _source_told(self, event: SourceTold) -> list[MigrationAction]:
        if not event.num_outputs:
            self._become(Phase.ENDED)
            return [GiveUp("every choice has ended", is_lasting=False)]
        totals = tuple(event.num_prompt + num for num in event.num_outputs)
        if max(totals) >= self._model_tokens_max:
            self._become(Phase.ENDED)
            return [GiveUp(f"{max(totals)} tokens fill the target's context", is_lasting=True)]
        if len(self._reached) != len(totals):  # the first time, or a choice has ended: then the prompt is there already
            self._reached = (event.num_prompt if self._reached else 0,) * len(totals)
            self._seen = ()
        self._num_prompt = event.num_prompt
        if self._first is None:
            self._first = event.at_s, totals[0]
        if self.num_rounds >= self._limits.rounds_max:
            return self._switch()
        if not self._pays(totals):
            wait_s = self._wait_for_block_s(totals, event.at_s)
            return [AskSource(wait_s)] if wait_s else self._switch()
        if self._is_waiting:
            self._is_waiting, self._num_waits = False, WAITS_MAX  # it is as little as it gets
        self.num_rounds += 1
        self._num_last = max(total - there for total, there in zip(totals, self._reached, strict=True))
        self._goal = self._seen = totals
        return [self._next_fill(0.0)]

    def _pays(self, totals: tuple[int, ...]) -> bool:
        """Whether another round would leave less to be computed at the switch."""
        block = self._block_tokens
        pairs = zip(totals, self._reached, strict=True)
        if not any(total // block > there // block for total, there in pairs):
            return False
        grown = max((new - old for new, old in zip(totals, self._seen, strict=True)), default=0) if self._seen else 0
        return not grown or grown < self._num_last or self._is_waiting

    def _switch(self) -> list[MigrationAction]:
        self._become(Phase.SWITCHING)
        return [Switch()]

    def _wait_for_block_s(self, totals: tuple[int, ...], at_s: float) -> float:
        """Until the source is expected to have filled its open block; 0 if that is not worth it.

        Several choices fill theirs at different times, and are not waited for.
        """
        assert self._first is not None
        (first_s, first), total, there, block = self._first, totals[0], self._reached[0], self._block_tokens
        if len(totals) != 1 or not self.num_filled or total <= first or self._num_waits >= WAITS_MAX:
            return 0.0
        num_open = total - there // block * block
        token_s = (at_s - first_s) / (total - first)
        if num_open >= block or num_open * self._filled_s / self.num_filled <= UNNOTICED_SHARE * token_s:
            return 0.0
        self._is_waiting = True
        self._num_waits += 1
        return (block - total % block) * token_s

    def _filled(self) -> list[MigrationAction]:
        pause_s = self._limits.round_pause_s
        if self._reached != self._goal:
            return [self._next_fill(pause_s)]
        self._become(Phase.ASKING)
        return [AskSource(pause_s)]

    def _next_fill(self, after_s: float) -> Fill:
        self._become(Phase.FILLING)
        most, before = self._limits.round_tokens_max, self._reached
        self._reached = tuple(min(goal, there + most) for goal, there in zip(self._goal, before, strict=True))
        num_new = self._num_new(before, self._reached)
        self.num_filled += num_new
        return Fill(self._reached, num_new, after_s)

    def _num_new(self, before: tuple[int, ...], after: tuple[int, ...]) -> int:
        """Tokens that are computed: those of the prompt once for all choices."""
        num_prompt = self._num_prompt
        of_prompt = min(max(after), num_prompt) - min(max(before), num_prompt)
        pairs = zip(before, after, strict=True)
        return of_prompt + sum(max(0, new - max(old, num_prompt)) for old, new in pairs)

    def _become(self, phase: Phase) -> None:
        assert phase in NEXT[self.phase], f"{self.phase.name} does not become {phase.name}"
        self.phase = phase
