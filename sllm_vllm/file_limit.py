"""How many descriptors a process may have open: its soft limit, what of it connections may take, and a spare few."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

from sllm_vllm.errors import ConfigError

_ENOUGH = 1 << 18
"""The hard limit may be a billion, and there are programs among children that look at each descriptor."""
CONNECTIONS_MIN = 4
"""A daemon that could have fewer is not started."""


def raise_file_limit() -> int:
    """Let this process, and those it starts, open as many as the hard limit permits; never fewer than before.

    Engines inherit it: vLLM raises its own to 65535 anyway, and waits by ``poll``, not by ``select``.

    Returns:
        The soft limit from now on.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _ENOUGH
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    soft = max(soft, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def connections_within(limit: int, wanted: int, *, each: int = 1, kept: int) -> int:
    """How many connections a process may have, ``wanted`` at most.

    Args:
        limit: descriptors of the process.
        each: descriptors that one connection takes.
        kept: descriptors that stay for everything else.

    Raises:
        ConfigError: the limit is too low for any work.
    """
    num = min(wanted, (limit - kept) // each)
    if num < min(wanted, CONNECTIONS_MIN):
        least = kept + each * CONNECTIONS_MIN
        raise ConfigError(
            f"this process may open {limit} descriptors and needs {least}: raise the limit "
            "(`ulimit -n`, LimitNOFILE= of a systemd unit, `--ulimit nofile` of a container)"
        )
    return num


class Spare:
    """Descriptors that are held back for what must work when there is no other: to end things, and to look at them."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._fds: list[int] = []
        self.refill()

    def refill(self) -> None:
        """Take back what is missing, as far as there are any."""
        with contextlib.suppress(OSError):
            while len(self._fds) < self._num:
                self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Free for what is done inside, which must not wait: others would take them."""
        self._release()
        try:
            yield
        finally:
            self.refill()

    def close(self) -> None:
        """Hold none any more."""
        self._num = 0
        self._release()

    def _release(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
