"""Where vLLM is hooked: each hook point's name and parameters are checked before it is changed. Does not import vLLM.

The plugin makes one ``HookPoints`` per process. Either all hooks of a vLLM module are installed or none. If one does
not look as expected, the self-test reports it, and migration is off for that engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType

import wrapt

Install = Callable[[ModuleType], None]
_MARK = "_sllm_hooked"


class HookMissing(Exception):
    """This vLLM lacks a hook point, or has something else under its name; the message names it."""


class HookPoints:
    """The modules that were hooked in this process, and the problems with those that could not be."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.installed: list[str] = []

    def register(self, installs: Mapping[str, Install]) -> None:
        """Call each install with its vLLM module when that is imported, if it ever is."""
        for name, install in installs.items():
            wrapt.register_post_import_hook(self._hook(name, install), name)

    def _hook(self, name: str, install: Install) -> Callable[[ModuleType], None]:
        def run(module: ModuleType) -> None:
            if _MARK in vars(module):
                return  # the plugin was loaded twice: a second hook would append the owned tokens again
            try:
                install(module)
            except HookMissing as problem:
                self.problems.append(f"{name}: {problem}")
            else:
                setattr(module, _MARK, True)
                self.installed.append(name)

        return run


def require(owner: object, name: str, *parameters: str) -> Callable[..., object]:
    """Get a function of vLLM, and check that it has the given parameters (named without ``self`` or ``cls``).

    Raises:
        HookMissing: there is no such function, or it lacks a parameter.
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
    """Get a class of a vLLM module.

    Raises:
        HookMissing: there is no such class.
    """
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise HookMissing(f"there is no class {name}")
    return found
