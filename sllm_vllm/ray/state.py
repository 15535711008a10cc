"""The cluster's own key-value table as a ``StateStore``. It lasts as long as Ray's head, or that head's Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError
from ray.experimental import internal_kv

from sllm_vllm.router.state.store import PREFIX, StateError

_NAMESPACE = b"sllm"


class RayStore:
    """Ray's internal KV. Works in any process that is connected to the cluster."""

    async def get(self, name: str) -> bytes | None:
        """See ``StateStore``."""
        return await asyncio.to_thread(self._get, PREFIX + name)

    async def put(self, name: str, value: bytes) -> None:
        """See ``StateStore``."""
        await asyncio.to_thread(self._run, internal_kv._internal_kv_put, PREFIX + name, value)

    async def delete(self, name: str) -> None:
        """See ``StateStore``."""
        await asyncio.to_thread(self._run, internal_kv._internal_kv_del, PREFIX + name)

    async def items(self, prefix: str) -> dict[str, bytes]:
        """See ``StateStore``."""
        return await asyncio.to_thread(self._items, PREFIX + prefix)

    async def close(self) -> None:
        """See ``StateStore``."""

    def _get(self, key: str) -> bytes | None:
        found: bytes | None = self._run(internal_kv._internal_kv_get, key)
        return found

    def _items(self, prefix: str) -> dict[str, bytes]:
        names = [key.decode() for key in self._run(internal_kv._internal_kv_list, prefix)]
        found = {name.removeprefix(PREFIX): self._get(name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def _run(self, call: Callable[..., Any], *values: str | bytes) -> Any:  # noqa: ANN401 - Ray has no types
        try:
            return call(*values, namespace=_NAMESPACE)
        except (RayError, RuntimeError, OSError) as error:
            raise StateError(f"Ray's head: {error}") from None
