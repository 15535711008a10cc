"""The decisions of one live migration: rounds of prefill at the target, then the switch or giving up. Pure.

Tokens are moved, not KV (ServerlessLLM, section 5): the target computes the KV of the prompt and the output so far into
its prefix cache while the source keeps generating; the next round covers only the new tokens. ``migration/mover.py``
carries out these decisions.

When to switch. The target's cache holds whole blocks, so the tokens beyond the last whole block are always computed at
the switch, while the client waits. Another round pays if it completes at least one more block, and if the target
computes faster than the source generates; otherwise the remainder never shrinks. If it does not pay, or after
``rounds_max`` rounds, switch. Exception: if the target, at the speed of its rounds, would compute the open block slowly
enough to be noticed, first let the source run to the end of that block, so that one more round completes it. Thus with
a slow target, or one with large blocks, the client waits for a few tokens and not for up to a whole block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

MOVE_ROUNDS_MAX = 6
ROUND_TOKENS_MAX = 2048
UNNOTICED_SHARE = 0.25
"""Computing the open block at the switch goes unnoticed up to this share of the time between two tokens."""
WAITS_MAX = 4
"""How often a source is asked while it runs to the end of a block, so that one that has stalled is not waited for."""


@dataclass(frozen=True, slots=True)
class MigrationLimits:
    """Limits of one migration.

    ``rounds_max``: rounds in which the target catches up. ``round_tokens_max``: most tokens that one prefill computes
    at the target. ``round_pause_s``: pause between two prefills. The last two protect the target's other requests.
    """

    rounds_max: int = MOVE_ROUNDS_MAX
    round_tokens_max: int = ROUND_TOKENS_MAX
    round_pause_s: float = 0.0


# ------------------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class SourceTold:
    """The source's answer: tokens of the prompt, and of the output of each choice that has not ended, at a time."""

    num_prompt: int
    num_outputs: tuple[int, ...]
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Filled:
    """The target has computed a fill, in ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True)
class WentOn:
    """The target has generated its first new token."""


@dataclass(frozen=True, slots=True)
class SideFailed:
    """One side refused, died, or timed out. ``is_lasting``: trying again would give the same result."""

    reason: str
    is_lasting: bool = False


@dataclass(frozen=True, slots=True)
class SourceEnded:
    """The source's answer is complete, or its client left."""


MigrationEvent = SourceTold | Filled | WentOn | SideFailed | SourceEnded

# ----------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class AskSource:
    """Ask the source for the request's token counts, after a pause."""

    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Fill:
    """Have the target compute the first ``num_tokens`` of prompt and output of each open choice, after a pause.

    ``num_new`` of them it has not computed before.
    """

    num_tokens: tuple[int, ...]
    num_new: int
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Switch:
    """Hold the source's stream, ask it once more, and have the target continue from there."""


@dataclass(frozen=True, slots=True)
class TakeOver:
    """From now on the client gets the target's answer; close the source's."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The client keeps the source's answer; close the target's, if any."""

    reason: str
    is_lasting: bool


MigrationAction = AskSource | Fill | Switch | TakeOver | GiveUp


class MigrationPhase(Enum):
    """State of a migration."""

    ASKING = "asking"
    FILLING = "filling"
    SWITCHING = "switching"
    MOVED = "moved"
    ENDED = "ended"
    """Given up, or the source finished first."""


NEXT: Mapping[MigrationPhase, frozenset[MigrationPhase]] = {
    MigrationPhase.ASKING: frozenset({MigrationPhase.FILLING, MigrationPhase.SWITCHING, MigrationPhase.ENDED}),
    MigrationPhase.FILLING: frozenset({MigrationPhase.ASKING, MigrationPhase.FILLING, MigrationPhase.ENDED}),
    MigrationPhase.SWITCHING: frozenset({MigrationPhase.MOVED, MigrationPhase.ENDED}),
    MigrationPhase.MOVED: frozenset(),
    MigrationPhase.ENDED: frozenset(),
}


