"""Whether an engine is well: asks its ``/health``, soon and often until the first yes, then now and then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp

EAGER_S = 0.02
"""Between questions in the first seconds of a start; a refused connection costs a fraction of a millisecond."""
EAGER_FOR_S = 10.0
PATIENT_S = 0.2


async def wait_healthy(session: aiohttp.ClientSession, url: str, *, answer_s: float) -> None:
    """Return at the first yes; ask for ever."""
    start_s = time.monotonic()
    while True:
        if not await ask_health(session, url, answer_s=answer_s):
            return
        await asyncio.sleep(EAGER_S if time.monotonic() - start_s < EAGER_FOR_S else PATIENT_S)


async def keep_asking(
    session: aiohttp.ClientSession, url: str, on_answer: Callable[[str], None], *, every_s: float
) -> None:
    """Ask for ever; ``on_answer`` gets an empty string for a yes, else what was wrong."""
    while True:
        await asyncio.sleep(every_s)
        on_answer(await ask_health(session, url, answer_s=every_s))


async def ask_health(session: aiohttp.ClientSession, url: str, *, answer_s: float) -> str:
    """Ask once; empty for a yes, else what was wrong."""
    try:
        async with session.get(f"{url}/health", timeout=aiohttp.ClientTimeout(total=answer_s)) as answer:
            return "" if answer.status == 200 else f"it answered with status {answer.status}"
    except TimeoutError:
        return f"no answer within {answer_s:g} s"
    except (aiohttp.ClientError, OSError) as error:
        return f"{error or type(error).__name__}"
