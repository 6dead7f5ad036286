"""Replaces the replicas of lost hosts: a loop around a decision without IO.

It must guarantee: a host counts as lost only after a grace period (a daemon that restarts is back sooner); a few
replicas are made at a time, the next ones when those are ready, so that the loss of a host does not become a storm on
the others; two gateways that do the same do no harm, as the second one's transaction fails.
"""

from __future__ import annotations

import asyncio
import logging
import time

from nbos_cluster.moving import ready

from .copy import ClusterCopy
from .errors import ApiError
from .kernels import Kernels
from .watching import ClusterWatch

log = logging.getLogger("nbos.gateway")

PAUSE = 0.5
"""Seconds between two rounds."""

STUCK = 120.0
"""Seconds after which a replica that is not ready yet no longer keeps others from being made."""


def lost_hosts(copy: ClusterCopy, now: float, grace: float) -> set[str]:
    """Hosts that have been away for `grace` seconds at `now`."""
    return {name for name, since in copy.absent.items() if now - since >= grace}


def kernels_to_repair(copy: ClusterCopy, lost: set[str]) -> list[str]:
    """Kernels with a replica on a lost host, or too few of them, those that lost most first."""
    hurt = []
    for view in copy.living():
        if view.spec is None:
            continue
        hosts = list(view.spec.placement.values())
        gone = sum(h in lost for h in hosts)
        if gone or len(hosts) < view.spec.replicas:
            hurt.append((-gone, view.kernel))
    return [kernel for _, kernel in sorted(hurt)]


def being_made(copy: ClusterCopy) -> set[tuple[str, str, str]]:
    """(kernel, index, host) of the replicas of used kernels that are placed on a living host and not ready there yet,
    but for those that move: they are counted by themselves."""
    found = set()
    for view in copy.living():
        spec = view.spec
        if spec is None or view.last < 1:
            continue
        for index, host in spec.placement.items():
            record = view.replicas.get(int(index))
            failed = record is not None and record.state == "failed" and record.host == host
            moves = spec.move is not None and spec.move.target == int(index)
            if host in copy.hosts and not failed and not moves and ready(view, int(index)) is None:
                found.add((view.kernel, index, host))
    return found


class Repair:
    """Runs until it is cancelled."""

    def __init__(self, kernels: Kernels, watch: ClusterWatch, grace: float, at_a_time: int) -> None:
        self.kernels = kernels
        self.watch = watch
        self.grace = grace
        self.at_a_time = at_a_time
        self._since: dict[tuple[str, str, str], float] = {}

    async def run(self) -> None:
        await self.watch.ready.wait()
        while True:
            await asyncio.sleep(PAUSE)
            try:
                await self.round(time.monotonic())
            except ApiError as err:  # etcd is away; the next round tries again
                log.warning("replicas cannot be placed anew: %s", err.message)

    async def round(self, now: float) -> None:
        """Place anew what has to be, so that at most `at_a_time` replicas are being made (one more where a kernel has
        lost several)."""
        self.kernels.copy.forget_absent()
        lost = lost_hosts(self.kernels.copy, now, self.grace)
        room = self.at_a_time - self._under_way(now)
        for kernel in kernels_to_repair(self.kernels.copy, lost):
            if room <= 0:
                return
            placed = await self.kernels.replace_lost(kernel, lost)
            if placed:
                log.info("kernel %s: %s", kernel, ", ".join(placed))
                room -= len(placed)

    def _under_way(self, now: float) -> int:
        made = being_made(self.kernels.copy)
        self._since = {replica: self._since.get(replica, now) for replica in made}
        return sum(now - since < STUCK for since in self._since.values())
