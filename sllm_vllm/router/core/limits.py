"""Bounds of the core's work and memory, and the times it keeps. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """How many nodes are looked at for a start (``plans_max``), how many models that lack slots are tried after each
    event (``hungry_max``); how long the oldest request waits before nobody who waits may overtake it and busy
    replicas are drained for it (``starve_s``); how long before its likely arrival a model is prefetched
    (``prefetch_s``). Between what a start's timeout is where its model sets none (``start_s_least``, ``start_s_most``).
    What names of replicas end with (``name_suffix``), so that no two routers of a cluster give one
    twice."""

    plans_max: int = 8
    hungry_max: int = 4
    starve_s: float = 30.0
    prefetch_s: float = 30.0
    slack_s: float = 0.1
    start_s_least: float = 120.0
    start_s_most: float = 600.0
    name_suffix: str = ""


@dataclass(frozen=True, slots=True)
class MoveLimits:
    """Requests that move between replicas. ``moves_max``: at once; ``per_target_max``: to one replica.
    ``failures_max``: of one request; then it stays. ``pause_s``: after a failure, before it is tried again."""

    is_on: bool = True
    moves_max: int = 4
    per_target_max: int = 2
    failures_max: int = 2
    pause_s: float = 1.0


@dataclass(frozen=True, slots=True)
class PoisonLimits:
    """Requests that kill engines. ``quarantine_s``: how long a digest is refused, or tried alone; ``digests_max``: of
    either, at most. ``verdict_s``: longest that a request waits until it is known whether its engine died.
    ``trial_s``: an engine that lives so long with a suspect clears it. ``last_replica_s``: how long a suspect waits
    before it may be tried on the last ready replica of a model that may have more. ``resumes_max``: engines of one
    stream that may die before it ends with an error."""

    quarantine_s: float = 600.0
    digests_max: int = 1024
    verdict_s: float = 15.0
    trial_s: float = 30.0
    last_replica_s: float = 30.0
    resumes_max: int = 2


@dataclass(frozen=True, slots=True)
class CopyLimits:
    """Copies of hot checkpoints between nodes. ``holders_max``: nodes that have one, at most; less than 2: nothing is
    ever copied. ``at_once_max``: in the cluster. ``copy_s_max``: after so long it is given up."""

    holders_max: int = 0
    at_once_max: int = 2
    copy_s_max: float = 900.0


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """``waiting_max``: requests that wait, of all models. ``attempts_max``: replicas a request is sent to.
    ``story_max``: events and actions that are remembered."""

    waiting_max: int = 4096
    attempts_max: int = 2
    story_max: int = 20_000
    scaling: ScalingLimits = field(default_factory=ScalingLimits)
    moves: MoveLimits = field(default_factory=MoveLimits)
    copies: CopyLimits = field(default_factory=CopyLimits)
    poison: PoisonLimits = field(default_factory=PoisonLimits)
