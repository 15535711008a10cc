"""The daemon's process, from startup to shutdown; one per socket. ``sllm-vllm store serve`` calls ``serve``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sllm_vllm.config import StoreConfig
from sllm_vllm.daemon.ending import Ending, Stopped
from sllm_vllm.daemon.file_limit import connections_within, raise_file_limit
from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.daemon.unix_listener import DaemonWords, listening, locked, make_private_directory
from sllm_vllm.errors import ConfigError, StoreBusy, StoreError
from sllm_vllm.store.calibrate import read_calibration
from sllm_vllm.store.orders import Orders
from sllm_vllm.store.places import Places
from sllm_vllm.store.pool import Pool
from sllm_vllm.store.server import StoreServer
from sllm_vllm.store.status import Status
from sllm_vllm.store.store import Store

if TYPE_CHECKING:
    from sllm_vllm.store.remote import Remote

logger = logging.getLogger(__name__)

_STATUS_TIMEOUT_S = 10.0
CLOSE_S_MAX = 60.0
"""The process exits at most this long after SIGTERM."""
BASE_DESCRIPTORS = 40
"""Descriptors of the daemon apart from those for clients: event loop, locks, socket, pool, metrics."""
CLIENT_DESCRIPTORS = 3
"""Descriptors per client: its connection, and its partition's file, which is opened twice."""
_WORDS = DaemonWords(
    error=StoreError,
    busy=StoreBusy,
    busy_problem="another daemon of the store is running",
    directory_mend="make the directory of checkpoints writable",
    socket_mend="give another --socket",
)


def serve(config: StoreConfig) -> int:
    """Run the daemon until SIGTERM, SIGINT or an order to stop. Returns the exit status.

    Raises:
        StoreBusy: another daemon owns the socket. StoreError: the socket can't be created.
        ConfigError: the pool would have no slot, its memory can't be allocated, or the limit on open files is too low.
        DaemonFailed: a part of the daemon failed for good.
    """
    if config.num_slots == 0:
        raise ConfigError(f"memory_bytes {config.memory_bytes} holds no slot of {config.slot_bytes} bytes")
    limit = raise_file_limit()
    clients_max = connections_within(limit, config.clients_max, each=CLIENT_DESCRIPTORS, kept=BASE_DESCRIPTORS)
    with _private_directory(config), listening(config.socket_path, _WORDS) as listener, _pool(config) as pool:
        asyncio.run(_Daemon(config, pool, clients_max).run(listener))
    return 0


class _Daemon:
    """Creates the daemon's parts and runs them on an event loop."""

    def __init__(self, config: StoreConfig, pool: Pool, clients_max: int) -> None:
        self._config = config
        self._pool = pool
        self._clients_max = clients_max

    async def run(self, listener: socket.socket) -> None:
        """Serve until stopped, or until a part fails for good."""
        config, loop, ending = self._config, asyncio.get_running_loop(), Ending(within_s=CLOSE_S_MAX)
        loops = RunLoops(ending.fail)
        places = Places(config.store_dir, config.state_dir, _open_remotes(config))
        store = Store(config, self._pool, places, calibration=read_calibration(config.state_dir))
        orders = Orders(store, stop=ending.stop, num_clients=lambda: server.num_clients, problem=lambda: loops.problem)
        server = StoreServer(store, orders, clients_max=self._clients_max)
        accepting = loops.start("the daemon's socket", lambda: server.accept(listener))
        prefaulting = _Prefault(self._pool) if config.prefault else contextlib.nullcontext()
        with contextlib.suppress(Stopped), prefaulting, self._metrics(orders, loop):
            with ending.starting():
                await orders.start()
            logger.info(
                "event=store_serving socket=%s memory=%d slots=%d page_nbytes=%d",
                config.socket_path,
                config.memory_bytes,
                self._pool.num_slots,
                self._pool.page_nbytes,
            )
            await ending.wait()
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        await store.close()  # first: else slots of ended leases could be overwritten while engines map them
        await orders.close()
        await server.close()
        logger.info("event=store_stopped socket=%s", config.socket_path)
        ending.check()

    @contextlib.contextmanager
    def _metrics(self, orders: Orders, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        if self._config.metrics_port is None:
            yield
            return

        from sllm_vllm.store.metrics_server import MetricsServer  # prometheus_client is needed only for metrics

        def status() -> Status:
            return asyncio.run_coroutine_threadsafe(orders.status(), loop).result(_STATUS_TIMEOUT_S)

        server = MetricsServer(status, self._config.state_dir, self._config.metrics_port)
        server.start()
        logger.info("event=metrics_serving port=%d", server.port)
        try:
            yield
        finally:
            server.stop()


class _Prefault:
    """Allocates the pool's pages slot by slot in a thread, so that no load waits for the system to clear them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sllm-prefault", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        start = time.monotonic()
        for slot in range(self._pool.num_slots):
            if self._stopped.is_set():
                return
            self._pool.prefault(slot)
        logger.info("event=memory_claimed slots=%d seconds=%.1f", self._pool.num_slots, time.monotonic() - start)


def _open_remotes(config: StoreConfig) -> list[Remote]:
    if not config.remotes:
        return []
    from sllm_vllm.store.remote import open_remote  # obstore is needed only with remotes

    return [open_remote(url, redirect_hosts=config.redirect_hosts) for url in config.remotes]


def _pool(config: StoreConfig) -> Pool:
    mount_point = config.state_dir / "pool"
    mount_point.mkdir(exist_ok=True)
    try:
        return Pool(config.num_slots, config.slot_bytes, mount_point)
    except OSError as error:
        raise ConfigError(f"no memory for a pool of {config.memory_bytes} bytes ({error.strerror})") from None


@contextlib.contextmanager
def _private_directory(config: StoreConfig) -> Iterator[None]:
    """Make the daemon's private folder, mode 0700, and hold its lock: only one daemon may use it."""
    make_private_directory(config.state_dir, _WORDS)
    try:
        config.socket_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        problem = f"it can't be made ({error.strerror})"
        raise StoreError(config.state_dir, problem, _WORDS.directory_mend) from None
    with locked(config.state_dir / "lock", config.socket_path, _WORDS):
        yield
