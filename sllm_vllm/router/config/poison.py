"""The configuration's ``poison`` section, about requests that kill their engines. Pure."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from sllm_vllm.router.config.values import Count, Duration
from sllm_vllm.router.core.facts import PoisonLimits


class PoisonSection(BaseModel):
    """Handling of requests that kill their engine. Durations: seconds, or text like 10m."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    quarantine: Duration = Field(
        default=600.0,
        ge=0,
        le=86400,
        description="how long a request that killed its engine, and any with the same body, is refused with 502",
    )
    digests_max: Count = Field(
        default=1024,
        ge=1,
        le=1_000_000,
        description="most request bodies that are remembered as refused, and most as suspected",
    )
    verdict_timeout: Duration = Field(
        default=15.0,
        gt=0,
        le=60,
        description="longest that a failed request waits until it is known whether its engine died",
    )
    trial_timeout: Duration = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="a suspected request is cleared if the engine on which it is tried alone survives it for this"
        " long, even without a token",
    )
    last_replica_wait: Duration = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="how long a suspected request waits for another replica before it may be tried on the last ready"
        " one, or for its model's only replica to be empty before it is tried there beside other requests",
    )
    resumes_max: Count = Field(
        default=2,
        ge=0,
        le=100,
        description="how often a stream continues on another engine after its engine died; then it ends with an error"
        " event",
    )

    def limits(self) -> PoisonLimits:
        """Return the core's limits."""
        return PoisonLimits(
            quarantine_s=self.quarantine,
            digests_max=self.digests_max,
            verdict_s=self.verdict_timeout,
            trial_s=self.trial_timeout,
            last_replica_s=self.last_replica_wait,
            resumes_max=self.resumes_max,
        )
