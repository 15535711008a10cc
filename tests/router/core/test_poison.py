"""Requests that kill their engines: who is refused, who is tried alone, and that others lose nothing. All invariants
hold after every event."""

from __future__ import annotations

import random

from sllm_vllm.router.core.deaths import Deaths, DigestTable
from sllm_vllm.router.core.events import FirstToken, NodeLost, Refusal, ReplicaEnded, RequestFailed
from sllm_vllm.router.core.facts import FailureSign, PoisonLimits, RequestFacts, RouterLimits
from tests.router.core.router_bench import RouterBench
from tests.support.cases import every_case

POISON = "digest of the poison"


def bench_with(*, num_slots: int = 2, **fields: object) -> RouterBench:
    bench = RouterBench(RouterLimits(poison=PoisonLimits(last_replica_s=20.0)))
    bench.node("n", num_slots)
    bench.deploy("m", **{"max_replicas": num_slots, "target_ongoing": 4, "keep_alive_s": 1000.0, **fields})
    return bench


def running(bench: RouterBench, num: int, *, proven: bool = True) -> list[str]:
    """So many requests that run, each with an answer that has begun or not; replicas start as they are wanted."""
    names = [bench.ask("m", digest=f"d{index}") for index in range(num)]
    while bench.starting:
        bench.start()
    for name in names:
        assert name in bench.books.running
        if proven:
            bench.answer(name)
    return names


def die_of(bench: RouterBench, request: str) -> str:
    """The engine of a request dies, and everybody who had nothing yet notices."""
    replica = bench.books.running[request]
    crash(bench, replica)
    return replica


def crash(bench: RouterBench, replica: str) -> None:
    others = [name for name, where in bench.books.running.items() if where == replica]
    bench.crash(replica)
    for name in others:
        if bench.core.requests[name].is_proven:
            resume(bench, name)
        else:
            bench.notice(name)


def resume(bench: RouterBench, name: str) -> None:
    """The ingress notices that a stream broke off, and can have it continued."""
    bench.lost.pop(name, None)
    bench.moving.pop(name, None)
    del bench.books.running[name]
    bench.books.waiting[name] = None
    bench.tell(RequestFailed(name, "it broke off", has_begun=True, is_proven=True))


# --------------------------------------------------------------------------------------------------------- one suspect


def test_a_request_that_was_alone_new_is_refused_and_not_sent_again() -> None:
    bench = bench_with()
    others = running(bench, 3)
    poison = bench.ask("m", digest=POISON)
    assert poison in bench.books.running
    die_of(bench, poison)
    rejected = bench.books.rejected[poison]
    assert (rejected.why, rejected.reason) == (Refusal.KILLED_ENGINE, "ended by signal 9")
    assert rejected.retry_after_s == PoisonLimits().quarantine_s
    assert not set(others) & set(bench.books.rejected)


def test_its_digest_is_refused_on_every_replica_for_a_while_and_no_longer() -> None:
    bench = bench_with()
    running(bench, 6)
    poison = bench.ask("m", digest=POISON)
    die_of(bench, poison)
    bench.wait(100.0)
    again = bench.ask("m", digest=POISON)
    assert bench.books.rejected[again].why is Refusal.KILLED_ENGINE
    assert bench.books.rejected[again].retry_after_s == PoisonLimits().quarantine_s - 100
    assert bench.ask("m", digest="another") not in bench.books.rejected
    bench.wait(PoisonLimits().quarantine_s)
    assert bench.ask("m", digest=POISON) not in bench.books.rejected


def test_what_engines_have_answered_before_is_tried_alone_before_it_is_refused() -> None:
    """A health probe, the same from many clients, was new when its engine died of something else."""
    bench = bench_with(num_slots=1)
    probe = bench.ask("m", digest="probe")
    bench.start()
    bench.answer(probe)
    bench.end(probe)
    bench.wait(60.0)
    again = bench.ask("m", digest="probe")
    die_of(bench, again)
    bench.wait(2.0)
    bench.start()
    assert list(bench.books.running) == [again]
    bench.answer(again)
    assert bench.ask("m", digest="probe") in bench.books.running


@every_case("num_first", [1, 2])
def test_what_kills_on_its_trial_is_refused_though_it_was_answered_before(num_first: int) -> None:
    bench = bench_with(num_slots=1)
    running(bench, num_first)
    for name in list(bench.books.running):
        bench.end(name)
    requests = running(bench, num_first, proven=False)
    die_of(bench, requests[0])
    bench.wait(2.0)
    bench.start()
    die_of(bench, requests[0])
    assert bench.books.rejected[requests[0]].why is Refusal.KILLED_ENGINE


