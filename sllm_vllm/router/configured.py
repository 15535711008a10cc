"""A controller and its kept models as a configuration describes them, on one machine and on Ray. For their loop."""

from __future__ import annotations

from pathlib import Path

from sllm_vllm.router.config.file import Changes
from sllm_vllm.router.config.sections import RouterConfig
from sllm_vllm.router.controller import Controller, ControllerLimits
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.state.models import KeptModels
from sllm_vllm.router.state.store import StateStore


class ConfiguredController:
    """A controller with the configuration that it has now.

    Args:
        store: where models that are deployed through the API are kept.
        directory: the engines' working directory.
        holders_max: most nodes that hold one checkpoint; 1: it is never copied.
    """

    def __init__(
        self, config: RouterConfig, store: StateStore, *, directory: Path, estimator: Estimator, holders_max: int = 1
    ) -> None:
        self.config = config
        self.controller = Controller(
            waiting_max=config.server.waiting_max,
            directory=directory,
            bounds=ControllerLimits(
                moves_max=config.migration.moves_max if config.migration.enabled else 0,
                holders_max=holders_max,
                poison=config.poison.limits(),
            ),
            estimator=estimator,
        )
        self.kept = KeptModels(store, config.models)

    async def deploy(self) -> None:
        """Deploy the models: those of the configuration, and those that were deployed through the API.

        Raises:
            StateError: the store does not answer.
        """
        models = await self.kept.all()
        await self.controller.measure(models)
        await self.controller.change_models((), models)

    async def apply(self, config: RouterConfig, changes: Changes) -> None:
        """Apply another configuration, which differs from the present one by ``changes``, all of them live."""
        self.kept.reread(config.models)
        await self.controller.measure((*changes.added, *changes.restarted))
        self.controller.set_waiting_max(config.server.waiting_max)
        deployed = (*changes.added, *changes.restarted, *changes.adjusted)
        await self.controller.change_models(changes.removed, deployed)
        self.config = config
