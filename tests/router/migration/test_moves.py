"""Requests that are moved while a client reads: every row of the failure table, over real sockets.

In each the client gets a whole and right answer, or one clean error.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sllm_vllm.router.migration import mover
from sllm_vllm.router.migration.leg import Leg
from tests.router.migration.move_bench import NUM_TOKENS, assert_whole, bench
from tests.router.migration.moving_engine import CREATED, owned_text, text_of
from tests.support.cases import every_case
from tests.support.fake_gate import until


async def test_a_stream_goes_on_at_its_target() -> None:
    async with bench() as one:
        await one.a.allow(17)
        await one.has(17)
        one.gate.order_move("b")
        await until(lambda: one.b.running, "the request at its target")
        await one.b.allow(NUM_TOKENS)
        client = await one.ended()
        await until(lambda: one.a.num_aborted, "the source to be let go")
    assert_whole(client)
    assert {event["created"] for event in client.events[:-1]} == {CREATED["a"]}
    assert one.b.fills == [27]
    (report,) = one.gate.moves
    assert (report.num_rounds, report.num_filled, report.num_moved) == (1, 27, 17)
    assert report.nbytes > 100
    resumed = one.b.bodies[-1]
    assert json.loads(owned_text(resumed))["choices"][0]["token_ids"] == list(range(17))
    assert one.gate.outcomes[0].how == "done"


async def test_the_source_streams_on_while_the_target_catches_up() -> None:
    async with bench() as one:
        one.b.gates["fill"] = asyncio.Event()
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        await until(lambda: one.b.bodies, "the first round")
        await one.a.allow(16)
        await one.has(16)
        one.b.gates["fill"].set()
        await until(lambda: one.b.running, "the switch")
        await one.b.allow(NUM_TOKENS)
        assert_whole(await one.ended())
    assert one.b.fills == [20, 26]


async def test_a_stream_is_held_right_after_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the pause that its client notices is as short as it can be."""
    waits, stock = asyncio.Event(), Leg.wait_given

    async def telling(leg: Leg, seconds_max: float) -> None:
        waits.set()  # nobody else runs until it waits
        await stock(leg, seconds_max)

    monkeypatch.setattr(Leg, "wait_given", telling)
    monkeypatch.setattr(mover, "GIVEN_S_MAX", 60.0)
    async with bench() as one:
        await one.a.allow(17)
        await one.has(17)
        one.gate.order_move("b")
        await until(waits.is_set, "the switch")
        await one.a.allow(18)
        await until(lambda: one.b.running, "the request at its target")
        await one.b.allow(NUM_TOKENS)
        assert_whole(await one.ended())
    assert json.loads(owned_text(one.b.bodies[-1]))["choices"][0]["token_ids"] == list(range(18))


async def test_an_answer_that_does_not_stream_is_moved_too() -> None:
    async with bench(stream=False) as one:
        await one.a.allow(9)
        await until(lambda: one.a.num_tokens == 9, "nine tokens")
        one.gate.order_move("b")
        await until(lambda: one.b.running, "the request at its target")
        await one.b.allow(NUM_TOKENS)
        client = await one.ended()
        await until(lambda: one.a.num_aborted, "the source to be let go")
    assert client.body["choices"][0]["text"] == text_of(NUM_TOKENS)
    assert client.body["usage"]["completion_tokens"] == NUM_TOKENS
    assert len(one.gate.moves) == 1


async def test_a_request_without_a_token_is_moved() -> None:
    async with bench() as one:
        one.gate.order_move("b")
        await until(lambda: one.b.running, "the request at its target")
        await one.b.allow(NUM_TOKENS)
        assert_whole(await one.ended())
    assert len(one.gate.moves) == 1


async def test_a_request_moves_there_and_back() -> None:
    async with bench() as one:
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        await one.b.allow(20)
        await one.moved()
        await one.has(20)
        one.gate.order_move("a")
        await one.a.allow(NUM_TOKENS)
        client = await one.ended()
    assert_whole(client)
    assert {event["created"] for event in client.events[:-1]} == {CREATED["a"]}
    assert len(one.gate.moves) == 2


# ---------------------------------------------------------------------------------------------------- the failure table


async def test_the_source_finishes_in_a_round() -> None:
    async with bench() as one:
        one.b.gates["fill"] = asyncio.Event()
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        await until(lambda: one.b.bodies, "the round")
        await one.a.allow(NUM_TOKENS)
        assert_whole(await one.ended())
        assert not one.b.running
    assert one.gate.moves == []


async def test_the_source_finishes_while_its_target_begins() -> None:
    """What was held is the client's."""
    async with bench() as one:
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        await until(lambda: one.b.running, "the switch")
        await one.a.allow(NUM_TOKENS)
        assert_whole(await one.ended())
        await until(lambda: one.b.num_aborted, "the target to be let go")
        assert one.gate.moves == []
        await one.next_on_a_streams()


