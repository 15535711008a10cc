"""Who goes first, who may wait, and that nobody is lost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sllm_vllm.router.core.facts import ModelSpec, RequestFacts
from sllm_vllm.router.core.queues import STALE_DEADLINES_MAX, ModelQueues, QueueFull

SPECS = {
    "a": ModelSpec("a", queue_max=4, queue_s_max=10.0),
    "b": ModelSpec("b", priority=1, queue_max=8, queue_s_max=20.0),
    "c": ModelSpec("c", queue_s_max=5.0),
}


def push(
    queues: ModelQueues,
    request_id: str,
    now_s: float = 0.0,
    *,
    model: str = "a",
    priority: int = 0,
    deadline_s: float | None = None,
) -> RequestFacts:
    facts = RequestFacts(request_id, model, priority=priority, deadline_s=deadline_s)
    queues.push(facts, now_s, spec=SPECS[model])
    return facts


def ids(popped: list[RequestFacts]) -> list[str]:
    return [facts.id for facts in popped]


def pop_all(queues: ModelQueues, model: str) -> list[str]:
    found = []
    while (facts := queues.pop(model)) is not None:
        queues.validate()
        found.append(facts.id)
    return found


# ------------------------------------------------------------------------------------------------------------- order


def test_first_come_first_served() -> None:
    queues = ModelQueues(10)
    for now_s, request_id in enumerate("xyz"):
        push(queues, request_id, now_s)
    assert queues.peek("a") == RequestFacts("x", "a")
    assert pop_all(queues, "a") == ["x", "y", "z"]
    assert queues.peek("a") is None


def test_those_that_arrive_together_go_as_they_were_pushed() -> None:
    queues = ModelQueues(10)
    for request_id in ("z", "y", "x"):
        push(queues, request_id)
    assert pop_all(queues, "a") == ["z", "y", "x"]


def test_higher_priority_goes_first() -> None:
    queues = ModelQueues(10)
    for now_s, (request_id, priority) in enumerate([("low", -1), ("first", 0), ("high", 5), ("second", 0)]):
        push(queues, request_id, now_s, priority=priority)
    assert pop_all(queues, "a") == ["high", "first", "second", "low"]


def test_one_that_comes_back_gets_its_old_place() -> None:
    queues = ModelQueues(10)
    push(queues, "x", 1.0)
    push(queues, "y", 2.0)
    assert queues.pop("a") == RequestFacts("x", "a")
    push(queues, "x", 1.0)
    assert pop_all(queues, "a") == ["x", "y"]


def test_models_come_by_the_priority_and_arrival_of_their_first() -> None:
    queues = ModelQueues(10)
    push(queues, "1", 1.0, model="c")
    push(queues, "2", 2.0, model="a")
    push(queues, "3", 3.0, model="b")
    assert list(queues.models()) == ["b", "c", "a"]
    push(queues, "4", 4.0, model="a", priority=9)
    assert list(queues.models()) == ["a", "b", "c"]
    queues.remove("4")
    queues.remove("3")
    assert list(queues.models()) == ["c", "a"]


def test_models_can_be_popped_while_they_are_gone_through() -> None:
    queues = ModelQueues(10)
    for now_s, model in enumerate("acabc"):
        push(queues, f"{model}{now_s}", now_s, model=model)
    popped = [queues.pop(model) for model in queues.models()]
    assert [facts.id for facts in popped if facts is not None] == ["b3", "a0", "c1", "a2", "c4"]
    assert len(queues) == 0


# --------------------------------------------------------------------------------------------------------- who waits


def test_nothing_waits_for_a_model_that_nobody_asked() -> None:
    queues = ModelQueues(10)
    assert queues.pop("a") is None
    assert queues.waiting("a") == 0
    assert queues.oldest_s("a") is None
    assert queues.next_deadline_s() is None
    assert not queues.remove("x")


def test_oldest_is_the_earliest_arrival_whatever_its_priority() -> None:
    queues = ModelQueues(10)
    push(queues, "old", 1.0)
    push(queues, "new", 2.0, priority=3)
    assert [queues.waiting("a"), queues.oldest_s("a")] == [2, 1.0]
    assert queues.remove("old")
    assert [queues.waiting("a"), queues.oldest_s("a")] == [1, 2.0]
    assert "new" in queues
    assert "old" not in queues


def test_model_whose_queue_is_full_takes_no_more() -> None:
    queues = ModelQueues(10)
    for index in range(4):
        push(queues, f"x{index}")
    with pytest.raises(QueueFull, match="a: 4 requests wait for it, its queue_max") as caught:
        push(queues, "y")
    assert caught.value.reason == str(caught.value)
    push(queues, "z", model="b")
    queues.validate()
    assert len(queues) == 5


def test_router_that_is_full_takes_no_more() -> None:
    queues = ModelQueues(2)
    push(queues, "x")
    push(queues, "y", model="b")
    with pytest.raises(QueueFull, match="router: 2 requests wait"):
        push(queues, "z", model="c")
    queues.validate()
    assert list(queues.models()) == ["b", "a"]


def test_request_waits_once_and_for_its_own_model() -> None:
    queues = ModelQueues(10)
    push(queues, "x")
    with pytest.raises(AssertionError, match="waits already"):
        push(queues, "x", model="b")
    with pytest.raises(AssertionError, match="is for"):
        queues.push(RequestFacts("y", "b"), 0.0, spec=SPECS["a"])


# --------------------------------------------------------------------------------------------------------- deadlines


def test_request_waits_as_long_as_its_model_lets_it_or_as_it_says() -> None:
    queues = ModelQueues(10)
    push(queues, "model", 1.0)
    push(queues, "own", 1.0, deadline_s=30.0)
    push(queues, "soon", 2.0, deadline_s=3.0)
    assert queues.next_deadline_s() == 3.0
    assert queues.expire(2.9) == []
    assert ids(queues.expire(11.0)) == ["soon", "model"]
    assert ids(queues.expire(30.0)) == ["own"]
    assert list(queues.models()) == []


def test_deadline_of_an_earlier_life_is_forgotten() -> None:
    queues = ModelQueues(10)
    push(queues, "x", deadline_s=5.0)
    queues.pop("a")
    push(queues, "x", deadline_s=50.0)
    assert queues.expire(5.0) == []
    assert queues.next_deadline_s() == 50.0


def test_deadlines_of_those_that_left_do_not_pile_up() -> None:
    queues = ModelQueues(10)
    push(queues, "stays")
    for index in range(3 * STALE_DEADLINES_MAX):
        push(queues, f"x{index}", 1.0)
        assert queues.remove(f"x{index}")
        queues.validate()
    assert ids(queues.expire(10.0)) == ["stays"]


def test_deadlines_come_in_order_after_the_stale_ones_were_swept_out() -> None:
    queues, num = ModelQueues(1000), 4 * STALE_DEADLINES_MAX
    deadlines = {f"x{index}": float(index * 37 % num) for index in range(num)}
    for request_id, deadline_s in deadlines.items():
        push(queues, request_id, model="c", deadline_s=deadline_s)
    for request_id in [one for one in deadlines if int(one[1:]) % 8]:
        assert queues.remove(request_id)
        queues.validate()
    left = sorted((one for one in deadlines if int(one[1:]) % 8 == 0), key=deadlines.__getitem__)
    assert ids(queues.expire(float(num))) == left


# -------------------------------------------------------------------------------------------- against a naive model


@dataclass(frozen=True)
class Waiting:
    facts: RequestFacts
    arrival_s: float
    number: int

    @property
    def rank(self) -> tuple[int, float, int]:
        return -(SPECS[self.facts.model].priority + self.facts.priority), self.arrival_s, self.number

    @property
    def deadline_s(self) -> float:
        own_s = self.facts.deadline_s
        return self.arrival_s + SPECS[self.facts.model].queue_s_max if own_s is None else own_s


class QueuesAgainstAList(RuleBasedStateMachine):
    """One list of all that wait, searched each time, must say the same."""

    def __init__(self) -> None:
        super().__init__()
        self.queues = ModelQueues(12)
        self.all: list[Waiting] = []
        self.now_s = 0.0
        self.num_pushed = 0

    def of(self, model: str) -> list[Waiting]:
        return sorted((one for one in self.all if one.facts.model == model), key=lambda one: one.rank)

    @rule(passed_s=st.integers(0, 3))
    def time_passes(self, passed_s: int) -> None:
        self.now_s += passed_s

    @rule(
        model=st.sampled_from("abc"),
        priority=st.integers(-1, 1),
        wait_s=st.none() | st.integers(0, 9),
        late_s=st.integers(0, 1),
    )
    def one_arrives(self, model: str, priority: int, wait_s: int | None, late_s: int) -> None:
        deadline_s = None if wait_s is None else self.now_s + wait_s
        self.num_pushed += 1
        facts = RequestFacts(f"r{self.num_pushed % 40}", model, priority=priority, deadline_s=deadline_s)
        if facts.id in {one.facts.id for one in self.all}:
            return
        is_full = len(self.all) >= 12 or len(self.of(model)) >= SPECS[model].queue_max
        arrival_s = self.now_s - late_s
        try:
            self.queues.push(facts, arrival_s, spec=SPECS[model])
        except QueueFull:
            assert is_full
        else:
            assert not is_full
            self.all.append(Waiting(facts, arrival_s, self.num_pushed))

    @rule(model=st.sampled_from("abc"))
    def first_is_taken(self, model: str) -> None:
        first = next(iter(self.of(model)), None)
        assert self.queues.peek(model) == (first and first.facts)
        assert self.queues.pop(model) == (first and first.facts)
        if first is not None:
            self.all.remove(first)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def one_gives_up(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.all))
        assert self.queues.remove(one.facts.id)
        self.all.remove(one)
        assert not self.queues.remove(one.facts.id)

    @rule()
    def deadlines_come(self) -> None:
        due = sorted((one.deadline_s, one.number) for one in self.all if one.deadline_s <= self.now_s)
        by_number = {one.number: one for one in self.all}
        assert self.queues.expire(self.now_s) == [by_number[number].facts for _, number in due]
        self.all = [one for one in self.all if one.deadline_s > self.now_s]

    @invariant()
    def both_say_the_same(self) -> None:
        self.queues.validate()
        assert len(self.queues) == len(self.all)
        for model in SPECS:
            assert self.queues.waiting(model) == len(self.of(model))
            assert self.queues.oldest_s(model) == min((one.arrival_s for one in self.of(model)), default=None)
        heads = sorted((self.of(model)[0].rank, model) for model in SPECS if self.of(model))
        assert list(self.queues.models()) == [model for _, model in heads]
        assert self.queues.next_deadline_s() == min((one.deadline_s for one in self.all), default=None)


TestQueuesAgainstAList = QueuesAgainstAList.TestCase
TestQueuesAgainstAList.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
