"""How long `/health` waits, and how much memory the router uses, while it receives bodies that are costly to parse.

Runs a real router over engines that never become ready, so that every accepted body is held. Each body is sent alone,
while another connection asks for `/health` again and again; the longest wait is recorded, and also the longest wait
with no body at all. Then twice as many bodies as the limit on their total size allows are sent at once. Exits with 1 if
`/health` waited longer than `--wait-max`, if memory grew by more than 1.2 times the limit, or if more than 20 % of the
limit was still in use after the clients had left.

    python -m benchmarks.router.hostile_bodies --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common.progress import Progress
from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from sllm_vllm.units import MIB
from tests.support.router_process import RouterUnderTest, running_router, write_config
from tests.support.waiting import wait_until

MODEL = "hangs"
HELD_SHARE_MAX = 1.2
LEFT_SHARE_MAX = 0.2
QUIET_S = 1.0
_ASKER = """
import select, socket, sys, time
router, pid = socket.create_connection((sys.argv[1], int(sys.argv[2]))), int(sys.argv[3])
longest_s = busy_s = 0.0

def busy():
    return time.clock_gettime(~pid << 3 | 2)  # the processor clock of another process: see clock_getcpuclockid(3)

while True:
    began_s, began_busy_s = time.monotonic(), busy()
    router.sendall(b"GET /health HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
    data = b""
    while b"{}" not in data:
        data += router.recv(4096)
    longest_s = max(longest_s, time.monotonic() - began_s)
    busy_s = max(busy_s, busy() - began_busy_s)
    if select.select([sys.stdin], [], [], 0.005)[0]:
        sys.stdin.readline()
        print(longest_s, busy_s, flush=True)
        longest_s = busy_s = 0.0
"""


@dataclass(frozen=True, slots=True)
class Wait:
    """One body: the status of its answer (0 if accepted and held) and the longest wait of `/health` meanwhile.

    ``busy_s``: the most processor time that the router used during one wait. Other processes change it little.
    """

    body: str
    nbytes: int
    status: int
    wait_s: float
    busy_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Growth of resident memory, in bytes: with as many bodies held as allowed, and after all clients have left."""

    limit_nbytes: int
    num_held: int
    held_nbytes: int
    left_nbytes: int


def hostile_bodies(nbytes: int) -> Iterator[tuple[str, bytes]]:
    """Valid or nearly valid JSON bodies of about ``nbytes``, with names: the shapes that cost a parser most."""

    def filled(unit: bytes, *, end: bytes = b"0]}") -> bytes:
        begin = b'{"model":"hangs","prompt":['
        return begin + unit * ((nbytes - len(begin) - len(end)) // len(unit)) + end

    room = nbytes - 64
    yield "nested arrays", filled(b"[[[0]]],")
    yield "empty arrays", filled(b"[],")
    yield "empty objects", filled(b"{},")
    yield "numbers", filled(b"1,")
    yield "strings", filled(b'"",')
    yield "escapes", filled(b'"' + b'\\"' * 100 + b'",')
    yield "deep", b'{"model":"hangs","prompt":' + b"[" * (room // 2) + b"]" * (room // 2) + b"}"
    yield "many members", b"{" + b'"a":0,' * (room // 6) + b'"model":"hangs"}'
    yield "one string", b'{"model":"hangs","prompt":"' + b"a" * room + b'"}'
    yield "wide characters", b'{"model":"hangs","prompt":"' + "\U0001f600".encode() * (room // 4) + b'"}'
    yield "spaces", b'{"model":"hangs",' + b" " * room + b'"prompt":""}'
    yield "one number", b'{"model":"hangs","prompt":' + b"1" * room + b"}"
    yield "no end", filled(b"[0,", end=b"")


async def measure_waits(router: RouterUnderTest, nbytes: int, *, tries: int = 1) -> list[Wait]:
    """Measure with each body alone. With several tries the best counts, for machines that run other work, too."""
    async with asked_for_health(router) as longest:
        await asyncio.sleep(QUIET_S)
        waits = [Wait("none", 0, 0, *await longest())]
        for name, body in hostile_bodies(nbytes):
            found = []
            for _ in range(tries):
                status = await send_body(router, body)
                found.append(await longest())
            waits.append(Wait(name, len(body), status, *map(min, zip(*found, strict=True))))
    return waits


@contextlib.asynccontextmanager
async def asked_for_health(router: RouterUnderTest) -> AsyncIterator[Callable[[], Awaitable[tuple[float, float]]]]:
    """Ask for `/health` from another process until the block ends; yields a function for the longest wait since its
    last call, in seconds and in processor seconds of the router.
    """
    host, port = router.address
    command = (sys.executable, "-c", _ASKER, host, str(port), str(router.process.pid))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    asks, tells = process.stdin, process.stdout
    assert asks is not None
    assert tells is not None

    async def longest() -> tuple[float, float]:
        asks.write(b"\n")
        wait_s, busy_s = map(float, (await tells.readline()).split())
        return wait_s, busy_s

    try:
        yield longest
    finally:
        process.kill()
        await process.wait()


async def send_body(router: RouterUnderTest, body: bytes) -> int:
    """Send a body, then disconnect; return the answer's status, or 0 if the request was waiting for a replica."""
    reader, writer = await open_with(router, body)
    answer = asyncio.create_task(reader.readline())
    await asyncio.to_thread(wait_until, lambda: answer.done() or num_waiting(router), "an answer")
    status = int(answer.result().split()[1]) if answer.done() else 0
    answer.cancel()
    writer.transport.abort()
    await asyncio.to_thread(wait_until, lambda: not num_waiting(router), "the client to have left")
    return status


async def open_with(router: RouterUnderTest, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection and send a request; what the router refuses to read stays unsent."""
    reader, writer = await asyncio.open_connection(*router.address)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body))
    with contextlib.suppress(ConnectionError):
        for at in range(0, len(body), MIB):
            writer.write(body[at : at + MIB])
            await writer.drain()
    return reader, writer


def num_waiting(router: RouterUnderTest) -> int:
    """Number of requests that the router holds."""
    waiting: int = router.admin(f"models/{MODEL}").body["waiting"]
    return waiting


async def measure_memory(router: RouterUnderTest, nbytes: int, limit_nbytes: int) -> Memory:
    """Send twice as many bodies at once as the limit allows, and measure the router's memory."""
    body = b'{"model":"hangs","prompt":"' + b"a" * (nbytes - 32) + b'"}'
    before = router.memory_nbytes()
    router.forget_peak()
    num_max = limit_nbytes // len(body)
    opened = await asyncio.gather(*(open_with(router, body) for _ in range(2 * num_max)))
    await asyncio.to_thread(wait_until, lambda: num_waiting(router) >= num_max, "bodies to be held")
    num_held = await asyncio.to_thread(num_waiting, router)
    peak = router.memory_nbytes("VmHWM")
    for _, writer in opened:
        writer.transport.abort()
    await asyncio.to_thread(wait_until, lambda: not num_waiting(router), "the clients to have left")
    await asyncio.sleep(QUIET_S)
    return Memory(limit_nbytes, num_held, peak - before, router.memory_nbytes() - before)


# ------------------------------------------------------------------------------------------------------ the command


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--body", type=int, default=32, help="MiB of each body")
    parser.add_argument("--limit", type=int, default=512, help="MiB of all bodies that the router may hold")
    parser.add_argument("--wait-max", type=float, default=0.1, help="seconds that /health may wait")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for what the run writes")
    parser.add_argument("--json", type=Path, help="file for the line of JSON (default: standard output)")
    given = parser.parse_args()
    return run_supervised(lambda workspace: run_benchmark(workspace, given), given.cache.resolve())


def run_benchmark(workspace: Workspace, given: argparse.Namespace) -> int:
    """Run the benchmark in its workspace and return the exit status."""
    console = Console()
    nbytes, limit_nbytes = given.body * MIB, given.limit * MIB
    server = {"port": 0, "body_bytes": nbytes, "bodies_bytes": limit_nbytes}
    write_config(workspace.tmp, MODEL, slots=1, server=server, defaults={"queue_timeout": 600})
    with Progress(console).step("hostile bodies"), running_router(workspace.tmp) as router:
        waits = asyncio.run(measure_waits(router, nbytes))
        memory = asyncio.run(measure_memory(router, nbytes, limit_nbytes))
    console.print(table_of(waits))
    console.print(
        f"held {memory.held_nbytes / MIB:.0f} MiB of {given.limit} MiB, left {memory.left_nbytes / MIB:.0f} MiB"
    )
    line = json.dumps({"waits": [asdict(one) for one in waits], "memory": asdict(memory)})
    if given.json is None:
        console.print(line, markup=False, soft_wrap=True)
    else:
        given.json.write_text(f"{line}\n")
    is_good = (
        max(one.wait_s for one in waits) <= given.wait_max
        and memory.held_nbytes <= HELD_SHARE_MAX * limit_nbytes
        and memory.left_nbytes <= LEFT_SHARE_MAX * limit_nbytes
    )
    return 0 if is_good else 1


def table_of(waits: list[Wait]) -> Table:
    """The waits, as a table to print."""
    table = Table("body", "MiB", "answer", "longest wait of /health, ms")
    for one in waits:
        shown = str(one.status) if one.status else "held"
        table.add_row(one.body, f"{one.nbytes / MIB:.1f}", shown, f"{one.wait_s * 1000:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
