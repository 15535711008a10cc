"""The router's process: node agent, controller and HTTP server on one event loop.

It begins by locking the node's folder and lasts until its last engine has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import uvloop

from sllm_vllm.config import read_variable
from sllm_vllm.daemon.ending import Ending, Stopped
from sllm_vllm.daemon.file_limit import connections_within, raise_file_limit
from sllm_vllm.daemon.plain_file import open_key
from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.daemon.unix_listener import listening, make_private_directory
from sllm_vllm.errors import ConfigError
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.daemon import CLOSE_S_MAX, WORDS, descriptors_kept, locked_node, served
from sllm_vllm.router.admin.app import AdminApp, Reloaded
from sllm_vllm.router.admin.client import ADMIN_KEY_NAME, write_url
from sllm_vllm.router.config.file import Changes, compare, read_key_digests, with_known_models
from sllm_vllm.router.config.keys import digest_of
from sllm_vllm.router.config.places import read_checked_config, require_model
from sllm_vllm.router.config.problems import Problem
from sllm_vllm.router.config.sections import ModelConfig, RouterConfig
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.configured import ConfiguredController
from sllm_vllm.router.controller import Controller
from sllm_vllm.router.http.deadline import Message, Receive, Send
from sllm_vllm.router.http.ingress import Ingress, IngressSwitch
from sllm_vllm.router.http.serve import serve_app
from sllm_vllm.router.pauses import no_collections, prepare_to_serve
from sllm_vllm.router.state.estimates import read_estimates, write_record
from sllm_vllm.router.state.store import SqliteStore, StateError

logger = logging.getLogger(__name__)

ESTIMATES_NAME = "estimates.json"
STATE_NAME = "state.sqlite"
NODE_NAME = "local"
SAVE_S = 60.0
SHOWN_MAX = 8
"""Deleted models that are named in a log line; the others are only counted."""
_BACKLOG = 2048
_AGENT_CLIENTS = 8
"""Connections to the agent's own socket for which file descriptors are reserved."""
_DESCRIPTORS_A_CONNECTION = 2
"""One for the client's connection and one for the engine's."""


