"""Puts the gateway together and runs it until SIGTERM."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
import sys

from jupyterhub.services.auth import HubOAuth
from tornado.httpserver import HTTPServer
from tornado.log import access_log
from tornado.web import Application

from nbos_cluster.etcd import Etcd

from ..processes import die_with_parent
from . import dashboard, handlers
from .auth import REMEMBER, HubUsers
from .config import ConfigError, GatewayConfig, read_config
from .copy import ClusterCopy
from .kernels import Kernels
from .metrics import GatewayMetrics, MetricsHandler
from .moves import Moves
from .repair import Repair
from .watching import ClusterWatch

log = logging.getLogger("nbos.gateway")

_HARD_BODY_LIMIT = 1 << 30
"""Bytes of a refused request that are read (and dropped) before its connection is cut."""


def make_app(
    kernels: Kernels, watch: ClusterWatch, users: HubUsers, prefix: str, metrics: GatewayMetrics
) -> Application:
    """The routes below the service's prefix."""
    parts: dict[str, object] = {"kernels": kernels, "watch": watch, "users": users}
    kernel = r"api/kernels/([^/]+)"
    routes: list[tuple[str, type, dict[str, object]]] = [
        (prefix + "?", dashboard.DashboardHandler, parts),
        (f"{prefix}oauth_callback", dashboard.CallbackHandler, {}),
        (f"{prefix}static/(.*)", dashboard.AssetHandler, {"path": str(dashboard.HERE / "static")}),
        (f"{prefix}metrics", MetricsHandler, parts),
        (f"{prefix}api/health", handlers.HealthHandler, parts),
        (f"{prefix}api/openapi.json", handlers.DescriptionHandler, parts),
        (f"{prefix}api/status", handlers.StatusHandler, parts),
        (f"{prefix}api/accounts", handlers.AccountsHandler, parts),
        (f"{prefix}api/expected", handlers.ExpectedHandler, parts),
        (f"{prefix}api/kernels", handlers.KernelsHandler, parts),
        (f"{prefix}{kernel}", handlers.KernelHandler, parts),
        (f"{prefix}{kernel}/restart", handlers.RestartHandler, parts),
        (f"{prefix}{kernel}/move", handlers.MoveHandler, parts),
    ]

    def answered(handler: handlers.JsonHandler) -> None:
        metrics.answered(handler)
        _log_request(handler)

    # The same for every gateway of this service, so that a login holds on all of them.
    cookie_secret = hashlib.sha256(b"nbos dashboard cookie" + users.auth.api_token.encode()).digest()
    return Application(
        routes,
        cookie_secret=cookie_secret,
        default_handler_class=handlers.NotFoundHandler,
        default_handler_args=parts,
        log_function=answered,
        metrics=metrics,
    )


def _log_request(handler: handlers.JsonHandler) -> None:
    """One line for what failed; requests that went well are not worth one."""
    if handler.get_status() >= 400:
        access_log.warning("%d %s", handler.get_status(), handler._request_summary())


async def run(config: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    users = HubUsers(HubOAuth.instance(cache_max_age=REMEMBER))
    async with Etcd(config.endpoints, config.tls) as etcd:
        copy = ClusterCopy()
        watch = ClusterWatch(etcd, copy)
        kernels = Kernels(etcd, copy, watch, config)
        repair = Repair(kernels, watch, config.host_grace, config.at_a_time)
        metrics = GatewayMetrics(kernels.copy, watch.ready.is_set)
        moves = Moves(kernels, watch, config.host_grace, config.at_a_time, metrics.moved)
        await watch.start()
        server = HTTPServer(make_app(kernels, watch, users, config.prefix, metrics), max_body_size=_HARD_BODY_LIMIT)
        server.listen(config.port, config.address, reuse_port=True)
        log.info("the gateway serves http://%s:%d%s", config.address, config.port, config.prefix)
        repairing = asyncio.create_task(repair.run(), name="repair")
        stopping = asyncio.create_task(stopped.wait(), name="stop")
        moving = asyncio.create_task(moves.run(), name="moves")
        # Watches, repair and moves never end by themselves. Should one fail, the whole gateway ends and is started
        # afresh: better than one that answers from an old copy.
        parts = {repairing, moving, *watch.tasks}
        await asyncio.wait({stopping, *parts}, return_when=asyncio.FIRST_COMPLETED)
        server.stop()
        failed = [task for task in parts if task.done()]
        for task in {stopping, *parts}:
            task.cancel()
        await asyncio.gather(stopping, *parts, return_exceptions=True)
        for task in failed:
            raise RuntimeError(f"the gateway's {task.get_name()} ended") from task.exception()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = read_config()
    except ConfigError as err:
        sys.exit(f"nbos gateway: {err}")
    if config.die_with_parent:
        die_with_parent()
    asyncio.run(run(config))