def test_what_another_engine_answers_meanwhile_is_refused_no_longer() -> None:
    bench = bench_with(target_ongoing=1, ongoing_max=1)
    probes = [bench.ask("m", digest="probe") for _ in range(2)]
    while bench.starting:
        bench.start()
    assert bench.books.running.keys() == set(probes)
    die_of(bench, probes[0])
    assert bench.books.rejected[probes[0]].why is Refusal.KILLED_ENGINE
    bench.answer(probes[1])
    assert bench.ask("m", digest="probe") not in bench.books.rejected


@every_case("is_unseen", [False, True])
def test_an_end_that_no_agent_has_seen_makes_no_suspects(is_unseen: bool) -> None:
    """Its agent was started again, and has ended all engines."""
    bench = bench_with()
    request = bench.ask("m", digest="d")
    replica = bench.start()
    bench.ready.pop(replica)
    bench.tell(ReplicaEnded(replica, "no replica has this id", is_fault=True, is_unseen=is_unseen))
    bench.lost[request] = None
    bench.notice(request)
    assert (request in bench.books.rejected) is not is_unseen


def test_streams_of_the_dead_engine_go_on_at_the_other() -> None:
    bench = bench_with()
    others = running(bench, 8)
    poison = bench.ask("m", digest=POISON)
    dead = die_of(bench, poison)
    assert dead not in bench.ready
    assert all(name in bench.books.running for name in others)
    assert {bench.books.running[name] for name in others} == set(bench.ready)


def test_a_token_that_nobody_has_seen_yet_clears_a_request() -> None:
    """A plain answer comes whole; its engine says that it has begun."""
    bench = bench_with()
    plain = running(bench, 1, proven=False)[0]
    bench.tell(FirstToken(plain))
    poison = bench.ask("m", digest=POISON)
    replica = bench.books.running[poison]
    assert bench.books.running[plain] == replica
    bench.crash(replica)
    bench.notice(plain)
    bench.notice(poison)
    assert bench.books.rejected[poison].why is Refusal.KILLED_ENGINE
    bench.wait(1.0)
    bench.start()
    assert plain in bench.books.running


def test_a_request_that_was_never_delivered_is_no_suspect() -> None:
    bench = bench_with(num_slots=1)
    late, poison = running(bench, 2, proven=False)
    replica = bench.books.running[poison]
    bench.notice(late, FailureSign.UNREACHED)
    bench.notice(poison)
    bench.ready.pop(replica)
    bench.tell(ReplicaEnded(replica, "exited with status 1", is_fault=True))
    assert bench.books.rejected[poison].why is Refusal.KILLED_ENGINE
    bench.wait(1.0)
    bench.start()
    assert late in bench.books.running


def test_an_engine_that_says_that_its_core_died_is_believed_before_it_has_ended() -> None:
    bench = bench_with()
    running(bench, 3)
    poison = bench.ask("m", digest=POISON)
    bench.notice(poison, FailureSign.CORE_DIED)
    assert bench.books.rejected[poison].why is Refusal.KILLED_ENGINE


@every_case("how", ["node lost", "never ended", "stopped"])
def test_where_no_engine_died_by_itself_nobody_is_suspected(how: str) -> None:
    bench = bench_with()
    bench.node("n2", 1)
    request = running(bench, 1, proven=False)[0]
    replica = bench.books.running[request]
    bench.notice(request)
    assert request in bench.core.deaths
    if how == "node lost":
        node = bench.ready.pop(replica)
        bench.tell(NodeLost(node))
    elif how == "stopped":
        bench.ready.pop(replica)
        bench.tell(ReplicaEnded(replica, "stop asked"))
    else:
        bench.wait(PoisonLimits().verdict_s)
    if bench.starting:
        bench.start()
    assert request in bench.books.running
    assert not bench.core.requests[request].is_suspect


# ------------------------------------------------------------------------------------------------------- many suspects


def test_several_are_tried_one_at_a_time_and_each_alone() -> None:
    bench = bench_with()
    suspects = running(bench, 3, proven=False)
    die_of(bench, suspects[0])
    for name in suspects:
        bench.wait(1.0)
        while bench.starting:
            bench.start()
        assert [one for one in suspects if one in bench.core.trials.tried()] == [name]
        bench.answer(name)
        bench.end(name)
    assert not bench.books.rejected


