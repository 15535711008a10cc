"""Models that were deployed, changed or deleted through the API, kept across restarts. For the router's loop.

A record overrides the configuration file only while the file's entry for the model is the same as when the record was
made: a later edit of the file takes precedence.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping

from sllm_vllm.errors import ConfigError
from sllm_vllm.router.config.file import parse_router_config
from sllm_vllm.router.config.sections import ModelConfig
from sllm_vllm.router.state.store import VALUE_NBYTES_MAX, StateError, StateStore

logger = logging.getLogger(__name__)

_PREFIX = "models/"


class KeptModels:
    """The records, in a store.

    Args:
        written: the models in the configuration file.
    """

    def __init__(self, store: StateStore, written: Iterable[ModelConfig]) -> None:
        self._store = store
        self._written: Mapping[str, ModelConfig] = {model.name: model for model in written}

    async def all(self) -> list[ModelConfig]:
        """The models to serve: those in the file, with the records applied.

        Raises:
            StateError: the store does not answer. Starting without its records would be worse than not starting.
        """
        models = dict(self._written)
        for key, value in (await self._store.items(_PREFIX)).items():
            name = key.removeprefix(_PREFIX)
            try:
                record = json.loads(value)
                if record["written"] != self._digest(name):
                    continue
                if record["model"] is None:
                    models.pop(name, None)
                else:
                    models[name] = parse_router_config({"models": [record["model"]]}).models[0]
            except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
                # Keep the record, so that an operator can see what it was, and serve the others.
                logger.error("event=model_not_restored model=%r reason=%r", name, str(error))
        return list(models.values())

    async def keep(self, name: str, model: ModelConfig | None) -> None:
        """Record what is served under a name from now on; None: nothing.

        Raises:
            StateError: the record could not be stored.
        """
        key = _PREFIX + name
        if model is None and name not in self._written:
            await self._store.delete(key)
            return
        told = None if model is None else model.model_dump(mode="json", exclude_defaults=True)
        try:
            value = json.dumps({"model": told, "written": self._digest(name)}).encode()
        except (ValueError, RecursionError) as error:
            raise StateError(f"model {name!r} can't be kept: {error}") from None
        if len(value) > VALUE_NBYTES_MAX:
            raise StateError(f"model {name!r} is too large to be kept")
        await self._store.put(key, value)

    def reread(self, written: Iterable[ModelConfig]) -> None:
        """Use the models of a file that was read again."""
        self._written = {model.name: model for model in written}

    def _digest(self, name: str) -> str:
        """Digest of the file's entry for a model; empty if there is none."""
        model = self._written.get(name)
        return "" if model is None else hashlib.sha256(model.model_dump_json().encode()).hexdigest()