async def test_the_source_dies_in_a_round() -> None:
    """What it had said of its tokens is enough."""
    async with bench() as one:
        one.b.gates["fill"] = asyncio.Event()
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        await until(lambda: one.b.bodies, "the round")
        one.a.die()
        await one.b.allow(NUM_TOKENS)
        assert_whole(await one.ended())
    assert one.gate.moves == []
    assert [(failure.has_begun, failure.is_proven) for failure in one.gate.failures] == [(True, True)]


async def test_the_source_of_a_plain_answer_dies_in_a_round() -> None:
    """Nothing was sent: it is asked once more."""
    async with bench(stream=False) as one:
        one.b.gates["fill"] = asyncio.Event()
        await one.a.allow(10)
        await until(lambda: one.a.num_tokens == 10, "ten tokens")
        one.gate.order_move("b")
        await until(lambda: one.b.bodies, "the round")
        one.a.die()
        await one.b.allow(NUM_TOKENS)
        client = await one.ended()
    assert client.body["choices"][0]["text"] == text_of(NUM_TOKENS)
    assert len(one.gate.retries) == 1


async def test_the_source_dies_at_the_switch() -> None:
    """The target has all that the client has."""
    async with bench() as one:
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        await until(lambda: one.b.running, "the switch")
        one.a.die()
        await one.b.allow(NUM_TOKENS)
        assert_whole(await one.ended())
    assert len(one.gate.moves) == 1


@every_case("when", ["fill", "resumed"])
async def test_the_target_dies_before_it_goes_on(when: str) -> None:
    async with bench() as one:
        one.b.gates[when] = asyncio.Event()
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        wanted = 1 if when == "fill" else 2
        await until(lambda: len(one.b.bodies) == wanted, when)
        one.b.die()
        assert (await one.refused())[1] is False
        await one.a.allow(NUM_TOKENS)
        assert_whole(await one.ended())
    assert one.gate.moves == []


async def test_the_target_dies_just_after_the_switch() -> None:
    """It goes on at a third engine, or where it came from."""
    async with bench() as one:
        one.gate.attempts_max = 3
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        await one.b.allow(12)
        await one.moved()
        await one.has(12)
        one.b.die()
        await one.a.allow(NUM_TOKENS)
        client = await one.ended()
    assert_whole(client)
    assert {event["created"] for event in client.events[:-1]} == {CREATED["a"]}
    assert [failure.has_begun for failure in one.gate.failures] == [True, True]  # the gate gave the dead one first
    assert one.gate.outcomes[0].how == "done"


async def test_a_stream_whose_engine_dies_goes_on_at_another() -> None:
    async with bench() as one:
        await one.a.allow(17)
        await one.has(17)
        one.a.die()
        await until(lambda: one.b.running, "the request at the other")
        await one.b.allow(NUM_TOKENS)
        client = await one.ended()
    assert_whole(client)
    assert {event["created"] for event in client.events[:-1]} == {CREATED["a"]}
    assert json.loads(owned_text(one.b.bodies[-1]))["choices"][0]["token_ids"] == list(range(17))
    assert one.gate.outcomes[0].how == "done"
    assert one.gate.num_first_bytes == 2


async def test_a_stream_outlives_several_engines() -> None:
    async with bench() as one:
        one.gate.attempts_max = 3
        await one.a.allow(10)
        await one.has(10)
        one.a.die()
        await one.b.allow(20)
        await one.has(20)
        one.a.is_dead = False
        one.b.die()
        await one.a.allow(NUM_TOKENS)
        assert_whole(await one.ended())


@every_case(
    "wrong, reason",
    [
        ({"resumed_status": 400}, "it answers 400: queue full"),
        ({"says_error": True}, "no blocks left"),
        ({"is_deaf": True}, "it began anew"),
        ({"says_no_tokens": True}, "it began anew"),
        ({"is_dead": True}, "it broke off"),
    ],
)
async def test_a_stream_that_cant_go_on_ends_with_one_error(wrong: dict[str, Any], reason: str) -> None:
    """Nothing that may be wrong goes to its client."""
    async with bench() as one:
        for name, value in wrong.items():
            setattr(one.b, name, value)
        await one.a.allow(17)
        await one.has(17)
        one.a.die()
        await one.b.allow(NUM_TOKENS)
        client = await one.ended()
    assert client.text == text_of(17)
    assert client.events[-1]["error"]["code"] == "engine_failed"
    assert [event for event in client.events if "error" in event] == client.events[-1:]
    assert reason in one.gate.retries[-1]


