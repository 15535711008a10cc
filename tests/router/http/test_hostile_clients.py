"""Clients that are slow, or send rubbish, against the whole router: others are served, and nothing of them is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tests.support.router_process import RouterUnderTest, running_router, write_config
from tests.support.waiting import DEADLINE_S, wait_until

MIB = 1 << 20
NUM_SLOW = 24
NUM_EACH = 8
"""Of each kind of slow writers."""
NUM_RUBBISH = 1000
AT_ONCE = 50
SEED = 20_261_120
KEY = "a-client-key"
BODY = json.dumps({"model": "fine", "prompt": "hello"}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
METHODS = (b"POST", b"POST", b"POST", b"GET", b"PUT", b"\x16\x03")
PATHS = (
    *[b"/v1/completions"] * 5,
    b"/v1/models",
    b"/sllm/v1/models",
    b"/metrics",
    b"/health",
    b"/v1/x/../y",
    b"*",
    b"//",
)


def assert_serves(router: RouterUnderTest, key: str = "") -> None:
    assert router.post("fine", key=key).status == 200


# ---------------------------------------------------------------------------------------------------- slow readers


def test_readers_that_take_nothing_cost_little_memory_and_harm_nobody(tmp_path: Path) -> None:
    """Each would get 64 MiB, as fast as the engine can."""
    write_config(tmp_path, "fine", defaults={"ongoing_max": 2 * NUM_SLOW, "target_ongoing": 2 * NUM_SLOW})
    wish = {"events": 1024, "pad": 64 << 10}
    with running_router(tmp_path) as router, contextlib.ExitStack() as slow:
        assert len(router.streaming("fine", fake=wish | {"events": 64}).rest()) == 66
        descriptors = router.num_descriptors()
        router.forget_peak()
        before = router.memory_nbytes()
        for _ in range(NUM_SLOW):
            slow.callback(router.streaming("fine", fake=wish).close)
        wait_until(lambda: is_held_up(router), "the engine to be held up")
        assert len(router.streaming("fine", fake=wish | {"events": 64}).rest()) == 66
        assert_serves(router)
        assert is_held_up(router)
        assert router.memory_nbytes("VmHWM") - before < 2 * NUM_SLOW * MIB
        slow.close()
        wait_until(lambda: router.num_ongoing() == 0, "all to have left")
        wait_until(lambda: router.num_descriptors() <= descriptors, "their connections to be closed")
        assert_serves(router)


def is_held_up(router: RouterUnderTest) -> bool:
    stats = router.ask_engine("/stats")
    return bool(stats["streams"] == NUM_SLOW and stats["quiet_s"] > 0.5)


# ---------------------------------------------------------------------------------------------------- slow writers


async def test_writers_that_never_end_are_ended_and_others_served_meanwhile(tmp_path: Path) -> None:
    """Heads and bodies a byte at a time, and connections that say nothing at all."""
    whole = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
    write_config(tmp_path, "fine", server={"port": 0, "body_timeout": 1})
    limits = {"head_s_max": 1}
    with running_router(tmp_path, ingress=limits) as router:
        await asyncio.to_thread(assert_serves, router)
        descriptors = router.num_descriptors()
        slow = [
            trickle(router.address, data, at)
            for data, at in [(b"", 0), (whole, 20), (whole, len(whole) - 9)] * NUM_EACH
        ]
        trickling = asyncio.gather(*slow)
        served = 0
        while not trickling.done():
            await asyncio.to_thread(assert_serves, router)
            served += 1
        for silent, head, body in zip(*[iter(await trickling)] * 3, strict=True):
            assert silent == ""
            assert head in {"408", "reset"}
            assert body in {"408", "reset"}
        assert served >= 1
        await asyncio.to_thread(
            wait_until, lambda: router.log.count("status=408") == NUM_EACH, "the bodies to be told of"
        )
        await asyncio.to_thread(wait_until, lambda: router.num_descriptors() <= descriptors, "them to be closed")


async def trickle(address: tuple[str, int], data: bytes, at: int) -> str:
    """Send all up to ``at`` at once, then one byte after another, the last ones never. The status it is told.

    Who sends a byte more just as it is told may get a reset instead.
    """
    reader, writer = await asyncio.open_connection(*address)
    answer = asyncio.ensure_future(reader.read())
    async with asyncio.timeout(DEADLINE_S):
        writer.write(data[:at])
        for nth in range(at, len(data) - 2):
            await asyncio.wait({answer}, timeout=0.2)
            if answer.done():
                break
            writer.write(data[nth : nth + 1])
        try:
            told = (await answer).split(b" ")
        except ConnectionError:
            return "reset"
        finally:
            writer.close()
    return told[1].decode() if len(told) > 1 else ""


# --------------------------------------------------------------------------------------------------------- rubbish


async def test_a_thousand_requests_that_are_wrong_harm_nobody(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    write_config(
        tmp_path,
        "fine",
        keys={"clients": [{"file": "./keys"}]},
        server={"port": 0, "body_timeout": 0.5, "body_bytes": "64KiB"},
    )
    with running_router(tmp_path, ingress={"head_s_max": 0.5}) as router:
        await asyncio.to_thread(assert_serves, router, KEY)
        descriptors = router.num_descriptors()
        gate = asyncio.Semaphore(AT_ONCE)
        wrong = list(requests_gone_wrong(NUM_RUBBISH))
        statuses = await asyncio.gather(*(first_status(router.address, data, gate) for data in wrong))
        failed = {data: status for data, status in zip(wrong, statuses, strict=True) if int(status or 0) >= 500}
        assert failed == {}
        assert {"400", "401", "404", "405", "408", "413"} <= set(statuses)
        assert await whole_status(router.address, b"") == 200
        for head in (
            b"authorization: Bearer wrong\r\n",
            b"authorization: Basic x\r\n",
            b"x-api-key: wrong\r\n",
        ):
            assert await whole_status(router.address, head, key=b"") == 401
        await asyncio.to_thread(wait_until, lambda: router.num_descriptors() <= descriptors, "them to be closed")
        await asyncio.to_thread(wait_until, lambda: router.num_ongoing() == 0, "all places to be free")
        assert "Traceback" not in router.log


def requests_gone_wrong(num: int) -> Iterator[bytes]:
    """From one seed: requests of which bytes are changed, cut out, doubled or put in; smuggled ones among them."""
    dice = random.Random(SEED)
    smuggled = b"POST /sleep HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    lines = (
        b"transfer-encoding: chunked\r\n",
        b"transfer-encoding: identity, chunked\r\n",
        b"transfer-encoding : chunked\r\n",
        b"content-length: 3\r\n",
        b"content-length: -1\r\n",
        b"content-length: 99999999999999999999\r\n",
        b"content-length: 70000\r\n",
        b"content-encoding: gzip\r\n",
        b"expect: 100-continue\r\n",
        b"x-a: " + b"a" * 70_000 + b"\r\n",
        b"x-a: b\x00\r\n",
        b"",
    )
    for _ in range(num):
        body = dice.choice((BODY, b"", b"[" * 5000, b'{"model": 1}', b'{"model": "no"}', b"x" * 70_000, smuggled))
        key = dice.choice((KEY, KEY, "wrong"))
        head = b"%b %b HTTP/1.1\r\nhost: x\r\n" % (
            dice.choice(METHODS),
            dice.choice(PATHS),
        )
        head += b"content-type: application/json\r\nauthorization: Bearer %b\r\n" % key.encode()
        head += dice.choice(lines) + b"content-length: %d\r\n\r\n" % len(body)
        yield mutated(head + body, dice)


def mutated(data: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(data))
    end = at + dice.randrange(1, 20)
    match dice.choice(("leave", "change", "cut", "cut off", "double", "put in")):
        case "change":
            return data[:at] + dice.randbytes(1) + data[at + 1 :]
        case "cut":
            return data[:at] + data[end:]
        case "cut off":
            return data[: at + 1]
        case "double":
            return data[:end] + data[at:]
        case "put in":
            return data[:at] + dice.choice((b"\r\n", b"\n", b"\r\n\r\n", b"\x00", b" ", b"\xff")) + data[at:]
    return data


async def first_status(address: tuple[str, int], data: bytes, gate: asyncio.Semaphore) -> str:
    """Of the first answer; empty if there is none. What hangs up before all is sent, does."""
    async with gate, asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(*address)
        line = b""
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            line = await reader.readline()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    words = line.split(b" ")
    return words[1].decode() if len(words) > 1 else ""


async def whole_status(address: tuple[str, int], head: bytes, *, key: bytes = KEY.encode()) -> int:
    authorization = b"authorization: Bearer %b\r\n" % key if key else b""
    data = HEAD + head + authorization + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
    return int(await first_status(address, data, asyncio.Semaphore(1)))
