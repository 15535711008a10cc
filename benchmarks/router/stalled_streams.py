"""What streams whose clients read nothing cost the router, with migration and without: memory of each, and `/health`.

Runs a real router over one real vLLM engine with a tiny model. Many clients at once ask for a long stream and read none
of it. When their requests stand still or have ended, the router's resident memory is compared with that before; the
longest wait of `/health` meanwhile is recorded, too. First one stream of the same model is read to its end, so that
what is allocated only once does not count. Exits with 1 if a stalled stream takes more than `--times-max` times as much
memory with migration as without, or if `/health` waited longer than `--wait-max`.

    python -m benchmarks.router.stalled_streams --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from benchmarks.common.cached_model import ensure_model
from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.loading.bytecode import environment_of, warm_up
from benchmarks.router.process import Router, RouterFailed, running_router
from sllm_vllm.units import KIB

MODEL = "m"
TOKENS = 1500
BUFFER_NBYTES = 4096
STANDS_STILL_S = 10.0
MARGIN_NBYTES = 64 * KIB
WAIT_S_MAX = 900.0
ASK_EVERY_S = 0.05
ARGUMENTS = {"enforce-eager": True, "max-model-len": 2048, "max-num-seqs": 512}
DEFAULTS = {
    "engine_arguments": ARGUMENTS,
    "keep_alive": 3600,
    "ongoing_max": 1000,
    "min_replicas": 1,
    "max_replicas": 1,
}
SERVER = {"port": 0, "slow_client_timeout": 3600}
_RESIDENT = re.compile(r"VmRSS:\s+(\d+) kB")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one way: resident bytes per stalled stream, and the longest wait of ``/health``."""

    way: str
    num_streams: int
    stream_nbytes: int
    health_s: float


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=300, help="clients that read nothing")
    parser.add_argument("--times-max", type=float, default=2.0, help="memory with migration in parts of that without")
    parser.add_argument("--wait-max", type=float, default=0.1, help="seconds that /health may wait")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for models")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON (default: standard output)")
    given = parser.parse_args()
    return run_supervised(lambda workspace: measure(workspace, given), given.cache.resolve())


def measure(workspace: Workspace, given: argparse.Namespace) -> int:
    """Measure both ways and return the exit status."""
    console, costs = Console(), list[Cost]()
    progress = Progress(console)
    with progress.step("making the model"):
        models = {MODEL: ensure_model(workspace, "tiny")}
        warm_up(environment_of(workspace))
    try:
        for way, is_on in (("without migration", False), ("with migration", True)):
            sections: dict[str, Any] = {"defaults": DEFAULTS, "migration": {"enabled": is_on}, "server": SERVER}
            with progress.step(way), running_router(workspace, models, slots=1, kv_memory="2GiB", **sections) as router:
                router.complete(MODEL)
                if is_on:
                    wait_movable(router)
                costs.append(asyncio.run(cost_of(way, router, given.streams)))
    except (RouterFailed, OSError) as error:
        console.print(str(error), markup=False)
        return 1
    table = Table("streams", "KiB each", "longest wait of /health, ms")
    for cost in costs:
        table.add_row(cost.way, f"{cost.stream_nbytes / KIB:.0f}", f"{cost.health_s * 1000:.0f}")
    console.print(table)
    lines = "".join(json.dumps(asdict(cost)) + "\n" for cost in costs)
    if given.json is None:
        console.print(lines, markup=False, soft_wrap=True)
    else:
        given.json.write_text(lines)
    without, with_it = costs
    is_cheap = with_it.stream_nbytes <= given.times_max * max(without.stream_nbytes, KIB)
    return 0 if is_cheap and max(cost.health_s for cost in costs) <= given.wait_max else 1


def wait_movable(router: Router) -> None:
    """Wait until the engine has shown that its requests can be moved.

    Raises:
        RouterFailed: it has not after ``WAIT_S_MAX``.
    """
    deadline_s = time.monotonic() + WAIT_S_MAX
    while not all(one["is_movable"] for one in router.admin("replicas")["replicas"]):
        if time.monotonic() > deadline_s:
            raise RouterFailed(f"no movable replica\n{router.log_tail()}")
        time.sleep(0.2)


async def cost_of(way: str, router: Router, num_streams: int) -> Cost:
    """Measure ``num_streams`` streams whose clients read nothing, once they stand still."""
    parts = urlsplit(router.url)
    address = (parts.hostname or "", parts.port or 0)
    before = resident_nbytes(router.pid)
    waits: list[float] = []
    asking = asyncio.create_task(ask_health(router.url, waits))
    clients = [await stalled(address) for _ in range(num_streams)]
    try:
        await standing_still(router, num_streams)
        after = resident_nbytes(router.pid)
    finally:
        asking.cancel()
        for client in clients:
            client.close()
    return Cost(way, num_streams, (after - before) // num_streams, max(waits))


async def stalled(address: tuple[str, int]) -> socket.socket:
    """Connect a client that requests a stream and reads none of it."""
    body = json.dumps(
        {"model": MODEL, "prompt": "Hello", "max_tokens": TOKENS, "ignore_eos": True, "stream": True, "temperature": 0}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_NBYTES)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, address)
    await loop.sock_sendall(client, head % len(body) + body)
    return client


async def standing_still(router: Router, num_streams: int) -> None:
    """Wait until all streams are answered or have ended, and the router's memory has not grown for a while."""
    deadline_s, since_s, last = time.monotonic() + WAIT_S_MAX, time.monotonic(), 0
    while time.monotonic() - since_s < STANDS_STILL_S:
        requests = (await asyncio.to_thread(router.admin, "requests"))["requests"]
        now = resident_nbytes(router.pid)
        if not all(one["is_answered"] for one in requests) or now > last + MARGIN_NBYTES:
            last, since_s = now, time.monotonic()
        if time.monotonic() > deadline_s:
            raise RouterFailed(f"{num_streams} streams never stood still\n{router.log_tail()}")
        await asyncio.sleep(0.5)


async def ask_health(url: str, waits: list[float]) -> None:
    """Ask for `/health` again and again, and append how long each answer took to ``waits``."""
    while True:
        began_s = time.monotonic()
        await asyncio.to_thread(lambda: urllib.request.urlopen(f"{url}/health", timeout=WAIT_S_MAX).read())
        waits.append(time.monotonic() - began_s)
        await asyncio.sleep(ASK_EVERY_S)


def resident_nbytes(pid: int) -> int:
    """Resident bytes of a process."""
    found = _RESIDENT.search(Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * KIB


if __name__ == "__main__":
    sys.exit(main())
