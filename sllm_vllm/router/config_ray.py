"""The configuration's ``ray`` section, for a router on a Ray cluster. Pure; not used on a single machine."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sllm_vllm.router.config_values import Count, Duration, Text

SCHEMES = ("ray", "sqlite", "redis", "rediss", "etcd", "etcds")


class RaySection(BaseModel):
    """The router as a Ray Serve application. Durations: seconds, or text like 30s."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    resource: Text | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="custom Ray resource of nodes that take engines; by itself all with GPUs, or, if none has, CPUs",
    )
    wide_resource: Text | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="custom Ray resource of nodes whose accelerators engines share that are larger than a node; these"
        " nodes are one to the router, `wide`, and vLLM's own Ray executor places the engines' workers",
    )
    copies: Count = Field(
        default=2, ge=1, le=1000, description="nodes that a hot checkpoint is copied to, ahead of need; 1: it never is"
    )
    ingress_min: Count = Field(default=1, ge=1, le=1000, description="ingress replicas that are always there")
    ingress_max: Count = Field(default=4, ge=1, le=1000, description="ingress replicas at most")
    ingress_ongoing: Count = Field(
        default=100, ge=1, le=100_000, description="requests at once for which an ingress replica is enough"
    )
    state: Text = Field(
        default="ray:",
        max_length=1024,
        description="what outlives the controller: `ray:` as long as the cluster, `sqlite:PATH`, `redis://HOST:PORT`,"
        " `etcd://HOST:PORT` longer",
    )
    linger: Duration = Field(
        default=60.0, gt=0, le=86400, description="after so long without an ingress, agents and engines end"
    )

    @field_validator("state")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value.partition(":")[0] not in SCHEMES:
            raise ValueError(f"it has to begin with one of {', '.join(f'{name}:' for name in SCHEMES)}")
        return value
