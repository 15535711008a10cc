"""Plans for a start: which there are, what they cost, which one is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.facts import Estimate, ModelSpec, RouterLimits, Term, Tier
from sllm_vllm.router.core.model_state import CoreState
from sllm_vllm.router.core.placement import Plan, PlanKind, best_plan, plan_starts
from sllm_vllm.router.core.rules import RuleBook
from tests.support.cases import every_case

START, EVICT, MIGRATE = PlanKind
LOAD_S = {Tier.HOST: 1.0, Tier.DISK: 5.0, Tier.REMOTE: 60.0}
NOW_S = 100.0


class FakeEstimator(Estimator):
    """Seconds by tier; cold starts take 20 s more; a slow node takes longer for all. Notes what it was asked."""

    def __init__(self, *, stop_s: Mapping[str, float] | None = None, slow: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self._stop_times_s = stop_s or {}
        self._slow = slow or {}
        self.tokens: set[int] = set()

    def estimate_start(
        self, spec: ModelSpec, node: str, tier: Tier, *, is_warm: bool, prompt_tokens: int = 0, queue_s: float = 0.0
    ) -> Estimate:
        self.tokens.add(prompt_tokens)
        process_s = (0.0 if is_warm else 20.0) + self._slow.get(node, 0.0)
        return Estimate({Term.QUEUE: queue_s, Term.PROCESS: process_s, Term.WEIGHTS: LOAD_S[tier]})

    def stop_s(self, model: str, node: str) -> float:
        return self._stop_times_s.get(model, 0.5)


def cluster_of(**slots: int) -> Cluster:
    cluster = Cluster()
    for node, num_slots in slots.items():
        cluster.add_node(node, num_slots)
    return cluster


def add_ready(cluster: Cluster, replica: Replica, *requests: str) -> Replica:
    cluster.add_replica(replica)
    cluster.set_state(replica.id, ReplicaState.READY, 0.0)
    for request in requests:
        cluster.begin_request(replica.id, request, prefix="", now_s=0.0)
    return replica


class FakeRules(RuleBook):
    """Rules that are given. ``room``: requests that a replica takes at most; None: no request may move."""

    def __init__(
        self,
        values: Mapping[str, float] | None = None,
        *,
        is_spare: Callable[[str], bool] = lambda replica: True,
        room: int | None = None,
        resume_s: float = 0.25,
        nodes_max: int = 8,
    ) -> None:
        super().__init__(RouterLimits(), CoreState(), cluster=Cluster(), estimator=Estimator())
        self.nodes_max = nodes_max
        self.may_move = room is not None
        self._values = values or {}
        self._is_spare = is_spare
        self._num_most = room or 0
        self._resumed_s = resume_s

    def keep_value_s(self, replica: Replica, now_s: float) -> float:
        return self._values.get(replica.id, 1.0)

    def is_spare(self, replica: Replica) -> bool:
        return self._is_spare(replica.id)

    def may_empty(self, replica: Replica, now_s: float) -> bool:
        return True

    def resume_s(self, request_id: str, now_s: float) -> float:
        return self._resumed_s

    def room(self, replica: Replica) -> int:
        return max(0, self._num_most - len(replica.ongoing))

    def spec_of(self, replica: Replica) -> ModelSpec | None:
        return None


def plans_for(
    cluster: Cluster, estimator: Estimator | None = None, *, num_slots: int = 1, rules: RuleBook | None = None
) -> list[Plan]:
    rules = rules or FakeRules()
    rules.cluster, rules.estimator = cluster, estimator or FakeEstimator()
    return plan_starts(rules, ModelSpec("new", accelerators=num_slots), prompt_tokens=7, now_s=NOW_S)


def kinds_of(plans: list[Plan]) -> list[tuple[PlanKind, str]]:
    return [(plan.kind, plan.node) for plan in plans]


def moving(*, room: int = 8, resume_s: float = 0.25) -> FakeRules:
    return FakeRules(room=room, resume_s=resume_s)


# ------------------------------------------------------------------------------------------------------ free slots


def test_starts_are_sorted_by_time_and_then_by_node() -> None:
    cluster = cluster_of(n4=1, n3=1, n2=1, n1=1)
    cluster.set_tier("n3", "new", Tier.HOST)
    cluster.set_tier("n2", "new", Tier.DISK)
    plans = plans_for(cluster)
    assert kinds_of(plans) == [(START, "n3"), (START, "n2"), (START, "n1"), (START, "n4")]
    assert [plan.tier for plan in plans] == [Tier.HOST, Tier.DISK, Tier.REMOTE, Tier.REMOTE]


def test_start_waits_for_the_loads_of_its_node() -> None:
    cluster = cluster_of(n1=1, n2=1)
    cluster.set_load_until("n1", NOW_S + 3.0)
    cluster.set_load_until("n2", NOW_S - 3.0)
    queues = {plan.node: plan.estimate.terms[Term.QUEUE] for plan in plans_for(cluster)}
    assert queues == {"n1": 3.0, "n2": 0.0}


def test_disk_is_sooner_than_a_host_with_a_long_queue() -> None:
    cluster = cluster_of(n1=1, n2=1)
    cluster.set_tier("n1", "new", Tier.HOST)
    cluster.set_tier("n2", "new", Tier.DISK)
    cluster.set_load_until("n1", NOW_S + 10.0)
    assert kinds_of(plans_for(cluster)) == [(START, "n2"), (START, "n1")]


def test_warm_node_is_sooner() -> None:
    cluster = cluster_of(n1=1, n2=1)
    cluster.set_warm("n1", False)
    plans = plans_for(cluster)
    assert [(plan.node, plan.is_warm) for plan in plans] == [("n2", True), ("n1", False)]


def test_a_node_whose_parent_imports_is_priced_with_the_wait_for_it() -> None:
    """A start there is forked as well, only later: it is as soon as elsewhere when the wait is short."""
    cluster = cluster_of(n1=1, n2=1)
    cluster.set_warm("n1", True, at_s=NOW_S + 5.0)
    cluster.set_load_until("n2", NOW_S + 2.0)
    found = {plan.node: plan for plan in plans_for(cluster)}
    assert (found["n1"].is_warm, found["n1"].estimate.terms[Term.QUEUE]) == (True, 5.0)
    assert found["n2"].estimate.terms[Term.QUEUE] == 2.0
    cluster.set_load_until("n1", NOW_S + 8.0)  # it imports meanwhile
    assert {plan.estimate.terms[Term.QUEUE] for plan in plans_for(cluster)} == {8.0, 2.0}


def test_prompt_counts() -> None:
    estimator = FakeEstimator()
    plans_for(cluster_of(n=1), estimator)
    assert estimator.tokens == {7}


def test_no_node_no_plan() -> None:
    assert plans_for(Cluster()) == []
    assert plans_for(cluster_of(n=1), num_slots=2) == []


def test_number_of_nodes_looked_at_is_bounded() -> None:
    cluster = cluster_of(**{f"n{number:02}": 1 for number in range(30)})
    assert len(plans_for(cluster, rules=FakeRules(nodes_max=4))) == 2
    assert len(plans_for(cluster, rules=FakeRules(nodes_max=1))) == 1


# -------------------------------------------------------------------------------------------------------- eviction


def test_idle_replicas_of_least_value_give_way() -> None:
    cluster = cluster_of(n=3)
    for name in ("a", "b", "c"):
        add_ready(cluster, Replica(name, f"model-{name}", "n"))
    (plan,) = plans_for(cluster, num_slots=2, rules=FakeRules({"a": 3.0, "b": 1.0, "c": 2.0}))
    assert (plan.kind, plan.victims, plan.moved) == (EVICT, ("b", "c"), ())


def test_free_slots_are_used_before_victims_are() -> None:
    cluster = cluster_of(n=3)
    for name in ("a", "b"):
        add_ready(cluster, Replica(name, f"model-{name}", "n"))
    (plan,) = plans_for(cluster, num_slots=2, rules=FakeRules({"a": 3.0, "b": 1.0}))
    assert plan.victims == ("b",)


@every_case("load_s, queue_s", [(0.0, 2.0), (1.0, 2.0), (5.0, 5.0)])
def test_eviction_waits_for_loads_or_the_slowest_victim(load_s: float, queue_s: float) -> None:
    cluster = cluster_of(n=2)
    for name in ("a", "b"):
        add_ready(cluster, Replica(name, name, "n"))
    cluster.set_load_until("n", NOW_S + load_s)
    (plan,) = plans_for(cluster, FakeEstimator(stop_s={"a": 0.5, "b": 2.0}), num_slots=2)
    assert plan.estimate.terms[Term.QUEUE] == queue_s
    assert plan.estimate.total_s == queue_s + LOAD_S[Tier.REMOTE]


def test_eviction_where_the_model_is_beats_a_free_node_without_it() -> None:
    cluster = cluster_of(free=1, full=1)
    cluster.set_tier("full", "new", Tier.HOST)
    add_ready(cluster, Replica("r", "old", "full"))
    assert kinds_of(plans_for(cluster)) == [(EVICT, "full"), (START, "free")]


def test_nobody_gives_way_for_a_plan_that_is_no_sooner() -> None:
    cluster = cluster_of(free=1, full=1)
    add_ready(cluster, Replica("r", "old", "full"))
    assert kinds_of(plans_for(cluster)) == [(START, "free")]
    slow = FakeEstimator(slow={"free": 0.5})
    assert kinds_of(plans_for(cluster, slow)) == [(START, "free")]
    slower = FakeEstimator(slow={"free": 0.75})
    assert kinds_of(plans_for(cluster, slower)) == [(EVICT, "full"), (START, "free")]


def test_own_replicas_and_those_that_are_not_idle_stay() -> None:
    cluster = cluster_of(n=5)
    add_ready(cluster, Replica("own", "new", "n"))
    add_ready(cluster, Replica("busy", "old", "n"), "q")
    for name, state in (("ordered", None), ("draining", ReplicaState.DRAINING), ("stopping", ReplicaState.STOPPING)):
        cluster.add_replica(Replica(name, "old", "n"))
        if state is not None:
            cluster.set_state(name, ReplicaState.READY, 0.0)
            cluster.set_state(name, state, 0.0)
    assert plans_for(cluster) == []


def test_replicas_that_may_not_go_stay_and_hide_nobody() -> None:
    """Those that were idle longest must stay, and are many more than are looked at first."""
    cluster = cluster_of(**{f"n{number:02}": 1 for number in range(20)})
    for number in range(20):
        add_ready(cluster, Replica(f"r{number:02}", "old", f"n{number:02}"))
    cluster.begin_request("r19", "q", prefix="", now_s=1.0)
    cluster.end_request("r19", "q", 2.0)
    rules = FakeRules(is_spare=lambda replica: replica == "r19", nodes_max=2)
    assert [plan.victims for plan in plans_for(cluster, rules=rules)] == [("r19",)]
    none = FakeRules(is_spare=lambda replica: False, nodes_max=1)
    assert plans_for(cluster, rules=none) == []


def test_eviction_that_is_certainly_later_is_left_out() -> None:
    cluster = cluster_of(n1=1, n2=1)
    for node in ("n1", "n2"):
        add_ready(cluster, Replica(f"r-{node}", "old", node))
    cluster.set_tier("n2", "new", Tier.HOST)
    assert kinds_of(plans_for(cluster)) == [(EVICT, "n2")]


def test_evictions_that_are_as_soon_go_by_node() -> None:
    cluster = cluster_of(n2=1, n1=1)
    for node in ("n2", "n1"):
        add_ready(cluster, Replica(f"r-{node}", "old", node))
    assert kinds_of(plans_for(cluster)) == [(EVICT, "n1"), (EVICT, "n2")]


# ------------------------------------------------------------------------------------------------------- migration


def busy_host() -> Cluster:
    """The model is in HOST where another one is busy, which has a replica elsewhere too."""
    cluster = cluster_of(host=1, other=1)
    cluster.set_tier("host", "new", Tier.HOST)
    add_ready(cluster, Replica("r-host", "old", "host"), "q2", "q1")
    add_ready(cluster, Replica("r-other", "old", "other"), "q3")
    return cluster


def test_requests_move_to_replicas_of_their_model_elsewhere() -> None:
    (plan,) = plans_for(busy_host(), rules=moving())
    assert (plan.kind, plan.node, plan.victims, plan.moved) == (MIGRATE, "host", ("r-host",), ("q1", "q2"))
    assert plan.estimate.terms[Term.QUEUE] == 2 * 0.25 + 0.5


def test_nothing_moves_unless_it_may() -> None:
    cluster = busy_host()
    assert plans_for(cluster) == []
    cluster.set_pinned("r-host", True)
    assert plans_for(cluster, rules=moving()) == []


def test_nothing_moves_where_there_is_no_room() -> None:
    assert plans_for(busy_host(), rules=moving(room=2)) == []
    assert len(plans_for(busy_host(), rules=moving(room=3))) == 1
    assert plans_for(busy_host(), rules=moving(room=0, resume_s=0.0)) == []


def test_room_is_asked_for_all_that_move() -> None:
    """Each of two could move, but not both."""
    cluster = cluster_of(host=2, other=1)
    cluster.set_tier("host", "new", Tier.DISK)
    for name in ("r1", "r2"):
        add_ready(cluster, Replica(name, "old", "host"), f"q-{name}")
    add_ready(cluster, Replica("r3", "old", "other"), "q3")
    assert plans_for(cluster, num_slots=2, rules=moving(room=2)) == []
    (plan,) = plans_for(cluster, num_slots=2, rules=moving(room=3))
    assert plan.moved == ("q-r1", "q-r2")


def test_idle_and_own_replicas_do_not_move_but_idle_ones_go() -> None:
    cluster = busy_host()
    cluster.add_node("mixed", 3)
    cluster.set_tier("mixed", "new", Tier.HOST)
    add_ready(cluster, Replica("r-idle", "old", "mixed"))
    add_ready(cluster, Replica("r-busy", "old", "mixed"), "q4")
    add_ready(cluster, Replica("r-own", "new", "mixed"), "q5")
    (plan,) = plans_for(cluster, num_slots=2, rules=moving())
    assert (plan.node, plan.victims, plan.moved) == ("mixed", ("r-busy", "r-idle"), ("q4",))


def test_migration_that_is_no_sooner_is_left_out() -> None:
    cluster = busy_host()
    cluster.add_node("free", 1)
    cluster.set_tier("free", "new", Tier.DISK)
    assert kinds_of(plans_for(cluster, rules=moving())) == [(MIGRATE, "host"), (START, "free")]
    assert kinds_of(plans_for(cluster, rules=moving(resume_s=10.0))) == [(START, "free")]


# ------------------------------------------------------------------------------------------------------ the choice


def plan_of(kind: PlanKind, seconds: float) -> Plan:
    victims = () if kind is START else ("r",)
    return Plan(kind, "n", Tier.HOST, is_warm=True, estimate=Estimate({Term.WEIGHTS: seconds}), victims=victims)


def test_no_plan_is_best_of_none() -> None:
    assert best_plan([]) is None


@every_case(
    "evict_s, start_s, slack_s, kind",
    [
        (1.0, 1.0625, 0.1, START),
        (1.0, 1.25, 0.1, EVICT),
        (1.0, 1.25, 0.25, START),
        (20.0, 21.0, 0.1, START),
        (20.0, 21.5, 0.1, EVICT),
    ],
)
def test_plan_that_stops_nobody_is_taken_if_it_is_hardly_later(
    evict_s: float, start_s: float, slack_s: float, kind: PlanKind
) -> None:
    plans = [plan_of(EVICT, evict_s), plan_of(MIGRATE, evict_s), plan_of(START, start_s)]
    best = best_plan(plans, slack_s=slack_s)
    assert best is not None
    assert best.kind is kind


def test_of_starts_that_are_nearly_as_soon_that_beside_its_checkpoint_is_taken() -> None:
    def plan(node: str, tier: Tier, seconds: float) -> Plan:
        return Plan(START, node, tier, is_warm=True, estimate=Estimate({Term.WEIGHTS: seconds}), victims=())

    remote, disk, late = plan("a", Tier.REMOTE, 2.0), plan("b", Tier.DISK, 2.05), plan("c", Tier.HOST, 2.5)
    assert best_plan([remote, disk, late]) is disk
    assert best_plan([remote, late]) is remote


def test_of_evictions_that_are_nearly_as_soon_the_cheapest_is_taken() -> None:
    """At most slack later than the soonest; so all must be listed that are."""
    cluster = cluster_of(n1=1, n2=1, n3=1)
    for node in cluster.nodes:
        add_ready(cluster, Replica(f"r-{node}", f"old-{node}", node))
        cluster.set_tier(node, "new", Tier.HOST)
    estimator = FakeEstimator(slow={"n2": 0.03125, "n3": 0.5})
    values = FakeRules({"r-n1": 3.0, "r-n2": 2.0, "r-n3": 1.0})
    best = best_plan(plans_for(cluster, estimator, rules=values))
    assert best is not None
    assert (best.node, best.victims, best.loss_s) == ("n2", ("r-n2",), 2.0)


def test_loss_is_that_of_all_victims() -> None:
    cluster = cluster_of(n=2)
    for name in ("a", "b"):
        add_ready(cluster, Replica(name, f"model-{name}", "n"))
    (plan,) = plans_for(cluster, num_slots=2, rules=FakeRules({"a": 3.0, "b": 1.0}))
    assert plan.loss_s == 4.0


def test_first_plan_is_taken_if_all_stop_somebody() -> None:
    plans = [plan_of(EVICT, 1.0), plan_of(EVICT, 1.0)]
    assert best_plan(plans) is plans[0]


@given(st.data())
def test_leaving_plans_out_changes_no_choice(data: st.DataObject) -> None:
    """The best of what is listed is the best there is, with every node looked at by hand."""
    num_nodes = data.draw(st.integers(1, 5))
    cluster = cluster_of(**{f"n{number}": 1 for number in range(num_nodes)})
    estimator = FakeEstimator(slow={node: data.draw(st.integers(0, 8)) / 4 for node in cluster.nodes})
    possible = []
    for node in cluster.nodes:
        tier, load_s = data.draw(st.sampled_from(Tier)), data.draw(st.integers(0, 8)) / 4
        cluster.set_tier(node, "new", tier)
        cluster.set_load_until(node, NOW_S + load_s)
        is_full = data.draw(st.booleans())
        if is_full:
            add_ready(cluster, Replica(f"r-{node}", "old", node))
        queue_s = max(load_s, 0.5) if is_full else load_s
        total_s = estimator.estimate_start(ModelSpec("new"), node, tier, is_warm=True, queue_s=queue_s).total_s
        possible.append((total_s, is_full, node))
    plans = plans_for(cluster, estimator, rules=FakeRules(nodes_max=10))
    assert [(plans[0].estimate.total_s, plans[0].kind is EVICT, plans[0].node)] == [min(possible)]


def test_real_estimator_fits() -> None:
    cluster = cluster_of(n=1)
    add_ready(cluster, Replica("r", "old", "n"))
    (plan,) = plans_for(cluster, Estimator())
    assert set(plan.estimate.terms) == set(Term)
    assert plan.estimate.terms[Term.QUEUE] == Estimator().stop_s("old", "n")
