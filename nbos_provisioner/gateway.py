"""The gateway as the Jupyter Server sees it: HTTP with the user's own JupyterHub token, every wait bounded.

Guarantees: a gateway that is away is asked again within a deadline, then the error names its URL and what to do; what
it refuses is said in its own words. Nothing here is on the path of a cell.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

from tornado.httpclient import HTTPClientError, HTTPResponse
from tornado.netutil import DefaultLoopResolver
from tornado.simple_httpclient import SimpleAsyncHTTPClient

PATIENCE = 15.0
"""Seconds in which a call is repeated while the gateway is away."""

FIRST_PAUSE, LAST_PAUSE = 0.2, 2.0
_AWAY = {429, 502, 503, 504, 599}


class GatewayError(RuntimeError):
    """A call to the gateway failed; `status` is its HTTP status, 0 when it could not be reached."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class _Resolver(DefaultLoopResolver):
    """Also while the interpreter ends, when its threads are gone: blocking managers shut kernels down in `atexit`."""

    async def resolve(self, host: str, port: int, family: socket.AddressFamily = socket.AF_UNSPEC) -> Any:
        try:
            return await super().resolve(host, port, family)
        except RuntimeError:
            found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
            return [(family, address) for family, _, _, _, address in found]


class Gateway:
    """`url`: the service's base, `…/services/nbos/`. `token`: of the user whose kernels these are."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/") + "/"
        self.token = token

    async def create(self, kernel_id: str, request: dict[str, Any]) -> dict[str, Any]:
        return await self._call("POST", "api/kernels", {"kernel_id": kernel_id, **request}, timeout=30.0)

    async def restart(self, kernel_id: str) -> dict[str, Any]:
        return await self._call("POST", f"api/kernels/{kernel_id}/restart", {}, timeout=30.0)

    async def delete(self, kernel_id: str) -> None:
        """Remove the kernel; that it is gone already is fine."""
        try:
            await self._call("DELETE", f"api/kernels/{kernel_id}", patience=5.0)
        except GatewayError as err:
            if err.status != 404:
                raise

    async def kernels(self, patience: float | None = None) -> list[dict[str, Any]]:
        found = await self._call("GET", "api/kernels", patience=patience)
        return found if isinstance(found, list) else list(found.get("kernels", []))

    async def expect(self, image: str) -> None:
        """A kernel may be asked for soon: hosts may make ready for it."""
        await self._call("POST", "api/expected", {"image": image}, patience=2.0)

    def of_kernel(self, kernel_id: str) -> str:
        """Where the kernel itself is found."""
        return f"{self.url}api/kernels/{kernel_id}"

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float = 10.0,
        patience: float | None = None,
    ) -> Any:
        since, pause = time.monotonic(), FIRST_PAUSE
        patience = PATIENCE if patience is None else patience
        while True:
            try:
                return self._result(await self._send(method, path, body, timeout))
            except (OSError, HTTPClientError) as err:
                refused = isinstance(err, HTTPClientError) and err.code not in _AWAY
                if refused or time.monotonic() + pause > since + patience:
                    raise self._error(err, method, path, time.monotonic() - since) from err
            await asyncio.sleep(pause)
            pause = min(pause * 2, LAST_PAUSE)

    async def _send(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> HTTPResponse:
        client = SimpleAsyncHTTPClient(force_instance=True, resolver=_Resolver())
        try:
            return await client.fetch(
                self.url + path,
                method=method,
                body=json.dumps(body) if body is not None else None,
                headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
                connect_timeout=3.0,
                request_timeout=timeout,
                allow_nonstandard_methods=True,
            )
        finally:
            client.close()

    @staticmethod
    def _result(response: HTTPResponse) -> Any:
        return json.loads(response.body) if response.body else {}

    def _error(self, err: Exception, method: str, path: str, waited: float) -> GatewayError:
        status = err.code if isinstance(err, HTTPClientError) else 0
        if status in _AWAY or status == 0:
            return GatewayError(
                f"the NBOS gateway at {self.url} cannot be reached ({err}, tried for {waited:.0f} s). "
                "Running notebooks go on; to start, restart or end a kernel, try again when the hub is back "
                "(`nbos status` tells), or ask its administrator",
                0,
            )
        said = _words(err)
        if status in (401, 403) and not said:
            said = "this server's JupyterHub token is not accepted; restart your server from the hub's control panel"
        return GatewayError(f"the NBOS gateway refused {method} {path} ({status}): {said or err}", status)


def _words(err: Exception) -> str:
    """The gateway's own message in its JSON error."""
    response = getattr(err, "response", None)
    try:
        return str(json.loads(response.body)["message"]) if response is not None and response.body else ""
    except (ValueError, KeyError, TypeError):
        return ""
