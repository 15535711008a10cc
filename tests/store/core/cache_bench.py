"""A cache on a table: a clock that ticks, loads that go by themselves, and a check after every event."""

from __future__ import annotations

from sllm_vllm.store.core.cache import Cache
from sllm_vllm.store.core.events import (
    Action,
    Event,
    GiveSpan,
    LeaseClosed,
    LeaseOpened,
    PartitionKnown,
    PartitionSpec,
    ReadDone,
    SpansReleased,
    StartRead,
)
from sllm_vllm.store.core.policy import policy_named


class Bench:
    """A cache with a clock that ticks once an event, checked after each."""

    def __init__(
        self, num_slots: int, *, transit: int = 1, window: int = 2, reads_max: int = 4, policy: str = "cost"
    ) -> None:
        self.cache = Cache(num_slots, policy=policy_named(policy), transit=transit, window=window, reads_max=reads_max)
        self.now_s = 0.0

    def know(self, name: str, num_spans: int, bps: float = 1.0) -> None:
        spec = PartitionSpec(name, f"model {name}", tuple(range(num_spans)), num_spans)
        self.tell(PartitionKnown(spec, bps))

    def tell(self, *events: Event) -> list[Action]:
        """The last event's actions."""
        actions: list[Action] = []
        for event in events:
            self.now_s += 1
            actions = self.cache.handle(event, self.now_s)
            self.cache.validate()
        return actions

    def load(self, name: str, token: int, *, hold: bool = False) -> list[Action]:
        """A whole load, at once: every read ends, every span in transit is released, and the lease stays open."""
        todo: list[Event] = [LeaseOpened(token, name, hold)]
        seen: list[Action] = []
        for event in todo:
            for action in self.tell(event):
                seen.append(action)
                match action:
                    case StartRead(partition, span, slot):
                        todo.append(ReadDone(partition, span, slot))
                    case GiveSpan(_, span, _, keep) if not keep:
                        todo.append(SpansReleased(token, (span,)))
        return seen

    def fill(self, name: str, num_spans: int, *, token: int, bps: float = 1.0) -> None:
        """Bring a partition in, leaving it to nobody."""
        self.know(name, num_spans, bps)
        self.load(name, token)
        self.tell(LeaseClosed(token))

    def resident(self, name: str) -> int:
        return self.cache.residency(name).num_resident


def only(actions: list[Action], kind: type[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]
