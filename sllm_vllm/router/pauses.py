"""What keeps the loop's pauses short where there are thousands of models: slices of work, and Python's collector.

A full collection of ten thousand models stops every thread for a quarter of a second.
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
"""Longest that work on many things keeps the loop from requests."""

Item = TypeVar("Item")


async def in_slices(items: Iterable[Item]) -> AsyncIterator[Item]:
    """The items; between them other tasks run every ``SLICE_S``, so what the items are made from may change."""
    rest_s = time.monotonic() + SLICE_S
    for item in items:
        yield item
        if time.monotonic() >= rest_s:
            await asyncio.sleep(0)
            rest_s = time.monotonic() + SLICE_S


async def json_of_many(key: str, records: Iterable[Mapping[str, object]], **others: object) -> bytes:
    """A JSON object with a list of records under ``key``, and ``others`` before it."""
    parts = [json.dumps(record, allow_nan=False) async for record in in_slices(records)]
    head = json.dumps({**others, key: []}).removesuffix("]}")
    return f"{head}{', '.join(parts)}]}}".encode()


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """No garbage collection while a thread makes very many objects, nor later of those: it must not last long.

    Cycles of garbage made meanwhile are never freed; what is in no cycle is freed as usual.
    """
    was_on = gc.isenabled()
    gc.collect(1)  # the young ones, or they would stay
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def freeze_heap() -> None:
    """Collect once, and leave what is alive now out of later collections: call it after a start, before serving."""
    gc.collect()
    gc.freeze()