class Migration:
    """State machine that moves one request from a source to a target: ``begin``, then ``handle`` every event.

    Args:
        block_tokens: block size of the target's KV cache, in tokens.
        model_tokens_max: most tokens that the target takes, prompt and output together.
    """

    def __init__(self, limits: MigrationLimits, *, block_tokens: int, model_tokens_max: int) -> None:
        self.phase = MigrationPhase.ASKING
        self.num_rounds = 0
        self.num_filled = 0
        """Tokens that the target computed in all rounds."""
        self._limits = limits
        self._block_tokens = block_tokens
        self._model_tokens_max = model_tokens_max
        self._num_prompt = 0
        self._goal: tuple[int, ...] = ()
        """Token count that the present round is to reach, by choice; split into fills of ``round_tokens_max``."""
        self._reached: tuple[int, ...] = ()
        self._seen: tuple[int, ...] = ()
        """Token counts of the source when the last round began, by choice."""
        self._num_last = 0
        """Tokens of the last round, in the choice with the most."""
        self._filled_s = 0.0
        """Seconds of all rounds together."""
        self._first: tuple[float, int] | None = None
        """When the source first answered, and the tokens of its first choice then."""
        self._is_waiting = False
        """Whether the source is running to the end of its open block before the next round."""
        self._num_waits = 0

    def begin(self) -> list[MigrationAction]:
        """Return the first actions."""
        return [AskSource()]

    def handle(self, event: MigrationEvent) -> list[MigrationAction]:
        """Process an event and return what to do. Events after the end are ignored."""
        match event:
            case SourceTold() if self.phase is MigrationPhase.ASKING:
                return self._source_told(event)
            case Filled() if self.phase is MigrationPhase.FILLING:
                self._filled_s += event.seconds
                return self._filled()
            case WentOn() if self.phase is MigrationPhase.SWITCHING:
                self._become(MigrationPhase.MOVED)
                return [TakeOver()]
            case SideFailed() if self.phase not in (MigrationPhase.MOVED, MigrationPhase.ENDED):
                self._become(MigrationPhase.ENDED)
                return [GiveUp(event.reason, event.is_lasting)]
            case SourceEnded() if self.phase not in (MigrationPhase.MOVED, MigrationPhase.ENDED):
                self._become(MigrationPhase.ENDED)
                return [GiveUp("its source was done first", is_lasting=False)]
        return []

    def _source_told(self, event: SourceTold) -> list[MigrationAction]:
        if not event.num_outputs:
            self._become(MigrationPhase.ENDED)
            return [GiveUp("every choice has ended", is_lasting=False)]
        totals = tuple(event.num_prompt + num for num in event.num_outputs)
        if max(totals) >= self._model_tokens_max:
            self._become(MigrationPhase.ENDED)
            return [GiveUp(f"{max(totals)} tokens fill the target's context", is_lasting=True)]
        # First round: nothing is computed yet. Later, if a choice has ended: count only the prompt as computed.
        if len(self._reached) != len(totals):
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
            self._is_waiting, self._num_waits = False, WAITS_MAX  # wait only once: the remainder gets no smaller
        self.num_rounds += 1
        self._num_last = max(total - there for total, there in zip(totals, self._reached, strict=True))
        self._goal = self._seen = totals
        return [self._next_fill(0.0)]

    def _pays(self, totals: tuple[int, ...]) -> bool:
        """Whether another round would leave less to compute at the switch."""
        block = self._block_tokens
        pairs = zip(totals, self._reached, strict=True)
        if not any(total // block > there // block for total, there in pairs):
            return False
        grown = max((new - old for new, old in zip(totals, self._seen, strict=True)), default=0) if self._seen else 0
        return not grown or grown < self._num_last or self._is_waiting

    def _switch(self) -> list[MigrationAction]:
        self._become(MigrationPhase.SWITCHING)
        return [Switch()]

    def _wait_for_block_s(self, totals: tuple[int, ...], at_s: float) -> float:
        """Return the seconds until the source should have filled its open block; 0 if waiting is not worth it.

        With several choices, 0: each fills its block at a different time.
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
        self._become(MigrationPhase.ASKING)
        return [AskSource(pause_s)]

    def _next_fill(self, after_s: float) -> Fill:
        self._become(MigrationPhase.FILLING)
        most, before = self._limits.round_tokens_max, self._reached
        self._reached = tuple(min(goal, there + most) for goal, there in zip(self._goal, before, strict=True))
        num_new = self._num_new(before, self._reached)
        self.num_filled += num_new
        return Fill(self._reached, num_new, after_s)

    def _num_new(self, before: tuple[int, ...], after: tuple[int, ...]) -> int:
        """Return the number of tokens to compute; those of the prompt count once for all choices."""
        num_prompt = self._num_prompt
        of_prompt = min(max(after), num_prompt) - min(max(before), num_prompt)
        pairs = zip(before, after, strict=True)
        return of_prompt + sum(max(0, new - max(old, num_prompt)) for old, new in pairs)

    def _become(self, phase: MigrationPhase) -> None:
        assert phase in NEXT[self.phase], f"{self.phase.name} does not become {phase.name}"
        self.phase = phase
