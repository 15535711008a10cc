"""The configuration's ``ray`` section, for a router on a Ray cluster. Pure; not used on a single machine."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sllm_vllm.router.config.values import Count, Duration, Text

SCHEMES = ("ray", "sqlite", "redis", "rediss")


class RaySection(BaseModel):
    """The router as a Ray Serve application. Durations: seconds, or text like 30s."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    resource: Text | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="custom Ray resource of the nodes that run engines; default: all nodes with GPUs, or, if there are"
        " none, all with CPUs",
    )
    wide_resource: Text | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="custom Ray resource of the nodes for engines that are larger than one node; the router treats"
        " these nodes as one, `wide`, and vLLM's own Ray executor places the engines' workers",
    )
    copies: Count = Field(
        default=2,
        ge=1,
        le=1000,
        description="most nodes that hold a hot checkpoint, which is copied to them before it is needed; 1: never"
        " copied",
    )
    ingress_min: Count = Field(default=1, ge=1, le=1000, description="least number of ingress replicas")
    ingress_max: Count = Field(default=4, ge=1, le=1000, description="largest number of ingress replicas")
    ingress_ongoing: Count = Field(
        default=100, ge=1, le=100_000, description="concurrent requests per ingress replica; more start another one"
    )
    state: Text = Field(
        default="ray:",
        max_length=1024,
        description="where deployed models and learned estimates are kept: `ray:` for the life of the cluster;"
        " `sqlite:PATH` or `redis://HOST:PORT` beyond it",
    )
    linger: Duration = Field(
        default=60.0, gt=0, le=86400, description="how long agents and engines are kept without an ingress replica"
    )

    @field_validator("state")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value.partition(":")[0] not in SCHEMES:
            raise ValueError(f"must begin with one of {', '.join(f'{name}:' for name in SCHEMES)}")
        return value
