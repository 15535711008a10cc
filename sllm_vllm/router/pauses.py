"""Keeps the event loop's pauses short with thousands of models: work in slices, and less garbage collection.

A full garbage collection with ten thousand models stops every thread for a quarter of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import TypeVar

SLICE_S = 0.005
"""How long one slice of work may keep the loop from requests."""

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


def freeze_heap() -> None:
    """Collect once, and exempt what is alive from later collections. Call it after the start, before serving."""
    gc.collect()
    gc.freeze()