async def test_a_stream_whose_engine_said_nothing_of_its_tokens_ends_with_one_error() -> None:
    async with bench() as one:
        one.a.says_no_tokens = True
        await one.a.allow(1)
        await one.has(1)
        one.a.die()
        client = await one.ended()
    assert client.events[-1]["error"]["code"] == "engine_failed"
    assert one.gate.retries == []
    assert one.gate.outcomes[0].how == "engine_failed"


async def test_notes_are_not_for_clients() -> None:
    async with bench() as one:
        await one.a.allow(NUM_TOKENS)
        client = await one.ended()
    assert_whole(client)
    assert client.comments == []


@every_case(
    "wrong, reason, is_lasting",
    [
        ({"fill_status": 503}, "the target answers 503", False),
        ({"resumed_status": 429}, "the target answers 429: queue full", False),
        ({"says_error": True}, "no blocks left", False),
        (
            {"state": {"resume": False, "reason": "a hook is missing"}},
            "b takes over no requests: a hook is missing",
            False,
        ),
        ({"state": {"resume": True, "max_model_len": 12}}, "20 tokens fill the target's context", True),
        ({"state": {"resume": True, "block_size": None}}, "is not understood", True),
    ],
)
async def test_a_target_that_refuses_costs_the_client_nothing(
    wrong: dict[str, Any], reason: str, is_lasting: bool
) -> None:
    async with bench() as one:
        for name, value in wrong.items():
            setattr(one.b, name, value)
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        told = await one.refused()
        await one.a.allow(NUM_TOKENS)
        assert_whole(await one.ended())
    assert reason in told[0]
    assert told[1] is is_lasting


async def test_a_target_whose_queue_stands_still_gives_the_client_back() -> None:
    """It accepts, and generates nothing: the client gets what the source made meanwhile."""
    async with bench(switch_timeout=0.3) as one:
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        await until(lambda: len(one.b.bodies) == 2, "the switch")
        await one.a.allow(25)
        assert "did not go on within 0.3 s" in (await one.refused())[0]
        await one.has(25)
        await one.a.allow(NUM_TOKENS)
        assert_whole(await one.ended())
        await until(lambda: one.b.num_aborted, "the target to be let go")


async def test_what_cant_be_moved_stays() -> None:
    async with bench() as one:
        one.a.immovable = "its prompt has media"
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        assert await one.refused() == ("its prompt has media", True)
        await one.a.allow(NUM_TOKENS)
        assert_whole(await one.ended())


async def test_other_apis_are_not_moved() -> None:
    async with bench(path="/v1/responses") as one:
        one.gate.order_move("b")
        assert await one.refused() == ("an answer of /v1/responses is not moved", True)
        await one.a.allow(NUM_TOKENS)
        assert_whole(await one.ended())


async def test_a_move_that_is_ordered_twice_is_one() -> None:
    async with bench() as one:
        one.b.gates["fill"] = asyncio.Event()
        await one.a.allow(10)
        await one.has(10)
        one.gate.order_move("b")
        one.gate.order_move("b")
        assert await one.refused() == ("it is moving already", False)
        one.b.gates["fill"].set()
        await one.b.allow(NUM_TOKENS)
        assert_whole(await one.ended())
    assert len(one.gate.moves) == 1


async def test_an_order_for_where_it_is_no_more_is_refused() -> None:
    async with bench() as one:
        one.gate.order_move("b", source="c")
        assert await one.refused() == ("it is on a, not on c", False)
        await one.a.allow(NUM_TOKENS)
        assert_whole(await one.ended())


@every_case("when", ["tokens", "fill", "resumed", "moved"])
async def test_a_client_that_leaves_leaves_nothing_behind(when: str) -> None:
    async with bench() as one:
        await one.a.allow(10)
        await one.has(10)
        stopped = {"tokens": one.a, "fill": one.b, "resumed": one.b}.get(when)
        if stopped is not None:
            stopped.gates[when] = asyncio.Event()
        one.gate.order_move("b")
        if when == "moved":
            await one.b.allow(12)
            await one.moved()
        elif when != "tokens":
            await until(lambda: len(one.b.bodies) == (1 if when == "fill" else 2), when)
        one.reading.cancel()
        await until(lambda: one.gate.outcomes, "the end of the ticket")
        assert one.gate.outcomes[0].how == "client_left"
        for event in (*one.a.gates.values(), *one.b.gates.values()):
            event.set()
        await until(lambda: not one.a.running and not one.b.running, "both engines to be idle")
    assert one.gate.followers == {}


async def test_an_engine_is_asked_whether_it_has_begun_a_plain_answer() -> None:
    """Of which nothing is seen before it is whole: so its request is no suspect if the engine dies of another."""
    async with bench(stream=False) as one:
        await one.a.allow(3)
        await until(lambda: one.gate.num_first_tokens, "the first token to be told")
        await one.a.allow(NUM_TOKENS)
        await one.ended()
    assert one.gate.num_first_tokens == 1
