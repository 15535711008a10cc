"""Keeps the event loop's pauses short with thousands of models: work in slices, and less garbage collection.

A full garbage collection with ten thousand models stops every thread for a quarter of a second. And while a thread
reads a configuration, the loop waits for the interpreter lock after each system call that has released it: by default
5 ms, and a handful of times for each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import TypeVar

SLICE_S = 0.005
"""How long one slice of work may keep the loop from requests."""
_SWITCH_S = 0.0005
"""How long a thread that computes may keep the interpreter lock while another waits for it."""

Item = TypeVar("Item")


async def in_slices(items: Iterable[Item]) -> AsyncIterator[Item]:
    """Yield the items. Every ``SLICE_S`` other tasks run in between, and may change what the items come from."""
    rest_s = time.monotonic() + SLICE_S
    for item in items:
        yield item
        if time.monotonic() >= rest_s:
            await asyncio.sleep(0)
            rest_s = time.monotonic() + SLICE_S


async def json_of_many(key: str, records: Iterable[Mapping[str, object]], **others: object) -> bytes:
    """A JSON object with ``others`` and, after them, the list of records under ``key``; encoded in slices."""
    parts = [json.dumps(record, allow_nan=False) async for record in in_slices(records)]
    head = json.dumps({**others, key: []}).removesuffix("]}")
    return f"{head}{', '.join(parts)}]}}".encode()


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Turn garbage collection off while a thread creates very many objects, and exempt those for good. Keep it short.

    Cyclic garbage made meanwhile is never freed; objects that are in no cycle are freed as usual.
    """
    was_on = gc.isenabled()
    gc.collect(1)  # collect young garbage first, or ``gc.freeze`` would keep it
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def prepare_to_serve() -> None:
    """Exempt what is alive from later garbage collections, and let threads alternate quickly. Call it once, before
    serving."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_S)
