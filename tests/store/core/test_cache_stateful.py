"""Random lives of a cache: clients that copy, keep, release, stall and die, reads that end in any order or fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sllm_vllm.store.core.cache import Cache
from sllm_vllm.store.core.events import (
    Event,
    EvictAsked,
    FailLease,
    GiveSpan,
    HurryRead,
    LeaseClosed,
    LeaseOpened,
    PartitionKnown,
    PartitionSpec,
    PinAsked,
    PrefetchAsked,
    PrefetchEnded,
    ReadDone,
    ReadFailed,
    SpansReleased,
    StartRead,
)
from sllm_vllm.store.core.policy import policy_named

NUM_EXAMPLES = 250
STEPS_MAX = 100
EVENTS_MIN = 10_000
SIZES = {"a": 1, "b": 3, "c": 7, "d": 12, "e": 0}
"""Spans of each partition; most pools are smaller than all of them."""

names = st.sampled_from(sorted(SIZES))
choice = st.integers(0, 1 << 16)


@dataclass
class Client:
    """What one lease was told. ``looks``: the spans it may look at, with slot and keep."""

    token: int
    spec: PartitionSpec
    looks: dict[int, tuple[int, bool]] = field(default_factory=dict)
    given: list[int] = field(default_factory=list)
    failed: bool = False

    @property
    def is_done(self) -> bool:
        return self.failed or len(self.given) == len(self.spec.order)


class Shell(RuleBasedStateMachine):
    """A fake shell and its clients. It knows what each slot holds, so it sees a slot that goes under a client."""

    num_events = 0

    @initialize(
        num_slots=st.integers(1, 24),
        policy=st.sampled_from(["cost", "lru"]),
        limits=st.one_of(st.none(), st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))),
    )
    def start(self, num_slots: int, policy: str, limits: tuple[int, int, int] | None) -> None:
        transit, window, reads_max = (min(limits[0], num_slots), *limits[1:]) if limits else (None, None, None)
        self.cache = Cache(num_slots, policy=policy_named(policy), transit=transit, window=window, reads_max=reads_max)
        self.now_s = 0.0
        self.last_token = 0
        self.clients: dict[int, Client] = {}
        self.reads: dict[int, tuple[str, int]] = {}
        self.urgent: set[int] = set()
        self.holds: dict[int, tuple[str, int]] = {}
        self.prefetches: set[int] = set()

    def tell(self, event: Event) -> None:
        Shell.num_events += 1
        self.now_s += 1
        for action in self.cache.handle(event, self.now_s):
            match action:
                case StartRead(partition, span, slot, is_urgent):
                    assert slot not in self.reads
                    assert (partition, span) not in self.reads.values(), "one read serves all"
                    looked_at = {slot for client in self.clients.values() for slot, _ in client.looks.values()}
                    assert slot not in looked_at, "a slot is filled while a client looks at it"
                    self.holds.pop(slot, None)
                    assert (partition, span) not in self.holds.values(), "it is here already"
                    self.reads[slot] = (partition, span)
                    self.urgent |= {slot} if is_urgent else set()
                case HurryRead(partition, span):
                    slot = next(slot for slot, what in self.reads.items() if what == (partition, span))
                    assert slot not in self.urgent
                    self.urgent.add(slot)
                case GiveSpan(token, span, slot, keep):
                    client = self.clients[token]
                    assert not client.failed
                    assert self.holds[slot] == (client.spec.id, span)
                    client.looks[span] = (slot, keep)
                    client.given.append(span)
                    assert tuple(client.given) == client.spec.order[: len(client.given)], "in order"
                case FailLease(token, _, error):
                    assert error == "broken"
                    self.clients[token].failed = True
                case PrefetchEnded(request, partition, num_resident):
                    self.prefetches.remove(request)
                    assert num_resident == sum(name == partition for name, _ in self.holds.values())
                case _:
                    assert self.holds.pop(action.slot) == (action.partition, action.span)

    def know(self, name: str, bps: float = 1.0) -> PartitionSpec:
        size = SIZES[name]
        spec = PartitionSpec(name, f"model-{name}", (*range(size // 2, size), *range(size // 2)), size * 10)
        self.tell(PartitionKnown(spec, bps))
        return spec

    def client(self, number: int) -> Client:
        return list(self.clients.values())[number % len(self.clients)]

    @rule(name=names, hold=st.booleans(), is_urgent=st.booleans(), bps=st.sampled_from([1.0, 7.0]))
    def open(self, name: str, hold: bool, is_urgent: bool, bps: float) -> None:
        spec = self.know(name, bps)
        self.last_token += 1
        self.clients[self.last_token] = Client(self.last_token, spec)
        self.tell(LeaseOpened(self.last_token, name, hold, is_urgent))

    @precondition(lambda self: self.clients)
    @rule(number=choice, which=choice, kept=st.booleans())
    def release(self, number: int, which: int, kept: bool) -> None:
        client = self.client(number)
        spans = [span for span, (_, keep) in client.looks.items() if kept or not keep]
        gone = tuple(spans[: which % (len(spans) + 1)])
        for span in gone:
            del client.looks[span]
        self.tell(SpansReleased(client.token, (*gone, 99)))

    @precondition(lambda self: self.clients)
    @rule(number=choice)
    def close(self, number: int) -> None:
        client = self.client(number)
        del self.clients[client.token]
        self.tell(LeaseClosed(client.token))
        self.tell(SpansReleased(client.token, (0, 1)))

    @precondition(lambda self: self.reads)
    @rule(numbers=st.lists(choice, min_size=1, max_size=8))
    def finish_reads(self, numbers: list[int]) -> None:
        for number in numbers[: len(self.reads)]:
            slot = list(self.reads)[number % len(self.reads)]
            partition, span = self.end_read(slot)
            self.holds[slot] = (partition, span)
            self.tell(ReadDone(partition, span, slot))

    @precondition(lambda self: self.reads)
    @rule(number=choice)
    def fail_read(self, number: int) -> None:
        slot = list(self.reads)[number % len(self.reads)]
        partition, span = self.end_read(slot)
        self.tell(ReadFailed(partition, span, slot, "broken"))

    def end_read(self, slot: int) -> tuple[str, int]:
        self.urgent.discard(slot)
        return self.reads.pop(slot)

    @rule(name=names)
    def prefetch(self, name: str) -> None:
        self.know(name)
        self.last_token += 1
        self.prefetches.add(self.last_token)
        self.tell(PrefetchAsked(self.last_token, name))

    @rule(name=names)
    def evict(self, name: str) -> None:
        self.know(name)
        self.tell(EvictAsked(name))

    @rule(name=names, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        self.know(name)
        if not pinned or self.cache.can_pin(name):
            self.tell(PinAsked(name, pinned))

    @rule()
    def everybody_cooperates(self) -> None:
        """No lock-up: when reads end and clients copy what they can't keep, every load comes to its end."""
        rounds_max = 10 * (1 + len(self.clients)) * (1 + sum(SIZES.values()))
        for _ in range(rounds_max):
            if not self.reads and all(client.is_done for client in self.clients.values()):
                break
            for slot in list(self.reads):
                partition, span = self.end_read(slot)
                self.holds[slot] = (partition, span)
                self.tell(ReadDone(partition, span, slot))
            for client in list(self.clients.values()):
                gone = tuple(span for span, (_, keep) in client.looks.items() if not keep)
                for span in gone:
                    del client.looks[span]
                if gone:
                    self.tell(SpansReleased(client.token, gone))
        assert all(client.is_done for client in self.clients.values()), "locked up"
        assert not self.prefetches, "a prefetch never ends"

    @invariant()
    def is_valid(self) -> None:
        self.cache.validate()

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.everybody_cooperates()
            self.cache.validate()


def test_every_load_ends_and_every_invariant_holds() -> None:
    Shell.num_events = 0
    budget: dict[str, Any] = {"max_examples": NUM_EXAMPLES, "stateful_step_count": STEPS_MAX}
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Shell, settings=settings(**budget, deadline=None, derandomize=True, suppress_health_check=slow)
    )
    print(f"{Shell.num_events} events")
    assert Shell.num_events >= EVENTS_MIN
