"""The proxy launcher: websockets without delay, whole, and ended on both sides; responses that stream."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler, websocket_connect

from tests.system.hubclient import HubError, call, eventually
from tests.system.nbosenv import environment
from tests.system.ports import free_port


@dataclass
class Upstream:
    """A small server behind the proxy, and where the proxy shows it."""

    url: str = ""
    sockets: list[WebSocketHandler] = field(default_factory=list)


class Cell(WebSocketHandler):
    """Answers as a Jupyter Server does: several small frames for one."""

    def initialize(self, upstream: Upstream) -> None:
        self.upstream = upstream

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return subprotocols[0] if subprotocols else None

    def open(self, *args: str, **kwargs: str) -> None:
        self.set_nodelay(True)
        self.upstream.sockets.append(self)

    def on_message(self, message: str | bytes) -> None:
        for _ in range(3):
            self.write_message("busy")
        self.write_message(message, binary=isinstance(message, bytes))


class Slow(RequestHandler):
    """An event stream: a line now, the next one a second later."""

    async def get(self) -> None:
        self.write("first\n")
        await self.flush()
        await asyncio.sleep(1)
        self.write("second\n")


class Echo(RequestHandler):
    def get(self) -> None:
        self.set_header("Set-Cookie", "a=1")
        self.add_header("Set-Cookie", "b=2")
        self.finish({"proto": self.request.headers.get("X-Forwarded-Proto"), "host": self.request.host})


def start_proxy(port: int, api: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "nbos_spawner.proxy", "--ip=127.0.0.1", f"--port={port}", "--api-ip=127.0.0.1"]
    env = {**environment(), "CONFIGPROXY_AUTH_TOKEN": "secret"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen([*command, f"--api-port={api}"], env=env, stdout=quiet, stderr=quiet)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    found = Upstream()
    routes: list[Any] = [("/u/ws", Cell, {"upstream": found}), ("/u/slow", Slow), ("/u/echo", Echo)]
    server = HTTPServer(Application(routes, websocket_max_message_size=1 << 28))
    socket, target = bind_unused_port()
    server.add_socket(socket)
    port, api = free_port(), free_port()
    proxy = start_proxy(port, api)
    try:

        async def routed() -> bool:
            try:
                body = {"target": f"http://127.0.0.1:{target}"}
                await call("POST", f"http://127.0.0.1:{api}/api/routes/u", "secret", body)
            except HubError:
                return False
            return True

        await eventually(routed, "the proxy takes routes", 20)
        found.url = f"127.0.0.1:{port}/u"
        yield found
    finally:
        proxy.terminate()
        proxy.wait(10)
        server.stop()


async def test_a_round_trip_of_several_frames_takes_no_40_ms(upstream: Upstream) -> None:
    socket = await websocket_connect(f"ws://{upstream.url}/ws")
    times = []
    for _ in range(40):
        began = time.perf_counter()
        await socket.write_message("x = 1")
        for _ in range(4):
            await socket.read_message()
        times.append(time.perf_counter() - began)
    assert sorted(times)[20] < 0.02


async def test_binary_frames_and_the_subprotocol_pass(upstream: Upstream) -> None:
    socket = await websocket_connect(f"ws://{upstream.url}/ws", subprotocols=["v1.kernel.websocket.jupyter.org"])
    assert socket.selected_subprotocol == "v1.kernel.websocket.jupyter.org"
    await socket.write_message(b"\xff\x00\xfe", binary=True)
    assert [await socket.read_message() for _ in range(4)][3] == b"\xff\x00\xfe"


async def test_a_message_of_20_mb_passes_both_ways(upstream: Upstream) -> None:
    socket = await websocket_connect(f"ws://{upstream.url}/ws", max_message_size=1 << 28)
    image = os.urandom(20 << 20)
    await socket.write_message(image, binary=True)
    assert [await socket.read_message() for _ in range(4)][3] == image


async def test_the_browser_is_told_when_the_server_goes_away(upstream: Upstream) -> None:
    socket = await websocket_connect(f"ws://{upstream.url}/ws")
    await socket.write_message("x")
    for _ in range(4):
        await socket.read_message()
    upstream.sockets[0].close(1001)
    assert await asyncio.wait_for(socket.read_message(), 5) is None


async def test_the_server_is_told_when_the_browser_goes_away(upstream: Upstream) -> None:
    socket = await websocket_connect(f"ws://{upstream.url}/ws")
    socket.close()

    async def told() -> bool:
        return upstream.sockets[0].close_code is not None or upstream.sockets[0].ws_connection is None

    await eventually(told, "the server's side is closed", 5)


async def test_a_response_streams(upstream: Upstream) -> None:
    began, seen = time.monotonic(), []
    request = HTTPRequest(
        f"http://{upstream.url}/slow", streaming_callback=lambda chunk: seen.append((chunk, time.monotonic() - began))
    )
    await AsyncHTTPClient().fetch(request)
    assert seen[0][0] == b"first\n"
    assert seen[0][1] < 0.7 < seen[-1][1]


async def test_headers_pass_whole(upstream: Upstream) -> None:
    reply = await AsyncHTTPClient().fetch(f"http://{upstream.url}/echo")
    assert reply.headers.get_list("Set-Cookie") == ["a=1", "b=2"]
    assert b'"proto": "http"' in reply.body
    assert upstream.url.split("/")[0].encode() in reply.body


async def test_an_unknown_path_is_404(upstream: Upstream) -> None:
    reply = await AsyncHTTPClient().fetch(f"http://{upstream.url.split('/')[0]}/nowhere", raise_error=False)
    assert reply.code == 404
