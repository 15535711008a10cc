"""Where vLLM is hooked: each point by name and parameters, checked before anything is changed. Imports no vLLM.

One ``HookPoints`` a process, made by the plugin. A module of vLLM that is imported is hooked whole or not at all; what
does not look as expected is a problem that the self-test reports, and migration is off for that engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType

import wrapt

Install = Callable[[ModuleType], None]
_MARK = "_sllm_hooked"


class HookMissing(Exception):
    """This vLLM has no such point, or another one under this name; the message says which."""


class HookPoints:
    """What was hooked in this process, and what could not be."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.installed: list[str] = []

    def register(self, installs: Mapping[str, Install]) -> None:
        """Have each install called with its module of vLLM once that is imported, if ever."""
        for name, install in installs.items():
            wrapt.register_post_import_hook(self._hook(name, install), name)

    def _hook(self, name: str, install: Install) -> Callable[[ModuleType], None]:
        def run(module: ModuleType) -> None:
            if _MARK in vars(module):
                return  # by a plugin that was loaded twice: tokens would be owned twice
            try:
                install(module)
            except HookMissing as problem:
                self.problems.append(f"{name}: {problem}")
            else:
                setattr(module, _MARK, True)
                self.installed.append(name)

        return run


def require(owner: object, name: str, *parameters: str) -> Callable[..., object]:
    """A function of vLLM that takes what we hand to it; with `self` or `cls`, which is not asked for, left out.

    Raises:
        HookMissing: there is none, or it takes something else.
    """
    found = getattr(owner, name, None)
    if not callable(found):
        raise HookMissing(f"there is no {name}")
    try:
        taken = inspect.signature(found).parameters
    except (TypeError, ValueError):
        raise HookMissing(f"{name} has no signature") from None
    if missing := [parameter for parameter in parameters if parameter not in taken]:
        raise HookMissing(f"{name} does not take {', '.join(missing)}")
    return found


def require_type(module: ModuleType, name: str) -> type:
    """A class of a module.

    Raises:
        HookMissing: there is none.
    """
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise HookMissing(f"there is no class {name}")
    return found
