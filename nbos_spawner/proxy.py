"""Start the Python configurable-http-proxy with what notebooks need of it.

`python -m nbos_spawner.proxy` takes configurable-http-proxy's own options. It must guarantee, where version
0.4 does not:
- no 40 ms stall per cell: TCP_NODELAY on both sides of a websocket (Nagle's algorithm waits for a delayed ACK
  otherwise);
- responses stream through: the hub's spawn progress is an event stream, and long polls are longer than 20 s;
- websockets keep their subprotocol and binary frames, may carry large outputs, and the browser learns when
  the
  server's side has ended (or it would never reconnect).
"""

from __future__ import annotations

from typing import Any

from configurable_http_proxy import configproxy, handlers
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.httputil import HTTPHeaders, parse_response_start_line
from tornado.iostream import StreamClosedError
from tornado.web import Application
from tornado.websocket import WebSocketClosedError, websocket_connect

MAX_MESSAGE = 512 * 1024 * 1024
"""Bytes of one websocket message. Tornado's default of 10 MiB would cut an image of 20 MB off."""

MAX_BODY = 4 * 1024 * 1024 * 1024
"""Bytes of one response; it is streamed, never held."""

_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}


class NotebookProxyHandler(handlers.ProxyHandler):
    """One proxied request or websocket."""

    def open(self, *args: str, **kwargs: str) -> None:
        self.set_nodelay(True)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        """Called during the handshake with the browser, after the upstream side is connected: take its
        choice."""
        return self.ws_client.selected_subprotocol if self.ws_client else None

    async def start_ws_client(self, path: str | None = None) -> None:
        """Connect to the server; called before the browser's handshake is answered."""
        self.closed = False
        url = await self.get_target_url(path)
        if url is None:
            return
        request = self._get_proxy_request("ws" + url.removeprefix("http"))
        connecting = websocket_connect(request, on_message_callback=self._from_server, max_message_size=MAX_MESSAGE)
        try:
            self.ws_client = await handlers.apply_timeout(self.proxy.timeout, connecting)
            self.ws_client.protocol.set_nodelay(True)
        except HTTPClientError as err:
            self.set_status(err.code)
            self.finish(err.message)
        except (OSError, TimeoutError) as err:
            await self.handle_proxy_error(503, err)

    def _from_server(self, message: str | bytes | None) -> None:
        if message is None:
            self._server_closed()
            return
        self._touch()
        try:
            self.write_message(message, binary=isinstance(message, bytes))
        except WebSocketClosedError:
            self.on_close()

    def _server_closed(self) -> None:
        """Pass the end on. The browser reconnects when it is told, and only then."""
        code = getattr(self.ws_client, "close_code", None)
        if self.ws_connection is not None:
            # 1005 and 1006 say how it ended but must not be sent; 1001: the server is going away.
            self.close(code if code not in (None, 1005, 1006) else 1001)

    def on_message(self, message: str | bytes) -> None:
        if self.ws_client is None:
            return
        self._touch()
        try:
            self.ws_client.write_message(message, binary=isinstance(message, bytes))
        except WebSocketClosedError:
            self._server_closed()

    def on_close(self) -> None:
        self.closed = True
        if self.ws_client is not None:
            self.ws_client.close()
            self.ws_client = None

    def _touch(self) -> None:
        if self.target:
            self.proxy.update_last_activity(self.target["prefix"])

    def _get_proxy_request(self, url: str) -> HTTPRequest:
        request = super()._get_proxy_request(url)
        request.headers = HTTPHeaders(self.request.headers)
        request.headers.update(self.proxy.custom_headers)
        if self.proxy.x_forward:
            self._add_forwarded(request.headers)
        request.request_timeout = self.proxy.proxy_timeout or 0  # 0: none; tornado would take None for 20 s
        request.decompress_response = False  # pass compressed bodies on as they are
        return request

    def _add_forwarded(self, headers: HTTPHeaders) -> None:
        """Say who asked. (0.4.0 looks headers up by a lower-case name in a plain dict, and so finds none.)"""
        host = headers.get("Host", "")
        scheme = self.request.protocol
        port = host.rpartition(":")[2] if host.rpartition(":")[2].isdigit() else {"https": "443"}.get(scheme, "80")
        for name, value in (("For", self.request.remote_ip or ""), ("Port", port), ("Proto", scheme)):
            before = headers.get(f"X-Forwarded-{name}")
            headers[f"X-Forwarded-{name}"] = f"{before},{value}" if before else value
        headers.setdefault("X-Forwarded-Host", host)

    def compute_etag(self) -> None:
        """The target's own headers stand; tornado must not add one."""

    async def call_proxy(self, path: str | None = None) -> None:
        """An ordinary request, streamed."""
        url = await self.get_target_url(path)
        if url is None:
            return
        request = self._get_proxy_request(url)
        stream = _ResponseStream(self)
        request.header_callback = stream.header
        request.streaming_callback = stream.body
        try:
            response = await AsyncHTTPClient().fetch(request, raise_error=False)
        except (OSError, HTTPClientError) as err:
            await self._fail(stream, err)
            return
        if response.code == 599:
            await self._fail(stream, response.error)
            return
        await stream.done()

    async def _fail(self, stream: _ResponseStream, err: BaseException | None) -> None:
        if stream.started:  # half an answer is out: only breaking the connection tells the client
            if self.request.connection is not None:
                self.request.connection.stream.close()
        else:
            await self.handle_proxy_error(503, err)


class _ResponseStream:
    """Passes one response of the target on as it arrives: status and headers, then the body in pieces."""

    def __init__(self, handler: NotebookProxyHandler) -> None:
        self._handler = handler
        self._headers = HTTPHeaders()
        self._status = 502
        self.started = False

    def header(self, line: str) -> None:
        line = line.rstrip("\r\n")
        if line.startswith("HTTP/"):
            self._status, self._headers = parse_response_start_line(line).code, HTTPHeaders()
        elif line:
            self._headers.parse_line(line)

    def body(self, chunk: bytes) -> Any:
        self._start()
        self._handler.write(chunk)
        return self._flush()

    async def _flush(self) -> None:
        try:
            await self._handler.flush()
        except StreamClosedError:
            raise OSError("the client left before the response ended") from None

    async def done(self) -> None:
        self._start()
        if not self._handler._finished:
            self._handler.finish()

    def _start(self) -> None:
        if self.started:
            return
        self.started = True
        handler = self._handler
        handler.set_status(self._status)
        for name in ("Server", "Content-Type", "Date"):
            handler.clear_header(name)
        for name, value in self._headers.get_all():
            if name.lower() not in _HOP_BY_HOP:
                handler.add_header(name, value)


class NotebookProxy(configproxy.PythonProxy):
    """The proxy with our handler in place of its own."""

    def __init__(self, options: Any = ()) -> None:
        super().__init__(options)
        self.proxy_app = Application(
            [(r"/(.*)", NotebookProxyHandler, {"proxy": self})], websocket_max_message_size=MAX_MESSAGE
        )


def main() -> None:
    from configurable_http_proxy import cli

    AsyncHTTPClient.configure(None, max_clients=1000, max_body_size=MAX_BODY)
    cli.PythonProxy = NotebookProxy
    cli.main(prog_name="nbos-proxy")


if __name__ == "__main__":
    main()
