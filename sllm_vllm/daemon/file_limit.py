"""A process's limit on open descriptors: raises it, divides it among connections, and keeps a few in reserve."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

from sllm_vllm.errors import ConfigError

_ENOUGH = 1 << 18
"""Never raised above this: the hard limit may be a billion, and some child programs loop over every descriptor."""
CONNECTIONS_MIN = 4
"""A daemon that could have fewer connections refuses to start."""


def raise_file_limit() -> int:
    """Raise the soft limit of this process and its children as far as the hard limit permits; never lower it.

    Engines inherit it, which is safe: vLLM itself raises its limit to 65535, and waits with ``poll``, not ``select``.

    Returns:
        The new soft limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _ENOUGH
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    soft = max(soft, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def connections_within(limit: int, wanted: int, *, each: int = 1, kept: int) -> int:
    """How many connections a process may have: as many as the limit permits, at most ``wanted``.

    Args:
        limit: descriptors that the process may have open.
        each: descriptors that one connection takes.
        kept: descriptors reserved for everything else.

    Raises:
        ConfigError: the limit permits fewer than ``CONNECTIONS_MIN``, or fewer than ``wanted`` if that is less.
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
    """A reserve of descriptors, for work that must succeed when no others are left: stopping and inspecting things."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._fds: list[int] = []
        self.refill()

    def refill(self) -> None:
        """Reopen the missing descriptors, as far as any are free."""
        with contextlib.suppress(OSError):
            while len(self._fds) < self._num:
                self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Free the reserve for the block, which must not wait or others would take the descriptors."""
        self._release()
        try:
            yield
        finally:
            self.refill()

    def close(self) -> None:
        """Give up the reserve."""
        self._num = 0
        self._release()

    def _release(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
