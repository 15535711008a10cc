"""The picture of nodes and replicas, one operation at a time; test_cluster_stateful.py does them at random."""

from __future__ import annotations

import pytest

from sllm_vllm.router.core import shortlist
from sllm_vllm.router.core.cluster import NEXT, PREFIXES_MAX, Cluster, Replica, ReplicaState
from sllm_vllm.router.core.facts import Tier
from tests.support.cases import every_case

MODELS = ("a", "b", "c")
LOOKED_AT = 4


def cluster_of(*nodes: str, num_slots: int = 4) -> Cluster:
    cluster = Cluster()
    for node in nodes:
        cluster.add_node(node, num_slots)
    return cluster


def add_ready(cluster: Cluster, replica: Replica, now_s: float = 0.0) -> Replica:
    cluster.add_replica(replica)
    cluster.set_state(replica.id, ReplicaState.READY, now_s)
    return replica


# ---------------------------------------------------------------------------------------------------------- slots


def test_replica_has_its_slots_until_it_is_removed() -> None:
    cluster = cluster_of("n")
    cluster.add_replica(Replica("r", "a", "n", num_slots=3))
    seen = [cluster.free_slots("n")]
    for state in (ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.STOPPING):
        cluster.set_state("r", state, 1.0)
        seen.append(cluster.free_slots("n"))
    assert seen == [1, 1, 1, 1]
    cluster.remove_replica("r")
    assert (cluster.free_slots("n"), cluster.num_slots("n")) == (4, 4)


def test_no_slot_is_given_twice() -> None:
    cluster = cluster_of("n")
    cluster.add_replica(Replica("r", "a", "n", num_slots=3))
    with pytest.raises(AssertionError, match="no room for s on n"):
        cluster.add_replica(Replica("s", "b", "n", num_slots=2))
    assert list(cluster.replicas) == ["r"]


def test_names_are_used_once() -> None:
    cluster = cluster_of("n")
    cluster.add_replica(Replica("r", "a", "n"))
    with pytest.raises(AssertionError, match="there already"):
        cluster.add_replica(Replica("r", "a", "n"))
    with pytest.raises(AssertionError, match="there already"):
        cluster.add_node("n", 1)


def test_node_takes_its_replicas_with_it() -> None:
    cluster = cluster_of("n", "m")
    for name, node in (("r2", "n"), ("r1", "n"), ("s", "m")):
        add_ready(cluster, Replica(name, "a", node))
    cluster.set_tier("n", "a", Tier.HOST)
    assert cluster.remove_node("n") == ["r1", "r2"]
    assert (list(cluster.nodes), list(cluster.replicas)) == (["m"], ["s"])
    assert cluster.candidates("a", 1, LOOKED_AT) == ["m"]
    cluster.validate()


# --------------------------------------------------------------------------------------------------------- states


def test_states_follow_the_table() -> None:
    reached = {(old, new) for old, after in NEXT.items() for new in after}
    for old in ReplicaState:
        for new in ReplicaState:
            cluster = cluster_of("n")
            cluster.add_replica(
                Replica("r", "a", "n", state=old, idle_since_s=0.0 if old is ReplicaState.READY else None)
            )
            if old is new or (old, new) in reached:
                cluster.set_state("r", new, 1.0)
                assert cluster.replicas["r"].state is new
                cluster.validate()
            else:
                with pytest.raises(AssertionError, match=f"cannot go from {old.name} to {new.name}"):
                    cluster.set_state("r", new, 1.0)


def test_times_of_a_replica() -> None:
    cluster = cluster_of("n")
    replica = add_ready(cluster, Replica("r", "a", "n", ordered_s=1.0), 3.0)
    assert (replica.ready_s, replica.idle_since_s, replica.state_since_s) == (3.0, 3.0, 3.0)
    cluster.begin_request("r", "q", prefix="", now_s=4.0)
    cluster.begin_request("r", "p", prefix="", now_s=4.0)
    cluster.end_request("r", "q", 5.0)
    assert cluster.replicas["r"].idle_since_s is None
    cluster.end_request("r", "p", 6.0)
    assert replica.idle_since_s == 6.0
    cluster.set_state("r", ReplicaState.DRAINING, 7.0)
    assert (cluster.replicas["r"].idle_since_s, replica.state_since_s) == (None, 7.0)
    cluster.set_state("r", ReplicaState.READY, 8.0)
    assert (replica.ready_s, replica.idle_since_s) == (3.0, 8.0)


