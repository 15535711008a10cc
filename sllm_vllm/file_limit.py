"""How many descriptors a process may have open: its soft limit, raised as far as it helps."""

from __future__ import annotations

import resource

_ENOUGH = 1 << 18
"""The hard limit may be a billion, and there are programs among children that look at each descriptor."""


def raise_file_limit() -> None:
    """Let this process, and those it starts, open as many as the hard limit permits; never fewer than before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