def test_suspects_get_their_turn_on_an_only_replica_that_is_never_empty() -> None:
    bench = bench_with(num_slots=1)
    suspects = running(bench, 3, proven=False)
    die_of(bench, suspects[0])
    bench.wait(1.0)
    bench.start()
    streams = [suspects[0]]
    bench.answer(suspects[0])
    for _ in range(60):
        streams.append(bench.ask("m"))
        bench.wait(1.0)
        for name in (*streams, *suspects):
            if name in bench.books.running and not bench.core.requests[name].is_proven:
                bench.answer(name)
        if len(streams) > 3 and streams[0] in bench.books.running:
            bench.end(streams.pop(0))
    assert all(name in bench.books.running for name in suspects[1:])
    assert not bench.books.rejected


def test_an_only_replica_is_closed_for_a_suspect_no_longer_than_a_trial_takes() -> None:
    bench = bench_with(num_slots=1)
    suspects = running(bench, 2, proven=False)
    die_of(bench, suspects[0])
    bench.wait(1.0)
    bench.start()
    bench.answer(suspects[0])
    stuck = bench.ask("m")
    bench.wait(25.0)
    late = bench.ask("m")
    assert (stuck in bench.books.running, late in bench.books.waiting) == (True, True)
    bench.wait(PoisonLimits().trial_s)
    assert late in bench.books.running


def test_nothing_is_sent_to_a_replica_on_trial() -> None:
    bench = bench_with(num_slots=1)
    suspects = running(bench, 2, proven=False)
    die_of(bench, suspects[0])
    bench.wait(1.0)
    bench.start()
    other = bench.ask("m")
    assert list(bench.books.running) == [suspects[0]]
    bench.answer(suspects[0])
    assert list(bench.books.running) == [*suspects[:1], other]


def test_a_killer_among_several_is_found_and_costs_no_one_else_anything() -> None:
    bench = bench_with()
    innocent, poison = running(bench, 2, proven=False)
    streams = running(bench, 6)
    assert len(bench.ready) == 2
    dead = die_of(bench, poison)
    survivor = next(iter(bench.ready))
    assert dead != survivor
    assert {bench.books.running[name] for name in streams} == {survivor}
    bench.wait(1.0)
    bench.start()
    for _ in range(3):
        tried = [one for one in (innocent, poison) if one in bench.books.running]
        if tried == [poison]:
            die_of(bench, poison)
        elif tried:
            bench.answer(innocent)
            bench.end(innocent)
        bench.wait(1.0)
    assert bench.books.rejected[poison].why is Refusal.KILLED_ENGINE
    assert innocent in bench.books.ended
    assert survivor in bench.ready
    assert all(name in bench.books.running for name in streams)


def test_a_suspect_whose_client_asks_again_is_tried_alone_again() -> None:
    bench = bench_with(num_slots=1)
    requests = running(bench, 2, proven=False)
    replica = bench.books.running[requests[0]]
    for name in requests:
        bench.lost.pop(name, None)
    bench.crash(replica)
    bench.notice(requests[0])
    bench.leave(requests[1])
    bench.wait(1.0)
    bench.start()
    again = bench.ask("m", digest="d1")
    assert bench.core.requests[again].is_suspect
    assert list(bench.books.running) == [requests[0]]


def test_an_engine_that_lives_long_enough_with_a_suspect_clears_it() -> None:
    bench = bench_with(num_slots=1)
    first, second = running(bench, 2, proven=False)
    die_of(bench, first)
    bench.wait(1.0)
    bench.start()
    assert list(bench.books.running) == [first]
    bench.wait(PoisonLimits().trial_s)
    assert not bench.core.requests[first].is_suspect
    bench.end(first)
    assert list(bench.books.running) == [second]


def test_the_last_replica_is_not_risked_while_another_may_come() -> None:
    bench = bench_with()
    for name in running(bench, 5):
        bench.end(name)
    assert len(bench.ready) == 2
    suspects = [bench.ask("m", digest=f"s{index}", prefix="same") for index in range(2)]
    (replica,) = {bench.books.running[name] for name in suspects}
    crash(bench, replica)
    assert (len(bench.ready), bench.books.running) == (1, {})
    bench.wait(2.0)
    assert not bench.books.running
    bench.start()
    assert list(bench.books.running) == suspects[:1]


def test_the_last_replica_is_risked_after_a_while_if_no_other_comes() -> None:
    bench = bench_with()
    for name in running(bench, 5):
        bench.end(name)
    suspects = [bench.ask("m", digest=f"s{index}", prefix="same") for index in range(2)]
    crash(bench, bench.books.running[suspects[0]])
    bench.wait(19.0)
    assert not bench.books.running
    bench.wait(1.5)
    assert list(bench.books.running) == suspects[:1]


