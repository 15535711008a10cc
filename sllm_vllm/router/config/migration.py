"""The configuration's ``migration`` section, and which engines requests may move between. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from sllm_vllm.router.config.settings import MoveSettings
from sllm_vllm.router.config.values import Count, Duration, Flag

CHANGEABLE_OPTIONS = frozenset(
    {
        "--api-key",
        "--disable-log-stats",
        "--enable-log-requests",
        "--gpu-memory-utilization",
        "--kv-cache-memory-bytes",
        "--max-log-len",
        "--max-num-batched-tokens",
        "--max-num-seqs",
        "--no-enable-log-requests",
        "--served-model-name",
        "--uvicorn-log-level",
    }
)
"""Options of `vllm serve` that affect speed and capacity, but never the content of answers."""


class MigrationSection(BaseModel):
    """Moving running requests from one engine to another. Durations: seconds, or text like 30s."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enabled: Flag = Field(
        default=True,
        description="start engines so that their requests can be moved; seeded requests then draw other random numbers"
        " than in stock vLLM",
    )
    moves_max: Count = Field(default=4, ge=1, le=1000, description="most concurrent moves of all models together")
    rounds_max: Count = Field(
        default=6,
        ge=0,
        le=100,
        description="rounds in which the target catches up before the switch; 0: it computes everything at the switch",
    )
    round_tokens_max: Count = Field(
        default=2048,
        ge=16,
        le=1 << 20,
        description="most tokens of one prefill of a round; other requests at the target wait for each prefill",
    )
    round_pause: Duration = Field(default=0.0, ge=0, le=60, description="pause between two of those prefills")
    switch_timeout: Duration = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="longest that a client waits at the switch; then its request stays on its engine",
    )

    def settings(self) -> MoveSettings | None:
        """Return the settings of the data path; None if migration is off."""
        if not self.enabled:
            return None
        return MoveSettings(
            rounds_max=self.rounds_max,
            round_tokens_max=self.round_tokens_max,
            round_pause_s=self.round_pause,
            switch_s_max=self.switch_timeout,
        )


def lineage_of(source: str, revision: str | None, *, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Return a 31-bit digest of everything that decides what an engine answers.

    Requests move only between engines with the same lineage.
    """
    kept = [words for words in _options(arguments) if words[0] not in CHANGEABLE_OPTIONS]
    said = [source, revision, sorted(kept), sorted(environment.items())]
    return int.from_bytes(hashlib.sha256(json.dumps(said).encode()).digest()[:4], "big") >> 1


def _options(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Yield each option with its values, in one spelling, so that equal options compare equal."""
    option: list[str] = []
    for word in arguments:
        if word.startswith("-"):
            if option:
                yield option
            name, equals, value = word.partition("=")
            option = [name.replace("_", "-"), *([value] if equals else [])]
        elif option:
            option.append(word)
        else:
            yield [word]
    if option:
        yield option
