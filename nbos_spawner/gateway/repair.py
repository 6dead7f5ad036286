"""Replaces the replicas of lost hosts: a loop around a decision without IO.

It must guarantee: a host counts as lost only after a grace period (a daemon that restarts is back sooner); a
few kernels move at a time, so that the loss of a host does not become a storm on the others; two gateways
that do the same do no harm, as the second one's transaction fails.
"""

from __future__ import annotations

import asyncio
import logging
import time

from .copy import ClusterCopy
from .errors import ApiError
from .kernels import Kernels
from .watching import ClusterWatch

log = logging.getLogger("nbos.gateway")

AT_A_TIME = 4
"""Kernels that are placed anew in one round."""

PAUSE = 1.0
"""Seconds between two rounds."""


def lost_hosts(copy: ClusterCopy, now: float, grace: float) -> set[str]:
    """Hosts that have been away for `grace` seconds at `now`."""
    return {name for name, since in copy.absent.items() if now - since >= grace}


def kernels_to_move(copy: ClusterCopy, lost: set[str]) -> list[str]:
    """Kernels with a replica on a lost or draining host, those that lost most first."""
    leaving = {name for name, host in copy.hosts.items() if host.draining}
    hurt = []
    for view in copy.living():
        if view.spec is None:
            continue
        hosts = list(view.spec.placement.values())
        gone, going = sum(h in lost for h in hosts), sum(h in leaving for h in hosts)
        if gone or going or len(hosts) < view.spec.replicas:
            hurt.append((-gone, -going, view.kernel))
    return [kernel for _, _, kernel in sorted(hurt)]


class Repair:
    """Runs until it is cancelled."""

    def __init__(self, kernels: Kernels, watch: ClusterWatch, grace: float) -> None:
        self.kernels = kernels
        self.watch = watch
        self.grace = grace

    async def run(self) -> None:
        await self.watch.ready.wait()
        while True:
            await asyncio.sleep(PAUSE)
            try:
                await self.round(time.monotonic())
            except ApiError as err:  # etcd is away; the next round tries again
                log.warning("replicas cannot be placed anew: %s", err.message)

    async def round(self, now: float) -> None:
        """Move what has to move, at most AT_A_TIME kernels."""
        self.kernels.copy.forget_absent()
        lost = lost_hosts(self.kernels.copy, now, self.grace)
        moved = 0
        for kernel in kernels_to_move(self.kernels.copy, lost):
            done = await self.kernels.move_from(kernel, lost)
            if done:
                log.info("%s", done)
                moved += 1
            if moved == AT_A_TIME:
                return
