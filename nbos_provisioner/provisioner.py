"""`NBOSProvisioner`: gives a notebook a replicated kernel, by asking the gateway for it and putting a router in front.

Guarantees: ip and ports of a kernel never change while this Jupyter Server lives; `poll` never asks anybody, and says
that the kernel runs throughout every failover, so that the server's restarter leaves it alone; a kernel is deleted only
when its user shuts it down, never because the server ends (`detach`).
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerBase
from traitlets import Float, Integer, TraitError, Unicode, default, validate

from .gateway import Gateway, GatewayError
from .notices import LINE_AFTER
from .router_process import RouterProcess
from .spare_router import start_router

FORWARDED_ENV = ("JPY_SESSION_NAME",)
"""Of the server's environment a kernel gets only this; a replica lives on another machine."""

KEEP = {"keep_bytes": (0, 256 * 1024 * 1024), "keep_messages": (1, 1_000_000)}
"""From, to."""


class NBOSProvisioner(KernelProvisionerBase):
    gateway_url = Unicode(config=True, help="Base URL of the NBOS gateway; default: $NBOS_GATEWAY_URL")
    replicas = Integer(0, config=True, help="Replicas of a new kernel; 0: $NBOS_REPLICAS, else the gateway's default")
    lazy = Unicode(
        "", config=True, help="on, off, or from which size standbys leave variables in the store; '': $NBOS_LAZY"
    )
    gpu_line_after = Float(
        LINE_AFTER,
        min=0.0,
        config=True,
        help="Seconds a cell waits for a GPU, at least, for a line under it that says what it got, for how long it "
        "waited and what it used",
    )
    stable_start_time = Float(120.0, config=True, help="Seconds a first start may take (image pulls)")

    keep_bytes = Integer(
        16 * 1024 * 1024,
        config=True,
        help="Bytes of its cells' outputs that a kernel keeps for a browser or server that is away, in its replica and "
        "in its router; the oldest are left out first. 0: keep nothing",
    )
    keep_messages = Integer(10_000, config=True, help="Messages kept at most; neighbouring texts count as one")

    @validate("keep_bytes", "keep_messages")
    def _check_keep(self, proposal: Any) -> int:
        name, least, most = proposal["trait"].name, *KEEP[proposal["trait"].name]
        if not least <= proposal["value"] <= most:
            raise TraitError(
                f"NBOSProvisioner.{name} = {proposal['value']}: must be from {least} to {most}"
                " (keep_bytes = 0 keeps nothing)"
            )
        return int(proposal["value"])

    @default("gateway_url")
    def _default_gateway_url(self) -> str:
        return os.environ.get("NBOS_GATEWAY_URL", "")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._router: RouterProcess | None = None
        self._gateway: Gateway | None = None
        self._ended = True
        self._made = False
        self._server_driven = False
        self._deleted = False

    # -- what the KernelManager asks

    @property
    def has_process(self) -> bool:
        """Asserted by the KernelManager right after `launch_kernel`."""
        return self._router is not None and not self._ended

    async def poll(self) -> int | None:
        """Called every 3 s by the restarter: None while the kernel is meant to run. Asks nobody."""
        if self._ended:
            return 0
        return 1 if self._router is None or self._router.failed else None

    async def wait(self) -> int | None:
        """Called when the kernel was asked to end: there is no process to wait for, only the gateway's records."""
        while (code := await self.poll()) is None:
            await asyncio.sleep(0.05)
        return code

    async def send_signal(self, signum: int) -> None:
        """Never needed: the kernelspec's interrupt_mode is message. Signals to replicas are the daemons' business."""
        self.log.debug(
            "signal %d for kernel %s is not sent; replicas are ended by their daemons", signum, self.kernel_id
        )

    async def kill(self, restart: bool = False) -> None:
        self._ended = True

    async def terminate(self, restart: bool = False) -> None:
        self._ended = True

    async def shutdown_requested(self, restart: bool = False) -> None:
        """Called right after the KernelManager's own shutdown_request: the router has answered it, so this
        is the end."""
        self._server_driven = True
        self._ended = True

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Called first at every start. The command is never run here; the daemons know how to start a replica."""
        kwargs.pop("extra_arguments", None)
        if self.parent is not None:
            # Raises, with the way out, where libzmq cannot; the keys themselves come from the gateway.
            self.parent.transport_encryption = "required"
        return await super().pre_launch(cmd=["nbos-kernel"], **kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Make the kernel (or find it living), and give the router's address. A second call is a restart."""
        gateway = self._the_gateway()
        self._server_driven = self._deleted = False
        if self._made and self._router is not None and not self._router.failed:
            self._router.reset()
            model = await gateway.restart(self.kernel_id)
        else:
            model = await self._first_launch(gateway, kwargs)
        self._ended, self._made = False, True
        assert self._router is not None
        self._router.members(model)
        return self.connection_info

    async def _first_launch(self, gateway: Gateway, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The router starts while the gateway places the replicas."""
        if self._router is not None:
            await self._router.close()
        spare = getattr(self.parent.parent, "nbos_spare_router", None) if self.parent is not None else None
        self._router = RouterProcess(self.log, self._heard, spare.take if spare is not None else start_router)
        spawned = asyncio.create_task(self._router.spawn())
        try:
            model = await gateway.create(self.kernel_id, self._request(kwargs))
            await spawned
            connection = _encrypted(model["connection"])
            follow = {"url": gateway.of_kernel(self.kernel_id), "token": gateway.token}
            rerun = model.get("rerun", True)
            shown = {"keep": [self.keep_bytes, self.keep_messages], "gpu_line_after": self.gpu_line_after}
            await self._router.configure({**connection, "ip": "127.0.0.1", "rerun": rerun, "follow": follow, **shown})
        except BaseException:
            await asyncio.gather(spawned, return_exceptions=True)
            await self._router.close()
            self._router = None
            raise
        self.connection_info = _connection_info(connection, self._router.ports)
        return model

    async def cleanup(self, restart: bool = False) -> None:
        """Called last when the kernel ends: unless it is restarted, its records and replicas go as well."""
        if restart:
            return
        if self._router is not None:
            await self._router.close()
            self._router = None
        self._made = False
        if not self._deleted:
            await self._delete()

    def get_shutdown_wait_time(self, recommended: float = 5.0) -> float:
        return recommended

    def get_stable_start_time(self, recommended: float = 10.0) -> float:
        """Called by the restarter: how long a start may take before it counts as stable."""
        return max(recommended, self.stable_start_time)

    def resolve_path(self, path_str: str) -> str | None:
        """Paths of a replica are another machine's."""
        return None

    async def get_provisioner_info(self) -> dict[str, Any]:
        return {**await super().get_provisioner_info(), "gateway_url": self.gateway_url}

    # -- ours

    async def detach(self) -> None:
        """The Jupyter Server ends: leave the kernel alive, and let go of it."""
        self._ended = True
        if self._router is not None:
            await self._router.close()
            self._router = None

    def _the_gateway(self) -> Gateway:
        if self._gateway is None:
            token = os.environ.get("JUPYTERHUB_API_TOKEN", "")
            if not self.gateway_url or not token:
                missing = "NBOS_GATEWAY_URL" if not self.gateway_url else "JUPYTERHUB_API_TOKEN"
                raise GatewayError(
                    f"{missing} is not set: NBOS kernels need a server started by JupyterHub with NBOSSpawner "
                    "(`nbos up`, or configs/jupyterhub_config.py)"
                )
            self._gateway = Gateway(self.gateway_url, token)
        return self._gateway

    def _request(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What to ask the gateway for: the spawner's choice for this user, and where the notebook is."""
        request: dict[str, Any] = {}
        replicas = self.replicas or int(os.environ.get("NBOS_REPLICAS") or 0)
        if replicas:
            request["replicas"] = replicas
        lazy = self.lazy or os.environ.get("NBOS_LAZY", "")
        if lazy:
            request["lazy"] = lazy
        if os.environ.get("NBOS_RESOURCES"):
            request["resources"] = json.loads(os.environ["NBOS_RESOURCES"])
        if os.environ.get("NBOS_IMAGE"):
            request["image"] = os.environ["NBOS_IMAGE"]
        if os.environ.get("JUPYTERHUB_SERVER_NAME"):
            request["server"] = os.environ["JUPYTERHUB_SERVER_NAME"]
        if kwargs.get("cwd"):
            request["cwd"] = str(kwargs["cwd"])
        given = kwargs.get("env") or {}
        env = {name: given[name] for name in FORWARDED_ENV if name in given}
        return {**request, "env": env} if env else request

    def _heard(self, event: dict[str, Any]) -> None:
        """An event of the router."""
        if event["event"] == "shutdown_requested" and not event.get("restart"):
            asyncio.get_running_loop().call_later(0.5, self._client_shutdown)
        elif event["event"] == "cell_ended" and self.parent is not None:
            heard = getattr(self.parent.parent, "nbos_cell_ended", None)
            if heard is not None:
                heard(self.kernel_id, event["session"], event["msg_id"])

    def _client_shutdown(self) -> None:
        """A client (not the server) has asked the kernel to end: as with a plain kernel, it is then started anew."""
        if not self._server_driven and not self._ended:
            self.log.info("a client has shut kernel %s down", self.kernel_id)
            self._ended = True

    async def _delete(self) -> None:
        try:
            await self._the_gateway().delete(self.kernel_id)
            self._deleted = True
        except GatewayError as err:
            self.log.error("kernel %s may still run: %s", self.kernel_id, err)


def _encrypted(connection: dict[str, Any]) -> dict[str, Any]:
    """The connection, which must have CurveZMQ keys. Raises GatewayError."""
    if not connection.get("curve_publickey") or not connection.get("curve_secretkey"):
        raise GatewayError("the NBOS gateway gave no CurveZMQ keys for the kernel, and its messages never go in clear")
    return connection


def _connection_info(connection: dict[str, Any], ports: dict[str, int]) -> KernelConnectionInfo:
    info: dict[str, Any] = {
        "transport": "tcp",
        "ip": "127.0.0.1",
        "key": connection["key"].encode(),
        "signature_scheme": connection.get("signature_scheme", "hmac-sha256"),
        "curve_publickey": connection["curve_publickey"],
        "curve_secretkey": connection["curve_secretkey"],
        **{f"{channel}_port": port for channel, port in ports.items()},
    }
    return info
