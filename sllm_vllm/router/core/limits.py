"""Limits of the core's work and memory, and its timeouts. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """Limits of starting replicas.

    ``plans_max``: nodes examined per start and kind of plan. ``hungry_max``: models lacking slots that are tried after
    each event. ``starve_s``: how long the oldest request waits before its model counts as starving; then no waiting
    model may overtake it, and busy replicas are drained for it. ``prefetch_s``: how long before its likely next request
    a model is prefetched. ``slack_s``: see ``best_plan``. ``start_s_least``, ``start_s_most``: range of a start's
    timeout if its model sets none. ``name_suffix``: ends every replica's name, so that two routers of a cluster never
    use the same name.
    """

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
    """Limits of migrations. ``moves_max``: at once; ``per_target_max``: at once to one replica.

    ``failures_max``: failed migrations of a request after which it stays where it is. ``pause_s``: pause after a
    failure before the request may be moved again.
    """

    is_on: bool = True
    moves_max: int = 4
    per_target_max: int = 2
    failures_max: int = 2
    pause_s: float = 1.0


@dataclass(frozen=True, slots=True)
class PoisonLimits:
    """Limits for requests that may kill engines.

    ``quarantine_s``: how long a digest is refused, or tried alone. ``digests_max``: most digests remembered of either
    kind. ``verdict_s``: longest wait of a failed request until it is known whether its engine died. ``trial_s``: a
    suspect is cleared once its engine has survived it for this long. ``last_replica_s``: how long a suspect waits
    before it may be tried on the last ready replica of a model that may have more. ``resumes_max``: how often a stream
    continues on another replica before it ends with an error.
    """

    quarantine_s: float = 600.0
    digests_max: int = 1024
    verdict_s: float = 15.0
    trial_s: float = 30.0
    last_replica_s: float = 30.0
    resumes_max: int = 2


@dataclass(frozen=True, slots=True)
class CopyLimits:
    """Limits of copying hot checkpoints between nodes.

    ``holders_max``: most nodes that hold one checkpoint; below 2 nothing is copied. ``at_once_max``: copies at once in
    the cluster. ``copy_s_max``: when a copy is given up.
    """

    holders_max: int = 0
    at_once_max: int = 2
    copy_s_max: float = 900.0


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """All limits of the core.

    ``waiting_max``: most waiting requests of all models. ``attempts_max``: most replicas that get a request.
    ``story_max``: events and actions that are remembered.
    """

    waiting_max: int = 4096
    attempts_max: int = 2
    story_max: int = 20_000
    scaling: ScalingLimits = field(default_factory=ScalingLimits)
    moves: MoveLimits = field(default_factory=MoveLimits)
    copies: CopyLimits = field(default_factory=CopyLimits)
    poison: PoisonLimits = field(default_factory=PoisonLimits)
