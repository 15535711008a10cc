"""Tables of cases that one test goes through, and tells all that fail."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_SHOWN_MAX = 400
Failed = tuple[str, BaseException]
"""A case by its values, and what it raised."""


def every_case(names: str, cases: Iterable[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As ``pytest.mark.parametrize``, but it stays one test. Decorators may be stacked: every combination is run.

    All cases run, even if some fail; each failure names its case. Fixtures are made once for all cases, except that
    each case has a ``tmp_path`` of its own. So a fixture may not be changed by a case.
    """
    keys = [name.strip() for name in names.split(",")]
    known = [dict(zip(keys, case if len(keys) > 1 else (case,), strict=True)) for case in cases]
    assert known, "no case"

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        def runs(fixtures: dict[str, Any], failures: list[Failed]) -> Iterator[tuple[Any, dict[str, Any]]]:
            for number, case in enumerate(known):
                yield _noted(case, failures), {**fixtures, **case, **_own_path(fixtures, number)}

        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            failures: list[Failed] = []
            for noted, arguments in runs(fixtures, failures):
                with noted:
                    test(**arguments)
            _tell(failures, len(known))

        @functools.wraps(test)
        async def run_async(**fixtures: Any) -> None:
            failures: list[Failed] = []
            for noted, arguments in runs(fixtures, failures):
                with noted:
                    await test(**arguments)
            _tell(failures, len(known))

        looped: Callable[..., Any] = run_async if inspect.iscoroutinefunction(test) else run
        signature = inspect.signature(test)
        left = [one for name, one in signature.parameters.items() if name not in keys]
        assert len(left) == len(signature.parameters) - len(keys), f"{names} are not arguments of {test.__name__}"
        vars(looped)["__signature__"] = signature.replace(parameters=left)
        return looped

    return decorate


@contextmanager
def _noted(case: dict[str, Any], failures: list[Failed]) -> Iterator[None]:
    try:
        yield
    except (Exception, pytest.fail.Exception) as failure:
        named = ", ".join(f"{name}={repr(value)[:_SHOWN_MAX]}" for name, value in case.items())
        failures.append((named, failure))


def _own_path(fixtures: dict[str, Any], number: int) -> dict[str, Path]:
    if "tmp_path" not in fixtures:
        return {}
    path = fixtures["tmp_path"] / str(number)
    path.mkdir()
    return {"tmp_path": path}


def _tell(failures: list[Failed], num_cases: int) -> None:
    """All with what they say; the first with its traceback."""
    if failures:
        told = [f"{named}: {type(failure).__name__}: {failure}" for named, failure in failures]
        title = f"{len(failures)} of {num_cases} cases failed"
        raise AssertionError("\n".join([title, *told])) from failures[0][1]
