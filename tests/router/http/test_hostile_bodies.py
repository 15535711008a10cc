"""Bodies that are costly to read, against a whole router: others are served meanwhile, and their memory goes back."""

from __future__ import annotations

from pathlib import Path

from benchmarks.router.hostile_bodies import MODEL, measure_memory, measure_waits
from sllm_vllm.units import MIB
from tests.support.router_process import running_router, write_config

WAIT_S_MAX = 0.5
"""Of the router's processor time, which other processes change little: five times what a quiet machine may wait."""


async def test_health_never_waits_long_beside_any_body(tmp_path: Path) -> None:
    write_config(tmp_path, MODEL, slots=1, defaults={"queue_timeout": 600})
    with running_router(tmp_path) as router:
        waits = await measure_waits(router, 32 * MIB, tries=2)
    quiet, *others = waits
    assert {one.body: one.busy_s for one in others if one.busy_s > WAIT_S_MAX + quiet.busy_s} == {}
    statuses = {one.body: one.status for one in others}
    assert {statuses.pop(name) for name in ("numbers", "strings", "one string", "wide characters", "spaces")} == {0}
    assert statuses.pop("escapes") == 0
    assert statuses.pop("one number") == 0
    assert set(statuses.values()) == {400}


async def test_bodies_are_held_once_and_their_memory_goes_back(tmp_path: Path) -> None:
    limit_nbytes = 256 * MIB
    server = {"port": 0, "body_bytes": 32 * MIB, "bodies_bytes": limit_nbytes}
    write_config(tmp_path, MODEL, slots=1, server=server, defaults={"queue_timeout": 600})
    with running_router(tmp_path) as router:
        before = router.memory_nbytes()
        memory = await measure_memory(router, 32 * MIB, limit_nbytes)
    assert memory.num_held == 8
    assert memory.held_nbytes <= 1.2 * limit_nbytes
    assert memory.left_nbytes <= 0.2 * before