def test_busy_replica_that_is_ready_again_is_not_idle() -> None:
    cluster = cluster_of("n")
    replica = add_ready(cluster, Replica("r", "a", "n"))
    cluster.begin_request("r", "q", prefix="", now_s=1.0)
    cluster.set_state("r", ReplicaState.DRAINING, 2.0)
    cluster.set_state("r", ReplicaState.READY, 3.0)
    assert replica.idle_since_s is None
    cluster.set_state("r", ReplicaState.DRAINING, 4.0)
    cluster.end_request("r", "q", 5.0)
    assert (replica.idle_since_s, replica.ongoing) == (None, set())


def test_replicas_by_state_in_the_order_they_came_into_it() -> None:
    cluster = cluster_of("n")
    for name in ("r1", "r2", "r3"):
        cluster.add_replica(Replica(name, "a", "n"))
    cluster.set_state("r3", ReplicaState.READY, 1.0)
    cluster.set_state("r1", ReplicaState.READY, 1.0)
    assert [replica.id for replica in cluster.replicas_of("a", ReplicaState.READY)] == ["r3", "r1"]
    assert [replica.id for replica in cluster.replicas_of("a")] == ["r2", "r3", "r1"]
    assert cluster.replicas_of("b") == ()


# ------------------------------------------------------------------------------------------------------- requests


def test_requests_go_to_replicas_that_are_ready_and_once() -> None:
    cluster = cluster_of("n")
    cluster.add_replica(Replica("r", "a", "n"))
    with pytest.raises(AssertionError, match="r is ORDERED"):
        cluster.begin_request("r", "q", prefix="", now_s=0.0)
    cluster.set_state("r", ReplicaState.READY, 0.0)
    cluster.begin_request("r", "q", prefix="", now_s=0.0)
    with pytest.raises(AssertionError, match="q is on r already"):
        cluster.begin_request("r", "q", prefix="", now_s=0.0)


def test_prefixes_are_the_last_ones_and_bounded() -> None:
    cluster = cluster_of("n")
    replica = add_ready(cluster, Replica("r", "a", "n"))
    for number in range(PREFIXES_MAX):
        cluster.begin_request("r", f"q{number}", prefix=f"p{number}", now_s=number)
    cluster.begin_request("r", "again", prefix="p0", now_s=100.0)
    cluster.begin_request("r", "unknown", prefix="", now_s=101.0)
    cluster.begin_request("r", "new", prefix="new", now_s=102.0)
    assert len(replica.prefixes) == PREFIXES_MAX
    assert "p1" not in replica.prefixes
    assert list(replica.prefixes.items())[-2:] == [("p0", 100.0), ("new", 102.0)]


def test_least_busy_come_first() -> None:
    cluster = cluster_of("n")
    for name in ("r3", "r1", "r2"):
        add_ready(cluster, Replica(name, "a", "n"))
    cluster.begin_request("r1", "q1", prefix="", now_s=0.0)
    cluster.begin_request("r1", "q2", prefix="", now_s=0.0)
    cluster.begin_request("r2", "q3", prefix="", now_s=0.0)
    assert [replica.id for replica in cluster.least_busy("a", 5)] == ["r3", "r2", "r1"]
    cluster.end_request("r2", "q3", 1.0)
    assert [replica.id for replica in cluster.least_busy("a", 1)] == ["r2"]
    assert cluster.least_busy("b", 1) == []


# ---------------------------------------------------------------------------------------------------------- loads


def test_loads_run_one_after_the_other() -> None:
    cluster = cluster_of("n")
    assert cluster.extend_load("n", 10.0, 5.0) == 15.0
    assert cluster.extend_load("n", 12.0, 5.0) == 20.0
    assert cluster.extend_load("n", 30.0, 1.0) == 31.0
    assert cluster.load_until_s("n") == 31.0


def test_load_that_ends_sooner_brings_its_node_forward() -> None:
    cluster = cluster_of("n", "m")
    for node in ("n", "m"):
        cluster.set_tier(node, "a", Tier.HOST)
    cluster.extend_load("m", 0.0, 5.0)
    cluster.extend_load("n", 0.0, 9.0)
    assert cluster.candidates("a", 1, 1) == ["m"]
    cluster.set_load_until("n", 2.0)
    assert cluster.candidates("a", 1, 1) == ["n"]
    cluster.validate()


