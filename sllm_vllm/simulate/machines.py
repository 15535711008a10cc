"""Simulated nodes and replicas: slots, caches, the load queue, continuous batching. Sends no events; owned by
``World``."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from sllm_vllm.router.core.facts import Tier
from sllm_vllm.simulate.hardware import ModelClass, NodeClass
from sllm_vllm.simulate.run import RequestOutcome


class Stage(Enum):
    """Where a replica is in its life cycle."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    GONE = "gone"


@dataclass(slots=True)
class SimulatedReplica:
    """An engine. Requests in decode advance at the same rate, so one clock of tokens gives the end of each."""

    id: str
    model: str
    kind: ModelClass
    node: SimulatedNode
    ordered_s: float
    stage: Stage = Stage.STARTING
    ready_s: float | None = None
    ongoing: dict[str, RequestOutcome] = field(default_factory=dict)
    """Requests in prefill or decode."""
    version: int = 0
    """Version of the batch: an end scheduled for an earlier version is ignored."""
    prefill_until_s: float = 0.0
    _ends: list[tuple[float, str]] = field(default_factory=list)
    """A heap of (end on the clock of tokens, request); entries of requests that left are skipped."""
    _ends_of: dict[str, float] = field(default_factory=dict)
    """Ends of the requests in decode, on the clock of tokens."""
    _tokens: float = 0.0
    """The clock: tokens that a request in decode since the beginning would have."""
    _updated_s: float = 0.0

    def begin_prefill(self, num_tokens: int, now_s: float) -> float:
        """Queue a prompt; returns the time of its first token. Prompts are processed one after another, beside
        decode."""
        self.prefill_until_s = max(now_s, self.prefill_until_s) + self.kind.prefill_s(num_tokens)
        return self.prefill_until_s

    def begin_decode(self, request: str, num_tokens: float, now_s: float) -> None:
        """Add a request to the batch."""
        self._advance(now_s)
        self._ends_of[request] = self._tokens + num_tokens
        heapq.heappush(self._ends, (self._tokens + num_tokens, request))

    def remove(self, request: str, now_s: float) -> float | None:
        """Take a request off this replica; returns its missing tokens, or None if it was in prefill."""
        self._advance(now_s)
        del self.ongoing[request]
        ends = self._ends_of.pop(request, None)
        return None if ends is None else max(0.0, ends - self._tokens)

    def tokens_left(self, request: str, now_s: float) -> float | None:
        """The request's missing tokens; None in prefill."""
        self._advance(now_s)
        ends = self._ends_of.get(request)
        return None if ends is None else max(0.0, ends - self._tokens)

    def next_end(self, now_s: float) -> tuple[float, str] | None:
        """When the first request in decode ends if the batch does not change, and which one it is."""
        self._advance(now_s)
        while self._ends and self._ends_of.get(self._ends[0][1]) != self._ends[0][0]:
            heapq.heappop(self._ends)
        if not self._ends:
            return None
        ends, request = self._ends[0]
        return now_s + max(0.0, ends - self._tokens) * self.kind.token_s(len(self._ends_of)), request

    def _advance(self, now_s: float) -> None:
        if self._ends_of:
            self._tokens += (now_s - self._updated_s) / self.kind.token_s(len(self._ends_of))
        self._updated_s = now_s


@dataclass(slots=True)
class SimulatedNode:
    """A machine: slots, loads one after another, and two caches that evict the least recently used model."""

    id: str
    kind: NodeClass
    replicas: dict[str, SimulatedReplica] = field(default_factory=dict)
    host: OrderedDict[str, int] = field(default_factory=OrderedDict)
    disk: OrderedDict[str, int] = field(default_factory=OrderedDict)
    load_until_s: float = 0.0
    loaded_s: float = 0.0
    """Total seconds of all loads so far, including queued ones."""
    fills: dict[str, float] = field(default_factory=dict)
    """Models being read into memory in the background, with the seconds left; one after another, while no load runs."""
    is_report_due: bool = False
    is_lost: bool = False

    @property
    def num_free(self) -> int:
        """Free slots."""
        return self.kind.num_slots - sum(replica.kind.accelerators for replica in self.replicas.values())

    def tier(self, model: str) -> Tier:
        """The fastest tier that has the model."""
        if model in self.host:
            return Tier.HOST
        return Tier.DISK if model in self.disk else Tier.REMOTE

    def residency(self) -> dict[str, Tier]:
        """The models on this node by tier, for a report."""
        return dict.fromkeys(self.disk, Tier.DISK) | dict.fromkeys(self.host, Tier.HOST)

    def queue_load(self, model: str, kind: ModelClass, *, now_s: float, noise: float) -> tuple[Tier, float, float]:
        """Queue a load behind those that wait; returns the tier it reads from, when it begins, and when it ends.

        The caches are updated at once, since any later load is behind it in the queue.
        """
        tier = self.tier(model)
        begins_s = max(now_s, self.load_until_s)
        self.load_until_s = begins_s + self.kind.weights_s(kind, tier) * noise
        self.loaded_s += self.load_until_s - begins_s
        self._keep(model, kind.nbytes)
        return tier, begins_s, self.load_until_s

    def end_fill(self, model: str, kind: ModelClass) -> bool:
        """Finish a background read, which only uses free memory and evicts nothing; returns False if there was too
        little, or the model is in memory already."""
        del self.fills[model]
        if model in self.host or sum(self.host.values()) + kind.nbytes > self.kind.host_nbytes:
            return False
        self.host[model] = kind.nbytes
        self.host.move_to_end(model, last=False)  # it has not been used yet
        return True

    def _keep(self, model: str, nbytes: int) -> None:
        keep(self.disk, self.kind.disk_nbytes, model, nbytes=nbytes)
        keep(self.host, self.kind.host_nbytes, model, nbytes=nbytes)


def keep(cache: OrderedDict[str, int], nbytes_max: int, model: str, *, nbytes: int) -> None:
    """Put a model into a cache as the most recently used one, and evict the least recently used ones that no longer
    fit."""
    if nbytes > nbytes_max:
        return
    cache[model] = nbytes
    cache.move_to_end(model)
    total = sum(cache.values())
    while total > nbytes_max:
        total -= cache.popitem(last=False)[1]