def test_of_several_busy_replicas_one_runs_empty_for_a_suspect() -> None:
    bench = bench_with()
    streams = running(bench, 5)
    suspects = [bench.ask("m", digest=f"s{index}", prefix="same") for index in range(2)]
    (replica,) = {bench.books.running[name] for name in suspects}
    crash(bench, replica)
    bench.wait(2.0)
    busy = [bench.ask("m") for _ in range(3)]
    if bench.starting:
        bench.start()
    assert len(bench.ready) == 2
    assert [name for name in suspects if name in bench.books.running] == suspects[:1]
    assert all(name in bench.books.running for name in (*streams, *busy))


# -------------------------------------------------------------------------------------------------- streams that go on


def test_a_stream_goes_on_only_where_answers_are_the_same() -> None:
    bench = bench_with(lineage=1)
    stream = running(bench, 1)[0]
    replica = bench.books.running[stream]
    bench.deploy("m", generation=1, lineage=2, max_replicas=2)
    bench.start()
    crash(bench, replica)
    assert stream in bench.books.waiting
    bench.wait(200.0)
    assert stream in bench.books.rejected


def test_a_stream_whose_engines_die_again_and_again_is_tried_alone_and_then_refused() -> None:
    bench = bench_with(num_slots=1)
    stream = running(bench, 1)[0]
    for num in range(3):
        crash(bench, bench.books.running[stream])
        if num < 2:
            bench.wait(4.0)
            bench.start()
            assert bench.core.requests[stream].is_suspect == (num == 1)
            bench.answer(stream)
    assert bench.books.rejected[stream].why is Refusal.ENGINE_FAILED


# -------------------------------------------------------------------------------------------------------------- orders


@every_case("seed", range(40))
def test_in_any_order_of_arrivals_a_killer_costs_its_neighbours_nothing(seed: int) -> None:
    """Twelve streams and one poison on two replicas: engines die of the poison as they get to it. Of those that served
    anyone else when the poison came only one dies, and all twelve end."""
    chance = random.Random(seed)
    bench = bench_with(num_slots=3, max_replicas=2, target_ongoing=6, ongoing_max=16)
    order = ["poison"] + [f"s{index}" for index in range(12)]
    chance.shuffle(order)
    names: dict[str, str] = {}
    harmed = 0
    for label in order:
        names[label] = bench.ask("m", digest=label)
        if chance.random() < 0.5:
            bench.wait(0.1)
        harmed += play(bench, names, chance, is_eager=False)
    for _ in range(400):
        bench.wait(0.5)
        harmed += play(bench, names, chance, is_eager=True)
        if not bench.books.waiting and not bench.books.running:
            break
    assert bench.books.rejected[names["poison"]].why is Refusal.KILLED_ENGINE
    assert {names[f"s{index}"] for index in range(12)} <= bench.books.ended
    assert harmed <= 1


def play(bench: RouterBench, names: dict[str, str], chance: random.Random, *, is_eager: bool) -> int:
    """Engines do something: start, answer, end, or die of the poison. How many died beside other requests."""
    while bench.starting and (is_eager or chance.random() < 0.5):
        bench.start()
    harmed = 0
    poison = names.get("poison", "")
    running_now = list(bench.books.running)
    chance.shuffle(running_now)
    for name in running_now:
        if name not in bench.books.running or chance.random() < 0.5:
            continue
        if name == poison:
            replica = bench.books.running[name]
            harmed += list(bench.books.running.values()).count(replica) > 1
            crash(bench, replica)
        elif not bench.core.requests[name].is_proven:
            bench.answer(name)
        elif is_eager and chance.random() < 0.2:
            bench.end(name)
    return harmed


# --------------------------------------------------------------------------------------------------------------- parts


def test_a_table_of_digests_is_bounded_and_forgets_the_earliest() -> None:
    table = DigestTable(2)
    for index, name in enumerate(("a", "b", "c")):
        table.add(name, 10.0 + index)
    table.add("", 99.0)
    assert len(table) == 2
    assert [table.seconds_left(name, 0.0) for name in ("a", "b", "c", "")] == [0.0, 11.0, 12.0, 0.0]
    assert table.seconds_left("b", 11.0) == 0.0
    assert len(table) == 1
    table.add("c", 5.0)
    assert table.seconds_left("c", 0.0) == 12.0


def test_a_suspect_that_leaves_stays_one() -> None:
    """Else a killer whose client hangs up would be looked for among its neighbours."""
    deaths = Deaths(5.0)
    deaths.suspect("r", [RequestFacts("p", "m"), RequestFacts("q", "m")], 0.0)
    assert deaths.failed("r", "q", FailureSign.BROKE_OFF)
    deaths.left("p")
    deaths.ended("r", "signal 6", is_fault=True)
    (verdict,) = deaths.due(0.0)
    assert [one.id for one in verdict.suspects] == ["p", "q"]
    assert verdict.held == ("q",)
