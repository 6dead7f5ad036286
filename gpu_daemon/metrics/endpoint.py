"""Where Prometheus asks: HTTP on an address of its own, open only where it is configured.

Guarantees: who cannot prove who they are learns nothing but that (401, 403), whatever they ask for; a handshake or a
request that does not come to its end is cut off; what goes wrong here never reaches the rest of the daemon.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from gpu_daemon.metrics.config import Endpoint, MetricsError, read_token

log = logging.getLogger("gpu_daemon")

PATH = "/metrics"
PATIENCE = 20.0
"""Seconds that a connection may stay idle, or take over its request."""
HEADERS = 8192

Render = Callable[[str], Awaitable[tuple[bytes, str]]]


class _Guarded(RequestHandler):
    """Checks who asks before anything else."""

    def initialize(self, endpoint: Endpoint, render: Render) -> None:
        self.endpoint, self.render_metrics = endpoint, render

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.clear_header("Server")

    def prepare(self) -> None:
        if self.endpoint.client_ca is not None and not self._is_client():
            raise HTTPError(403)
        if self.endpoint.token_file is not None and not self._has_token():
            self.set_header("WWW-Authenticate", "Bearer")
            raise HTTPError(401)

    def _is_client(self) -> bool:
        """The handshake has checked the certificate; whose it is, is checked here."""
        certificate: Any = self.request.get_ssl_certificate() or {}
        names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
        return any(name in self.endpoint.clients for name in names)

    def _has_token(self) -> bool:
        assert self.endpoint.token_file is not None
        try:
            token = read_token(self.endpoint.token_file)
        except MetricsError as err:
            log.error("nobody can ask for metrics: %s", err)
            return False
        kind, _, given = self.request.headers.get("Authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.finish(f"{status_code}\n")


class _Metrics(_Guarded):
    async def get(self) -> None:
        body, content_type = await self.render_metrics(self.request.headers.get("Accept", ""))
        self.set_header("Content-Type", content_type)
        self.finish(body)


class _Nothing(_Guarded):
    def prepare(self) -> None:
        super().prepare()
        raise HTTPError(404)


@contextlib.asynccontextmanager
async def serving(endpoint: Endpoint | None, render: Render) -> AsyncIterator[int]:
    """Listens within the block; gives the port. None: nothing happens. Raises MetricsError when it cannot be opened."""
    if endpoint is None:
        yield 0
        return
    arguments = {"endpoint": endpoint, "render": render}
    application = Application(
        [(PATH, _Metrics, arguments)],
        default_handler_class=_Nothing,
        default_handler_args=arguments,
        log_function=_log,
    )
    sockets = _bind(endpoint)
    server = HTTPServer(
        application,
        ssl_options=_tls(endpoint),
        max_header_size=HEADERS,
        max_body_size=HEADERS,
        idle_connection_timeout=PATIENCE,
        body_timeout=PATIENCE,
    )
    server.add_sockets(sockets)
    port = int(sockets[0].getsockname()[1])
    scheme = "http" if endpoint.cert is None else "https"
    log.info("metrics at %s://%s:%d%s", scheme, endpoint.address, port, PATH)
    try:
        yield port
    finally:
        server.stop()
        await server.close_all_connections()


def _bind(endpoint: Endpoint) -> list[socket.socket]:
    try:
        return bind_sockets(endpoint.port, endpoint.address)
    except OSError as err:
        raise MetricsError(f"Metrics.listen: {endpoint.address}:{endpoint.port} cannot be listened at: {err}") from err


def _tls(endpoint: Endpoint) -> ssl.SSLContext | None:
    if endpoint.cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(endpoint.cert, endpoint.key)
        if endpoint.client_ca is not None:
            context.load_verify_locations(endpoint.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as err:
        raise MetricsError(f"Metrics.cert, key or client_ca cannot be used: {err}") from err
    return context


def _log(handler: RequestHandler) -> None:
    """A line for what was refused, without what was asked for: who may not ask may not write into the log, either."""
    if handler.get_status() >= 400:
        log.warning("metrics: %d to %s", handler.get_status(), handler.request.remote_ip)
