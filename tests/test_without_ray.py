"""One machine does without Ray: everything but Ray's own modules imports, and the router serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sllm_vllm.config import child_environment
from tests.support.router_process import running_router, write_config

BLOCKED = {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent / "without_ray", Path(__file__).parents[1])))}
OF_RAY = {
    "sllm_vllm.ray.agent",
    "sllm_vllm.ray.controller",
    "sllm_vllm.ray.serve",
    "sllm_vllm.ray.state",
}
_IMPORT_ALL = """
import importlib, json, pkgutil, sllm_vllm

failed = {}
for found in pkgutil.walk_packages(sllm_vllm.__path__, "sllm_vllm."):
    if not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            failed[found.name] = error.name
print(json.dumps(failed))
"""


def test_only_rays_own_modules_need_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL],
        env=child_environment(**BLOCKED),
        capture_output=True,
        text=True,
        check=True,
    )
    failed = json.loads(done.stdout.splitlines()[-1])
    assert failed == dict.fromkeys(OF_RAY, "ray")


def test_the_router_serves_without_it(tmp_path: Path) -> None:
    write_config(tmp_path, "fine", "family")
    with running_router(tmp_path, environment=BLOCKED) as router, ThreadPoolExecutor(4) as pool:
        asked = [router.post_later(pool, model) for model in ("fine", "family") for _ in range(4)]
        assert [one.result().status for one in asked] == [200] * len(asked)
        (router_path,) = [
            one
            for one in Path(f"/proc/{router.process.pid}/environ").read_bytes().split(b"\0")
            if one.startswith(b"PYTHONPATH=")
        ]
        assert b"without_ray" in router_path
