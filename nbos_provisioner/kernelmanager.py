"""`NBOSKernelManager`: the Jupyter Server's kernels, of which NBOS ones outlive the server.

Guarantees: when the server ends, NBOS kernels are let go, all others are shut down as ever; when it starts, the user's
living kernels are there again, under the same ids, before the first request is answered.

Configure with `c.ServerApp.kernel_manager_class = "nbos_provisioner.kernelmanager.NBOSKernelManager"`.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import Any

from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado import web
from traitlets import Bool, Float, Unicode

from .filing import Filing
from .gateway import Gateway, GatewayError
from .spare_router import SpareRouter
from .websocket import Offline, is_nbos


class NBOSKernelManager(AsyncMappingKernelManager):
    nbos_kernel_name = Unicode("nbos-python3", config=True, help="Kernelspec under which living kernels come back")
    adopt_patience = Float(5.0, config=True, help="Seconds the server's start may wait for the gateway")
    start_router_ahead = Bool(
        True, config=True, help="Keep one router process started, so that a new notebook need not wait for one (16 MB)"
    )

    nbos_spare_router: SpareRouter | None = None
    """Asked by the provisioner for its kernel's router; None: it starts one."""
    nbos_filing: Filing | None = None
    """Set by the extension."""

    def nbos_cell_ended(self, kernel_id: str, session: str, msg_id: str) -> None:
        """Called by the provisioner: the router has passed on a cell's end."""
        if self.nbos_filing is not None:
            self.nbos_filing.ended(kernel_id, session, msg_id)

    def nbos_connected(self, kernel_id: str, session: str) -> None:
        """Called by a websocket that has asked for what it has missed."""
        if self.nbos_filing is not None:
            self.nbos_filing.connected(kernel_id, session)

    def kernel_model(self, kernel_id: str) -> dict[str, Any]:
        """Called for every list of kernels. One that has just been started has no state for a moment (a trait that is
        None, beside a time of the last activity that cannot even be read): Jupyter Server would answer 500."""
        kernel = self._kernels.get(kernel_id)
        if kernel is not None and getattr(kernel, "execution_state", None) is None:
            raise web.HTTPError(404, f"Kernel is being started: {kernel_id}")
        return super().kernel_model(kernel_id)

    def start_buffering(self, kernel_id: str, session_key: str, channels: dict[str, Any]) -> None:
        """Called when a kernel's last websocket has gone: keep what the router does not, within bounds."""
        super().start_buffering(kernel_id, session_key, channels)
        km = self._kernels[kernel_id]
        if not self.buffer_offline_messages or not is_nbos(km) or not km.provisioner.keep_bytes:
            return
        offline = Offline(km.provisioner.keep_bytes, km.provisioner.keep_messages)
        self._kernel_buffers[kernel_id]["buffer"] = offline
        for channel, stream in channels.items():
            stream.on_recv(partial(offline.take, channel))

    def prepare_router(self, delay: float = 0.0) -> None:
        """Called once, by the extension: have a router wait for the next notebook. On the server's event loop."""
        if self.start_router_ahead and self.nbos_spare_router is None:
            self.nbos_spare_router = SpareRouter(self.log)
            self.nbos_spare_router.prepare(delay)

    async def shutdown_all(self, now: bool = False) -> None:
        """Called when the server ends (SIGTERM, Ctrl-C): let NBOS kernels go, shut the others down."""
        for kernel_id in list(self._pending_kernels):
            await asyncio.gather(self._pending_kernels[kernel_id], return_exceptions=True)
            if kernel_id not in self:
                # A start that failed stays pending in jupyter_client, and would end this with a 404.
                del self._pending_kernels[kernel_id]
        spare, self.nbos_spare_router = self.nbos_spare_router, None
        if spare is not None:
            await spare.close()
        mine = {kernel_id: km for kernel_id, km in self._kernels.items() if is_nbos(km)}
        await asyncio.gather(*(self._detach(kernel_id, km) for kernel_id, km in mine.items()))
        await self._async_shutdown_all(now=now)

    async def _detach(self, kernel_id: str, km: Any) -> None:
        km.stop_restarter()
        km.shutting_down = True
        await km.provisioner.detach()
        self.stop_watching_activity(kernel_id)
        self.stop_buffering(kernel_id)
        km.cleanup_connection_file()
        self.remove_kernel(kernel_id)
        self.log.info("kernel %s goes on without this server", kernel_id)

    async def adopt(self) -> list[str]:
        """Take the user's living kernels under their ids; the ids taken. Called once, before requests are answered."""
        url, token = os.environ.get("NBOS_GATEWAY_URL", ""), os.environ.get("JUPYTERHUB_API_TOKEN", "")
        if not url or not token:
            return []
        # Not waited for, and nothing depends on it.
        self._expecting = asyncio.ensure_future(self._expect(Gateway(url, token)))
        models = await Gateway(url, token).kernels(self.adopt_patience)
        owned = [str(model["kernel_id"]) for model in models if _is_mine(model)]
        wanted = [kernel_id for kernel_id in owned if kernel_id not in self]
        done = await asyncio.gather(*(self._adopt_one(kernel_id) for kernel_id in wanted))
        return [kernel_id for kernel_id, ok in zip(wanted, done, strict=True) if ok]

    async def _expect(self, gateway: Gateway) -> None:
        try:
            await gateway.expect(os.environ.get("NBOS_IMAGE", ""))
        except GatewayError as err:
            self.log.debug("the first kernel may start more slowly: %s", err)

    async def _adopt_one(self, kernel_id: str) -> bool:
        try:
            await self.start_kernel(kernel_id=kernel_id, kernel_name=self.nbos_kernel_name)
        except Exception as err:  # noqa: BLE001  (one kernel's failure, of whatever kind, must not cost the others)
            self.log.error("kernel %s could not be taken up again: %s", kernel_id, err)
            return False
        # Its state was "starting" for the server; it has been running all along. That it runs a cell its router says.
        if self._kernels[kernel_id].execution_state == "starting":
            self._kernels[kernel_id].execution_state = "idle"
        self.log.info("kernel %s is here again", kernel_id)
        return True

    async def adopt_later(self, pause: float = 2.0) -> None:
        """After a start without the gateway: go on asking until it is there."""
        while True:
            await asyncio.sleep(pause)
            pause = min(pause * 2, 60.0)
            try:
                await self.adopt()
                return
            except GatewayError as err:
                self.log.warning("living kernels are not known yet: %s", err)


def _is_mine(model: dict[str, Any]) -> bool:
    """A Hub admin sees everybody's kernels, a user those of all their servers; only this server's belong here."""
    user, server = os.environ.get("JUPYTERHUB_USER", ""), os.environ.get("JUPYTERHUB_SERVER_NAME", "")
    return (not user or model.get("owner") in (user, None)) and model.get("server", "") == server
