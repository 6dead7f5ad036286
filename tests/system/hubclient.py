"""A small client of JupyterHub for tests and benchmarks: users, their servers, their kernels.

Guarantees: every call has a deadline and says in its error what was asked of whom and what came back. It
knows nothing of NBOS, so that the same script drives a stock JupyterHub beside ours.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest

from tests.system.channels import Channels
from tests.system.messages import Json

T = TypeVar("T")


class HubError(RuntimeError):
    """A call was refused: `status` is the HTTP code (0: no answer at all), `body` what came with it."""

    def __init__(self, what: str, status: int, body: str) -> None:
        super().__init__(f"{what}: {status} {body[:800]}")
        self.status = status
        self.body = body


async def eventually(
    probe: Callable[[], Awaitable[T | None]], described: str, timeout: float = 30.0, every: float = 0.05
) -> T:
    """The first result of `probe` that is not None or False. TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        found = await probe()
        if found is not None and found is not False:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{described}: not within {timeout:g} s")
        await asyncio.sleep(every)


async def call(
    method: str,
    url: str,
    token: str,
    body: Any = None,
    timeout: float = 30.0,
) -> Any:
    """One JSON call with a JupyterHub token; the decoded answer, None when it is empty. Raises HubError."""
    request = HTTPRequest(
        url,
        method=method,
        headers={"Authorization": f"token {token}", "Content-Type": "application/json"},
        # The Python proxy 0.4 forwards a POST without a body in a way that tornado refuses: always send one.
        body=json.dumps(body or {}) if method in ("POST", "PUT", "PATCH") else None,
        allow_nonstandard_methods=True,
        request_timeout=timeout,
        connect_timeout=timeout,
    )
    what = f"{method} {url}"
    try:
        response = await AsyncHTTPClient().fetch(request)
    except HTTPClientError as err:
        text = err.response.body.decode(errors="replace") if err.response else str(err)
        raise HubError(what, err.code, text) from None
    except OSError as err:
        raise HubError(what, 0, str(err)) from None
    return json.loads(response.body) if response.body else None


@dataclass(frozen=True)
class Hub:
    """A JupyterHub at `url` (http://host:port/…) and a token, an admin's for most calls."""

    url: str
    token: str

    async def api(self, method: str, path: str, body: Any = None, timeout: float = 30.0) -> Any:
        return await call(method, f"{self.url.rstrip('/')}/hub/api/{path}", self.token, body, timeout)

    async def service(self, method: str, path: str, body: Any = None, timeout: float = 30.0) -> Any:
        """A call to a hub-managed service: `path` is below /services/."""
        return await call(method, f"{self.url.rstrip('/')}/services/{path}", self.token, body, timeout)

    def as_user(self, token: str) -> Hub:
        return Hub(self.url, token)

    async def ready(self, timeout: float = 60.0) -> None:
        """Until the hub answers on its API."""

        async def answers() -> bool:
            try:
                await self.api("GET", "", timeout=2.0)
            except HubError as err:
                if err.status in (0, 404, 502, 503, 599):
                    return False
                raise
            return True

        await eventually(answers, f"JupyterHub at {self.url} answers", timeout)

    async def add_user(self, user: str) -> None:
        """Make the user unless they exist."""
        try:
            await self.api("POST", f"users/{quote(user)}")
        except HubError as err:
            if err.status != 409:
                raise

    async def user_token(self, user: str, scopes: list[str] | None = None) -> str:
        """A new token of the user's own, for what only its owner may do."""
        body: Json = {"note": "test", "expires_in": 7200}
        if scopes is not None:
            body["scopes"] = scopes
        made = await self.api("POST", f"users/{quote(user)}/tokens", body)
        return str(made["token"])

    async def start_server(self, user: str, options: Json | None = None, timeout: float = 60.0) -> Server:
        """Start the user's server with these answers to the spawn form, and wait until it answers."""
        await self.add_user(user)
        try:
            await self.api("POST", f"users/{quote(user)}/server", options or {}, timeout)
        except HubError as err:
            if not (err.status == 400 and "already running" in err.body):
                raise
        await eventually(lambda: self._is_ready(user), f"the server of {user} is ready", timeout)
        server = Server(self, user)
        await server.ready(timeout)
        return server

    async def _is_ready(self, user: str) -> bool:
        model = await self.api("GET", f"users/{quote(user)}")
        server = (model.get("servers") or {}).get("")
        if server is None and not model.get("pending"):
            raise HubError(f"the server of {user} did not start", 0, json.dumps(model))
        return bool(server and server.get("ready"))

    async def stop_server(self, user: str, timeout: float = 60.0) -> None:
        """Stop the user's server and wait until it is gone."""
        await self.api("DELETE", f"users/{quote(user)}/server", timeout=timeout)

        async def gone() -> bool:
            model = await self.api("GET", f"users/{quote(user)}")
            return not (model.get("servers") or {}).get("") and not model.get("pending")

        await eventually(gone, f"the server of {user} is gone", timeout)


@dataclass(frozen=True)
class Server:
    """A user's single-user Jupyter Server, reached through the hub's proxy."""

    hub: Hub
    user: str

    @property
    def url(self) -> str:
        return f"{self.hub.url.rstrip('/')}/user/{quote(self.user)}"

    async def api(self, method: str, path: str, body: Any = None, timeout: float = 30.0) -> Any:
        return await call(method, f"{self.url}/api/{path}", self.hub.token, body, timeout)

    async def ready(self, timeout: float = 30.0) -> None:
        """Until it answers through the proxy (the hub says ready a moment before the route is there)."""

        async def answers() -> bool:
            try:
                await self.api("GET", "kernels", timeout=5.0)
            except HubError as err:
                if err.status in (0, 404, 424, 502, 503, 599):
                    return False
                raise
            return True

        await eventually(answers, f"the server of {self.user} answers", timeout)

    async def kernelspecs(self) -> Json:
        return dict((await self.api("GET", "kernelspecs"))["kernelspecs"])

    async def kernels(self) -> list[Json]:
        return list(await self.api("GET", "kernels"))

    async def start_kernel(self, name: str, timeout: float = 60.0) -> str:
        """Start a kernel by the name of its kernelspec; its id."""
        return str((await self.api("POST", "kernels", {"name": name}, timeout))["id"])

    async def delete_kernel(self, kernel: str) -> None:
        await self.api("DELETE", f"kernels/{kernel}")

    async def interrupt(self, kernel: str) -> None:
        await self.api("POST", f"kernels/{kernel}/interrupt")

    async def restart(self, kernel: str, timeout: float = 60.0) -> None:
        await self.api("POST", f"kernels/{kernel}/restart", timeout=timeout)

    async def open(self, kernel: str, timeout: float = 30.0, session: str = "") -> Channels:
        """The kernel's websocket, the way a browser opens it; `session` where it opens it again."""
        parts = urlsplit(f"{self.url}/api/kernels/{quote(kernel)}/channels")
        scheme = "wss" if parts.scheme == "https" else "ws"
        headers = {"Authorization": f"token {self.hub.token}"}
        return await Channels.open(urlunsplit(parts._replace(scheme=scheme)), headers, timeout, session)
