"""One lease kept alive for as long as its owner lives, whatever etcd does meanwhile.

Guarantees: the lease is prolonged three times per ttl; it is never given up because etcd is away (etcd gives
every lease its whole time again when it is back); only when etcd says that it has ended is a new one granted,
and `on_new` is told, again and again until it succeeds, so that the owner puts its records back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import EtcdError, EtcdUnavailable, LeaseGone

if TYPE_CHECKING:
    from .etcd import Etcd

log = logging.getLogger(__name__)

OnNew = Callable[[int], Awaitable[None]]


class Lease:
    """`id` is the lease to put records under (0 before `start`).

    ttl: seconds. lease_id: a lease of an earlier life of this process, taken over while it is alive. on_new:
    awaited with the id at the first grant and each time the lease had to be granted again; not when
    `lease_id` was resumed.
    """

    def __init__(self, etcd: Etcd, ttl: float = 5.0, lease_id: int = 0, on_new: OnNew | None = None) -> None:
        self.id = lease_id
        self.ttl = ttl
        self._etcd = etcd
        self._on_new = on_new
        self._told = lease_id != 0
        self.still_at = -math.inf
        """When etcd last answered so late (by the monotonic clock) that leases may have ended whose owners live."""
        self._valid_until = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def sure(self) -> bool:
        """Whether the lease cannot have ended yet, by this machine's clock."""
        return time.monotonic() < self._valid_until

    @property
    def sure_id(self) -> int:
        """The lease's id while it cannot have ended; 0 otherwise."""
        return self.id if self.sure else 0

    async def start(self) -> None:
        """Resume or grant the lease, tell `on_new`, and keep it alive. Raises EtcdUnavailable when etcd is
        away."""
        await self._turn()
        self._task = asyncio.create_task(self._keep(), name=f"lease {self.id:x}")

    async def stop(self, revoke: bool = True) -> None:
        """Stop keeping it alive. With `revoke`, everything under it goes at once; otherwise it ends by
        itself, or lives on in a process that resumes it."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if revoke and self.id:
            with suppress(EtcdUnavailable):
                await self._etcd.lease_revoke(self.id)

    async def _keep(self) -> None:
        well = True
        while True:
            await asyncio.sleep(self.ttl / 3)
            try:
                await self._turn()
            except (EtcdUnavailable, EtcdError) as err:
                # Once per outage; it may last for hours.
                log.log(logging.WARNING if well else logging.DEBUG, "lease %x: %s", self.id, err)
                well = False
            else:
                if not well:
                    log.warning("lease %x is kept alive again", self.id)
                well = True

    async def _turn(self) -> None:
        asked = time.monotonic()
        if self.id and not await self._refresh():
            log.warning("lease %x has ended, granting another", self.id)
            self.id = 0
        if not self.id:
            self.id = await self._etcd.lease_grant(self.ttl)
            self._told = False
        if time.monotonic() > asked + self.ttl / 3:
            self.still_at = time.monotonic()
        self._valid_until = asked + self.ttl
        if not self._told:
            if self._on_new is not None:
                await self._on_new(self.id)
            self._told = True

    async def _refresh(self) -> bool:
        try:
            await self._etcd.lease_refresh(self.id)
        except LeaseGone:
            return False
        return True