def serve(path: Path) -> int:
    """Serve the configuration in a file until SIGTERM or SIGINT; SIGHUP reloads it. Returns the exit status.

    Raises:
        ConfigError: the file is wrong, the address is not available, or the process may open too few files.
        NodeBusy: another agent uses the node's folder. NodeError: that folder can't be used.
        DaemonFailed: a part of the process has failed for good.
    """
    with no_collections():
        config, warnings = read_checked_config(path)
    _warn(path, warnings)
    node = config.node_config()
    raise_file_limit()
    make_private_directory(node.node_dir, WORDS)
    with (
        locked_node(node.node_dir),
        listening(node.socket_path, WORDS) as node_socket,
        _bound(config) as client_socket,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(RouterProcess(path, config).run(client_socket, node_socket))
    return 0


class RouterApp:
    """The ASGI app: sends operators' requests to the admin app and all others to the current ingress."""

    def __init__(self, ingress: Ingress, admin: AdminApp) -> None:
        self._ingresses = IngressSwitch(ingress)
        self._admin = admin

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one request."""
        path: str = scope.get("path", "")
        if path.startswith("/sllm/") or path == "/metrics":
            await self._admin(scope, receive, send)
        else:
            await self._ingresses.current(scope, receive, send)

    def replace(self, ingress: Ingress) -> None:
        """Use another ingress for new requests; the old one finishes those that it has."""
        self._ingresses.replace(ingress)

    def close(self) -> None:
        """Close the connections to engines."""
        self._ingresses.close()


class RouterProcess:
    """All parts of a router, on one event loop."""

    def __init__(self, path: Path, config: RouterConfig) -> None:
        self._path = path
        self._config = config
        self._node = config.node_config()
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[None]] = set()

    async def run(self, client_socket: socket.socket, node_socket: socket.socket) -> None:
        """Serve until told to stop; then give requests time to finish, and end the engines."""
        ending = Ending(within_s=self._node.stop_s + IngressSettings().drain_s + CLOSE_S_MAX)
        self._loops = loops = RunLoops(ending.fail)
        agent = NodeAgent(self._node, loops=loops)
        with contextlib.suppress(Stopped):
            with ending.starting():
                await agent.start()
            try:
                async with contextlib.AsyncExitStack() as stack:
                    with ending.starting():
                        app, settings = await self._opened(agent, stack)
                        await stack.enter_async_context(served(agent, node_socket, ending=ending, loops=loops))
                    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hung_up)
                    await self._serve_clients(app, settings, listener=client_socket, ending=ending)
            finally:
                await agent.close()
        logger.info("event=router_stopped")
        ending.check()

    async def _opened(self, agent: NodeAgent, stack: contextlib.AsyncExitStack) -> tuple[RouterApp, IngressSettings]:
        """Create the app and its settings on an agent that has started; ``stack`` closes what was opened."""
        self._num_slots = agent.num_slots
        settings = await asyncio.to_thread(self._settings, self._config)
        controller = await stack.enter_async_context(self._controller(agent))
        digests = await asyncio.to_thread(self._admin_digests, self._config)
        self._admin = AdminApp(
            controller, key_digests=digests, reload=self.reload, keep=self._served.kept.keep, check=self._check_model
        )
        self._admin.set_defaults(self._config.defaults)
        self._admin.set_scrape_keys(await asyncio.to_thread(_scrape_digests, self._config))
        self._app = RouterApp(Ingress(controller, settings), self._admin)
        return self._app, settings

    async def _serve_clients(
        self, app: RouterApp, settings: IngressSettings, *, listener: socket.socket, ending: Ending
    ) -> None:
        """Serve clients until the router ends. If the HTTP server ends earlier, the router fails."""
        loop = asyncio.get_running_loop()
        counts = self._served.controller.counts.clients
        serving = loop.create_task(serve_app(app, settings, sockets=[listener], counts=counts))

        def ended(_: asyncio.Task[None]) -> None:
            if not ending.has_begun:
                ending.fail("the HTTP server has ended")

        serving.add_done_callback(ended)
        host, port = listener.getsockname()[:2]
        write_url(self._node.node_dir, host, port)
        num_models = len(self._served.controller.models)
        logger.info("event=router_serving url=http://%s:%d models=%d%s", host, port, num_models, self._deleted())
        try:
            await ending.wait()
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    def _hung_up(self) -> None:
        """Handle SIGHUP: reload in a task."""
        task = asyncio.get_running_loop().create_task(self._reload_or_tell())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    def _require_hidden(self, config: RouterConfig) -> None:
        """Refuse keys from variables that engines and their warm parent already have in their environment."""
        new = set(config.node_config().secret_variables) - set(self._node.secret_variables)
        if told := sorted(name for name in new if read_variable(name) is not None):
            raise ConfigError(
                f"keys: running engines have {', '.join(told)} in their environment; restart the router, or give "
                "the key as {file: PATH}"
            )

    async def reload(self) -> Reloaded:
        """Read the file again and apply it.

        Raises:
            ConfigError: it is wrong, or changes what can't change while the router serves; nothing was applied.
        """
        async with self._reloading:
            config, changes, warnings = await asyncio.to_thread(_read_again, self._path, self._served.config)
            changes.require_live()
            self._require_hidden(config)
            settings = await asyncio.to_thread(self._settings, config)
            digests = await asyncio.to_thread(self._admin_digests, config)
            scrape_digests = await asyncio.to_thread(_scrape_digests, config)
            await self._served.apply(config, changes)
            self._admin.set_defaults(config.defaults)
            self._admin.set_keys(digests)
            self._admin.set_scrape_keys(scrape_digests)
            self._app.replace(Ingress(self._served.controller, settings))
        _warn(self._path, warnings)
        num_changed = len(changes.restarted) + len(changes.adjusted)
        told = f"added {len(changes.added)}, removed {len(changes.removed)}, changed {num_changed}"
        told += self._deleted()
        logger.info("event=reloaded path=%s %s", self._path, told)
        return Reloaded(told, [str(warning) for warning in warnings])

    def _deleted(self) -> str:
        """Words about models of the file that were deleted through the API; empty if there are none."""
        running = self._served.controller.models
        deleted = [model.name for model in self._served.config.models if model.name not in running]
        if not deleted:
            return ""
        more = f" and {len(deleted) - SHOWN_MAX} more" if len(deleted) > SHOWN_MAX else ""
        names = ", ".join(deleted[:SHOWN_MAX])
        return f"; not served until they are deployed or changed in the file, as they were deleted: {names}{more}"

    def _check_model(self, model: ModelConfig) -> list[str]:
        return require_model(self._served.config.node, model)

    async def _reload_or_tell(self) -> None:
        try:
            await self.reload()
        except ConfigError as error:
            logger.error("event=reload_refused reason=%s", error)

    @contextlib.asynccontextmanager
    async def _controller(self, agent: NodeAgent) -> AsyncIterator[Controller]:
        path = self._node.node_dir / ESTIMATES_NAME
        self._served = served = ConfiguredController(
            self._config,
            SqliteStore(self._node.node_dir / STATE_NAME),
            directory=self._path.absolute().parent,
            estimator=await asyncio.to_thread(read_estimates, path),
        )
        controller = served.controller
        try:
            await served.deploy()
        except StateError as error:
            raise ConfigError(str(error)) from None
        prepare_to_serve()
        await controller.start(self._loops)
        await controller.add_node(NODE_NAME, agent)
        saving = self._loops.start("saving estimates", lambda: _save_later(controller, path))
        try:
            yield controller
        finally:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)
            await controller.close()
            await _save(controller, path)

    def _settings(self, config: RouterConfig) -> IngressSettings:
        settings = config.ingress_settings(read_key_digests(config.keys.clients, "keys.clients"))
        kept = descriptors_kept(self._num_slots) + _AGENT_CLIENTS
        wanted = settings.connections_max
        num = connections_within(raise_file_limit(), wanted, each=_DESCRIPTORS_A_CONNECTION, kept=kept)
        if num < wanted:
            logger.warning("event=connections_bounded wanted=%d connections=%d reason='ulimit -n'", wanted, num)
        return settings.model_copy(update={"connections_max": num})

    def _admin_digests(self, config: RouterConfig) -> tuple[str, ...]:
        """Digests of the configured admin keys, and of the key in the agent's folder for this user's own commands."""
        own = digest_of(open_key(self._node.node_dir / ADMIN_KEY_NAME))
        return (own, *read_key_digests(config.keys.admin, "keys.admin"))


def _read_again(path: Path, old: RouterConfig) -> tuple[RouterConfig, Changes, list[Problem]]:
    """Read the file as it is now, and compare it with the old configuration. Blocking.

    Raises:
        InvalidConfig: something in it is wrong.
    """
    with no_collections():
        config, warnings = read_checked_config(path)
        changes = compare(old, config)
        return with_known_models(config, old), changes, warnings


def _scrape_digests(config: RouterConfig) -> tuple[str, ...]:
    return read_key_digests(config.keys.metrics, "keys.metrics")


def _warn(path: Path, warnings: Iterable[Problem]) -> None:
    for warning in warnings:
        logger.warning("event=config_warning path=%s problem=%r", path, str(warning))


async def _save_later(controller: Controller, path: Path) -> None:
    await asyncio.sleep(SAVE_S)
    await _save(controller, path)


async def _save(controller: Controller, path: Path) -> None:
    """Save what was learned. If that fails (a full disk), only the next router suffers: it has to guess again."""
    record = controller.core.estimator.to_record()  # on the loop, which also changes the estimator
    try:
        await asyncio.to_thread(write_record, path, record)
    except OSError as error:
        logger.warning("event=estimates_not_written path=%s reason=%s", path, error)


@contextlib.contextmanager
def _bound(config: RouterConfig) -> Iterator[socket.socket]:
    """Listen on the address that clients connect to."""
    host, port = config.server.host, config.server.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"server: {host} port {port} can't be had ({error.strerror}); end what listens there, or set `server.port`"
        ) from None
    with listener:
        listener.setblocking(False)
        yield listener