def test_warmth_is_what_was_said_last() -> None:
    cluster = cluster_of("n")
    cluster.set_warm("n", False)
    assert not cluster.nodes["n"].is_warm


# ------------------------------------------------------------------------------------------------------ residency


def test_report_replaces_residency() -> None:
    cluster = cluster_of("n")
    cluster.set_residency("n", {"a": Tier.HOST, "b": Tier.DISK})
    cluster.set_residency("n", {"b": Tier.HOST, "c": Tier.REMOTE})
    assert [cluster.tier("n", model) for model in MODELS] == [Tier.REMOTE, Tier.HOST, Tier.REMOTE]
    assert cluster.nodes["n"].tiers == {"b": Tier.HOST}
    cluster.validate()


# --------------------------------------------------------------------------------------------------- worth a look


def test_candidates_are_those_in_host_then_on_disk_then_the_soonest() -> None:
    cluster = cluster_of("busy-host", "disk", "host", "soon", "sooner")
    cluster.set_tier("busy-host", "a", Tier.HOST)
    cluster.set_tier("host", "a", Tier.HOST)
    cluster.set_tier("disk", "a", Tier.DISK)
    for seconds, node in enumerate(("sooner", "soon", "host", "busy-host", "disk")):
        cluster.extend_load(node, 0.0, float(seconds))
    assert cluster.candidates("a", 1, 5) == ["host", "busy-host", "disk", "sooner", "soon"]
    assert cluster.candidates("a", 1, 1) == ["host", "sooner"]
    assert cluster.candidates("a", 5, 5) == []


def test_a_quarter_of_the_candidates_are_on_disk() -> None:
    hosts = [f"host-{number}" for number in range(4)]
    cluster = cluster_of(*hosts, "disk", "remote")
    for node in hosts:
        cluster.set_tier(node, "a", Tier.HOST)
        cluster.extend_load(node, 0.0, 100.0)
    cluster.set_tier("disk", "a", Tier.DISK)
    cluster.extend_load("disk", 0.0, 200.0)
    assert cluster.candidates("a", 1, 4) == [*hosts[:3], "disk", "remote"]


def test_no_slots_needed_makes_full_nodes_candidates() -> None:
    cluster = cluster_of("n", num_slots=1)
    add_ready(cluster, Replica("r", "a", "n"))
    assert cluster.candidates("b", 0, LOOKED_AT) == ["n"]


def test_node_is_found_again_when_its_slots_come_free() -> None:
    cluster = cluster_of("n", num_slots=1)
    cluster.set_tier("n", "a", Tier.HOST)
    add_ready(cluster, Replica("r", "b", "n"))
    assert cluster.candidates("a", 1, LOOKED_AT) == []
    cluster.remove_replica("r")
    assert cluster.candidates("a", 1, LOOKED_AT) == ["n"]


def test_order_follows_loads_that_were_added_since() -> None:
    cluster = cluster_of("n1", "n2", "n3")
    for node in ("n1", "n2", "n3"):
        cluster.set_tier(node, "a", Tier.HOST)
    seen = [cluster.candidates("a", 1, 1)]
    cluster.extend_load("n1", 0.0, 5.0)
    seen.append(cluster.candidates("a", 1, 1))
    cluster.extend_load("n2", 0.0, 9.0)
    cluster.set_tier("n3", "a", Tier.REMOTE)
    seen.append(cluster.candidates("a", 1, 1))
    assert seen == [["n1"], ["n2"], ["n1", "n3"]]
    cluster.validate()


def test_node_that_lost_the_model_is_not_offered_for_it_again() -> None:
    cluster = cluster_of("n", "m", num_slots=1)
    for node in ("n", "m"):
        cluster.set_tier(node, "a", Tier.HOST)
        add_ready(cluster, Replica(f"r-{node}", "b", node))
    assert cluster.candidates("a", 1, LOOKED_AT) == []
    cluster.set_tier("n", "a", Tier.REMOTE)
    cluster.set_tier("m", "a", Tier.REMOTE)
    cluster.set_tier("m", "a", Tier.HOST)
    cluster.remove_replica("r-n")
    cluster.remove_replica("r-m")
    assert cluster.candidates("a", 1, 1) == ["m"]
    cluster.validate()


