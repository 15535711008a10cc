"""Whether an engine is healthy: polls its ``/health``, rapidly until the first success, then at intervals.

An engine is not blamed for this process's own faults: time in which this process stood still does not count, and a
check that it had no descriptor for counts as not made.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable

import aiohttp

from sllm_vllm.daemon.run_loops import is_shortage
from sllm_vllm.daemon.socket_url import HOST, socket_of_url
from sllm_vllm.node.running_time import within

EAGER_S = 0.02
"""Between checks in the first seconds of a start; a refused connection costs a fraction of a millisecond."""
EAGER_FOR_S = 10.0
PATIENT_S = 0.2


def session_to(url: str) -> aiohttp.ClientSession:
    """A client for one engine, which makes a new connection for each check."""
    path = socket_of_url(url)
    connector = (
        aiohttp.TCPConnector(force_close=True, limit=0)
        if path is None
        else aiohttp.UnixConnector(path, force_close=True, limit=0)
    )
    return aiohttp.ClientSession(connector=connector)


def http_base(url: str) -> str:
    """The base URL of requests to the engine in that session."""
    return url if socket_of_url(url) is None else f"http://{HOST}"


async def wait_healthy(session: aiohttp.ClientSession, url: str, *, answer_s: float) -> None:
    """Check until the first success, then return."""
    start_s = time.monotonic()
    while True:
        if await ask_health(session, url, answer_s=answer_s) == "":
            return
        await asyncio.sleep(EAGER_S if time.monotonic() - start_s < EAGER_FOR_S else PATIENT_S)


async def keep_asking(
    session: aiohttp.ClientSession, url: str, on_answer: Callable[[str], None], *, every_s: float
) -> None:
    """Check at intervals until cancelled; ``on_answer`` gets an empty string for a success, else the problem."""
    while True:
        await asyncio.sleep(every_s)
        if (problem := await ask_health(session, url, answer_s=every_s)) is not None:
            on_answer(problem)


async def ask_health(session: aiohttp.ClientSession, url: str, *, answer_s: float) -> str | None:
    """Check once; returns an empty string for a success, else the problem; None if the check could not be made."""
    try:
        return await within(answer_s, _ask(session, url))
    except TimeoutError:
        return f"no answer within {answer_s:g} s"
    except (aiohttp.ClientError, OSError) as error:
        return None if is_shortage(error) else str(error) or type(error).__name__


async def _ask(session: aiohttp.ClientSession, url: str) -> str:
    while True:
        try:
            async with session.get(f"{url}/health", timeout=aiohttp.ClientTimeout(total=None)) as answer:
                return "" if answer.status == 200 else f"it answered with status {answer.status}"
        except aiohttp.ClientConnectorError as error:
            if error.errno != errno.EAGAIN:
                raise
            await asyncio.sleep(EAGER_S)  # its backlog is full; TCP would wait instead
