"""What the gateway does to kernels: make, restart, delete, place anew. Each is one transaction, tried again
on a clash.

The decisions are `nbos_cluster`'s state machines; this is their shell. An operation that was carried out but
not answered may be repeated by the caller: all of them end in the same state.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from nbos_cluster import membership
from nbos_cluster.etcd import Etcd, EtcdError, EtcdUnavailable, TxnResult
from nbos_cluster.kernelview import KernelView
from nbos_cluster.kv import Txn
from nbos_cluster.placement import HostLoad, NoRoom, loads, place, replace_lost
from nbos_cluster.records import HostRecord, KernelSpec, Resources

from ..limits import Limits
from ..options import KernelOptions
from . import moverequests
from .auth import Caller
from .config import GatewayConfig
from .copy import ClusterCopy
from .errors import ApiError, no_such_kernel, unavailable
from .expecting import Expecting
from .models import may_see
from .moverequests import MoveWanted
from .requests import KernelWanted, check_count, options_of
from .secrets import new_secrets
from .watching import ClusterWatch

log = logging.getLogger("nbos.gateway")

_TRIES = 8


class Kernels:
    """The operations behind the API."""

    def __init__(self, etcd: Etcd, copy: ClusterCopy, watch: ClusterWatch, config: GatewayConfig) -> None:
        self.etcd = etcd
        self.copy = copy
        self.watch = watch
        self.config = config
        self.expecting = Expecting(etcd, config.limits)
        self._making: dict[str, asyncio.Lock] = {}
        self._said: dict[str, str] = {}

    def find(self, caller: Caller, kernel_id: str) -> KernelView:
        """The kernel, when the caller may see it. Raises ApiError 404 otherwise, for whatever reason."""
        view = self.copy.kernel(kernel_id)
        if view is None or view.spec is None or not may_see(caller, view.spec):
            raise no_such_kernel(kernel_id)
        return view

    async def make(self, caller: Caller, wanted: KernelWanted) -> tuple[KernelView, bool]:
        """The caller's kernel of that id, and whether it was made now."""
        if caller.kind != "user":
            raise ApiError(403, "not_a_user", f"{caller.name} is a Hub service; only users have kernels")
        limits = self.config.limits.of(caller.name, caller.groups)
        options = options_of(wanted, limits)
        # One at a time per user, so that a burst of requests cannot pass the count of kernels together.
        async with self._making.setdefault(caller.name, asyncio.Lock()):
            return await self._make(caller, wanted, options, limits)

    async def _make(
        self, caller: Caller, wanted: KernelWanted, options: KernelOptions, limits: Limits
    ) -> tuple[KernelView, bool]:
        known = self.copy.kernel(wanted.kernel_id)
        if known is not None and known.spec is not None:
            return self._own(known.spec, caller, known), False
        check_count(len(self.copy.owned_by(caller.name)), limits)
        spec = self._new_spec(caller, wanted, options, limits)
        result = await self.carry_out(membership.create(spec))
        outcome = membership.classify_create(spec, result)
        if isinstance(outcome, membership.Exists):
            self._own(outcome.spec, caller, None)
        await self.watch.until(lambda: self.copy.kernel(wanted.kernel_id) is not None, 5.0)
        view = self.copy.kernel(wanted.kernel_id)
        if view is None:
            raise ApiError(409, "deleted", f"kernel {wanted.kernel_id} was deleted while it was being made")
        return view, isinstance(outcome, membership.Created)

    def _own(self, spec: KernelSpec, caller: Caller, view: Any) -> Any:
        if spec.owner != caller.name:
            raise ApiError(403, "taken", f"kernel id {spec.kernel} is in use; choose another (a random UUID)")
        return view

    def _new_spec(self, caller: Caller, wanted: KernelWanted, options: KernelOptions, limits: Limits) -> KernelSpec:
        secrets = new_secrets()
        spec = KernelSpec(
            kernel=wanted.kernel_id,
            owner=caller.name,
            replicas=options.replicas,
            placement={},
            key=secrets.key,
            curve_publickey=secrets.curve_publickey,
            curve_secretkey=secrets.curve_secretkey,
            image=options.image,
            resources=Resources(**options.resources()),
            max_resources=Resources(gpus=limits.gpus, tpcs=limits.tpcs, memory=limits.memory),
            memory_limit=limits.replica_memory,
            lazy=options.lazy,
            cwd=wanted.cwd,
            env=wanted.env,
            server=wanted.server,
            created=time.time(),
            groups=tuple(sorted(caller.groups)),
        )
        try:
            return replace(spec, placement=place(spec, self.loads()))
        except NoRoom as err:
            raise unavailable(str(err)) from err

    def loads(self) -> dict[str, HostLoad]:
        specs = [view.spec for view in self.copy.living() if view.spec is not None]
        return loads(self.copy.hosts.values(), specs)

    async def replace_lost(self, kernel_id: str, lost: set[str]) -> list[str]:
        """Place the kernel's replicas that stand on `lost` hosts elsewhere; what was done, for the log.

        Empty when there was nothing to do, or nowhere to go. Hosts that are away but not given up yet stay in the plan.
        """
        view = self.copy.kernel(kernel_id)
        if view is None or view.spec is None:
            return []
        hosts = self.loads()
        for host in set(view.spec.placement.values()) - set(hosts) - lost:
            hosts[host] = _full(host)
        try:
            plan = replace_lost(view.spec, hosts)
        except NoRoom as err:
            if self._said.get(kernel_id) != str(err):  # the next round comes in a second; say it once
                log.warning("%s", err)
                self._said[kernel_id] = str(err)
            return []
        self._said.pop(kernel_id, None)
        if plan is None or plan == view.spec.placement:
            return []
        before, seen = view.spec.placement, view.revision
        result = await self.carry_out(membership.replan(view, plan))
        await self.watch.until(lambda: view.revision > seen, 2.0)
        if not result.succeeded:  # another gateway, or the user, was first
            return []
        return [
            f"replica {i} from {before.get(i, 'nowhere')} to {host}"
            for i, host in plan.items()
            if before.get(i) != host
        ]

    async def move(self, caller: Caller, kernel_id: str, wanted: MoveWanted) -> KernelView:
        """Begin to move a replica. Raises ApiError 403, 404, 409."""
        self._as_admin(caller, kernel_id)
        return await self._change(caller, kernel_id, lambda view: moverequests.begin(view, wanted, self.loads()))

    async def take_back(self, caller: Caller, kernel_id: str) -> KernelView:
        """Have the replica that moves stay where it was. Raises ApiError 403, 404, 409."""
        self._as_admin(caller, kernel_id)
        return await self._change(caller, kernel_id, moverequests.take_back)

    def _as_admin(self, caller: Caller, kernel_id: str) -> None:
        self.find(caller, kernel_id)
        moverequests.check_admin(caller)

    async def restart(self, caller: Caller, kernel_id: str) -> KernelView:
        """A new incarnation. Raises ApiError 409 when the kernel keeps changing under us."""
        return await self._change(caller, kernel_id, lambda view: membership.restart(view, at=time.time()))

    async def delete(self, caller: Caller, kernel_id: str) -> None:
        """End the kernel: spec, log, claims and all in one transaction; the daemons end the processes when
        they see it."""
        born = self.find(caller, kernel_id).born
        await self.carry_out(membership.delete(kernel_id, born))

        def gone() -> bool:
            view = self.copy.kernel(kernel_id)
            return view is None or view.born != born

        if not await self.watch.until(gone, 5.0):
            raise unavailable("etcd took the deletion but does not report it; try again soon")

    async def _change(self, caller: Caller, kernel_id: str, change: Callable[[KernelView], Txn]) -> KernelView:
        for _ in range(_TRIES):
            view = self.find(caller, kernel_id)
            seen = view.revision
            result = await self.carry_out(change(view))
            # A failed one means that our copy is behind; what is missing is on its way.
            await self.watch.until(lambda view=view, seen=seen: view.revision > seen, 2.0)  # type: ignore[misc]
            if result.succeeded:
                return self.find(caller, kernel_id)
        raise ApiError(409, "busy", f"kernel {kernel_id} keeps changing; try again")

    async def carry_out(self, txn: Txn) -> TxnResult:
        """Do `txn` in etcd. Raises ApiError 503 while etcd is away, or does not let us."""
        try:
            return await self.etcd.commit(txn)
        except EtcdUnavailable as err:
            raise unavailable(str(err)) from err
        except EtcdError as err:
            log.error("etcd refused a transaction: %s", err)
            raise unavailable(f"etcd refused it ({err}); tell the administrator") from err


def _full(host: str) -> HostLoad:
    """A host that is away for a moment: what stands there stays, nothing new goes there."""
    return HostLoad(HostRecord(name=host, address="", pid=0, max_replicas=0))
