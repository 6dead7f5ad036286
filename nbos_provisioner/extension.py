"""The Jupyter Server extension: websockets without Nagle's algorithm, the kernelspec, living kernels, lasting sessions.

Guarantees: it can be loaded into any Jupyter Server 2.21; what it changes about plain kernels is the delay of their
websockets only.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from jupyter_client.provisioning import KernelProvisionerFactory
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from traitlets import TraitError

from .filing import Filing, file_before_reading
from .gateway import GatewayError
from .kernelmanager import NBOSKernelManager
from .websocket import NBOSWebsocketConnection

PROVISIONER = "nbos-provisioner"
KERNELS = Path(__file__).parent / "kernels"
SERVER_FIRST = 1.0
"""Seconds after its start that the server, and the page that opens it, have for themselves."""


def load(app: Any) -> None:
    """Called by the Jupyter Server while it starts, before it listens."""
    without_nagle()
    offer_provisioner()
    offer_kernelspec(app.kernel_spec_manager)
    keep_sessions(app)
    manager = app.kernel_manager
    if not isinstance(manager, NBOSKernelManager):
        app.log.warning(
            "NBOS kernels will end with this server: set c.ServerApp.kernel_manager_class = "
            '"nbos_provisioner.kernelmanager.NBOSKernelManager" to keep them'
        )
        return
    keep_outputs(app, manager)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        app.io_loop.run_sync(lambda: adopt(manager))
    else:
        app.io_loop.add_callback(adopt, manager)


def without_nagle() -> None:
    """Send every frame of a kernel's websocket at once.

    A cell is several small frames (busy, input, reply, idle). With Nagle's algorithm, which tornado leaves on, the
    second waits for the browser's delayed acknowledgement of the first: 40 ms for a cell that takes 3.
    """
    if getattr(KernelWebsocketHandler.open, "nbos", False):
        return
    plain = KernelWebsocketHandler.open

    async def open(self: Any, *args: Any, **kwargs: Any) -> None:
        self.set_nodelay(True)
        await plain(self, *args, **kwargs)

    open.nbos = True  # type: ignore[attr-defined]
    KernelWebsocketHandler.open = open


def offer_kernelspec(manager: Any) -> None:
    """Make "Python 3 (NBOS)" known where the package is not installed into sys.prefix."""
    if "nbos-python3" not in manager.find_kernel_specs():
        manager.kernel_dirs = [*manager.kernel_dirs, str(KERNELS)]


def offer_provisioner() -> None:
    """Make the provisioner known where NBOS runs from a checkout, whose entry points nobody has installed."""
    group = KernelProvisionerFactory.GROUP_NAME
    entry = EntryPoint(PROVISIONER, "nbos_provisioner.provisioner:NBOSProvisioner", group)
    KernelProvisionerFactory.provisioners.setdefault(PROVISIONER, entry)


def keep_sessions(app: Any) -> None:
    """Keep which notebook belongs to which kernel on disk, so that JupyterLab finds both again after a restart."""
    sessions = app.session_manager
    if getattr(sessions, "database_filepath", None) != ":memory:" or sessions._connection is not None:
        return
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    folder = home / "nbos" / (os.environ.get("JUPYTERHUB_SERVER_NAME") or "default")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sessions.database_filepath = str(folder / "sessions.sqlite")
    except (OSError, TraitError, sqlite3.Error) as err:
        app.log.warning("sessions cannot be kept in %s (%s); notebooks will ask for their kernel", folder, err)


def keep_outputs(app: Any, manager: NBOSKernelManager) -> None:
    """Give browsers that come back what they have missed, and notebooks what nobody was there to receive."""
    settings = app.web_app.settings
    kind = settings.get("kernel_websocket_connection_class")
    if kind is ZMQChannelsWebsocketConnection:
        settings["kernel_websocket_connection_class"] = NBOSWebsocketConnection
    elif not issubclass(kind, NBOSWebsocketConnection):
        app.log.warning(
            "outputs of NBOS kernels are lost while their browser is away: ServerApp.kernel_websocket_connection_class "
            "is not Jupyter Server's own; make it a subclass of nbos_provisioner.websocket.NBOSWebsocketConnection"
        )
        return
    manager.nbos_filing = Filing(manager, app.session_manager, app.contents_manager, app.log)
    settings["nbos_filing"] = manager.nbos_filing
    file_before_reading()


async def adopt(manager: NBOSKernelManager) -> None:
    manager.prepare_router(SERVER_FIRST)
    try:
        await manager.adopt()
    except GatewayError as err:
        manager.log.error("living kernels are not known yet, asking on: %s", err)
        manager.nbos_adoption = asyncio.ensure_future(manager.adopt_later())