def test_models_may_come_to_need_fewer_slots() -> None:
    cluster = cluster_of("n", num_slots=2)
    cluster.set_tier("n", "a", Tier.HOST)
    add_ready(cluster, Replica("r", "b", "n"))
    assert cluster.candidates("a", 2, LOOKED_AT) == []
    assert cluster.candidates("a", 1, LOOKED_AT) == ["n"]
    cluster.remove_replica("r")
    assert cluster.candidates("a", 1, LOOKED_AT) == ["n"]
    cluster.validate()


def test_node_is_evictable_while_its_replicas_are_idle() -> None:
    cluster = cluster_of("n", num_slots=2)
    add_ready(cluster, Replica("r", "b", "n", num_slots=2))
    assert cluster.evictable("a", 1, LOOKED_AT) == ["n"]
    assert cluster.movable("a", 1, LOOKED_AT) == []
    cluster.begin_request("r", "q", prefix="", now_s=1.0)
    assert cluster.evictable("a", 1, LOOKED_AT) == []
    cluster.set_tier("n", "a", Tier.DISK)
    assert cluster.movable("a", 1, LOOKED_AT) == ["n"]
    cluster.end_request("r", "q", 2.0)
    assert cluster.evictable("a", 1, LOOKED_AT) == ["n"]
    cluster.set_state("r", ReplicaState.DRAINING, 3.0)
    assert cluster.evictable("a", 1, LOOKED_AT) == []


def test_nobody_is_evicted_where_free_slots_suffice() -> None:
    cluster = cluster_of("n", num_slots=3)
    cluster.set_tier("n", "a", Tier.HOST)
    add_ready(cluster, Replica("r", "b", "n"))
    assert [cluster.evictable(model, 2, LOOKED_AT) for model in ("a", "c")] == [[], []]
    assert [cluster.evictable(model, 3, LOOKED_AT) for model in ("a", "c")] == [["n"], ["n"]]


def test_pinned_replica_is_not_evictable() -> None:
    cluster = cluster_of("n", num_slots=2)
    for name in ("r", "s"):
        add_ready(cluster, Replica(name, "b", "n"))
    for is_pinned in (True, True):
        cluster.set_pinned("r", is_pinned)
    assert [replica.id for replica in cluster.evictable_on("n")] == ["s"]
    assert cluster.evictable("a", 2, LOOKED_AT) == []
    assert cluster.evictable("a", 1, LOOKED_AT) == ["n"]


def test_nodes_whose_replicas_were_idle_longest_follow_those_with_the_model() -> None:
    cluster = cluster_of("n1", "n2", "n3", "n4", num_slots=1)
    for seconds, node in enumerate(("n3", "n1", "n4", "n2")):
        add_ready(cluster, Replica(f"r-{node}", "b", node), float(seconds))
    cluster.set_tier("n2", "a", Tier.HOST)
    assert cluster.evictable("a", 1, 3) == ["n2", "n3", "n1"]


def test_what_is_not_asked_for_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that comes and goes leaves entries in a heap only up to a bound."""
    monkeypatch.setattr(shortlist, "RUBBISH_MAX", 8)
    cluster = cluster_of("n", "m")
    cluster.set_tier("m", "a", Tier.HOST)
    cluster.set_tier("n", "a", Tier.HOST)
    seen = [cluster.candidates("a", 1, 2)]
    for _ in range(20):
        cluster.set_tier("n", "a", Tier.DISK)
        cluster.set_tier("n", "a", Tier.HOST)
    cluster.validate()
    seen.append(cluster.candidates("a", 1, 2))
    assert seen == [["m", "n"], ["m", "n"]]


# ----------------------------------------------------------------------------------------------------- invariants


@every_case("field", ["num_free", "num_busy", "idle_since_s", "load_until_s"])
def test_validate_sees_an_index_that_is_wrong(field: str) -> None:
    cluster = cluster_of("n")
    add_ready(cluster, Replica("r", "a", "n"))
    cluster.validate()
    setattr(cluster.nodes["n"], field, 7)
    with pytest.raises(AssertionError):
        cluster.validate()
