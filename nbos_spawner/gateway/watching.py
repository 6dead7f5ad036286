"""Keeps the gateway's copy up to date: three watches, and a way to wait until the copy shows something."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from nbos_cluster import keys
from nbos_cluster.etcd import Changes, Etcd, Snapshot

from .copy import ClusterCopy

log = logging.getLogger("nbos.gateway")


class ClusterWatch:
    """Feeds `copy`. `ready` is set once hosts, queues and kernels were read in full."""

    def __init__(self, etcd: Etcd, copy: ClusterCopy) -> None:
        self.etcd = etcd
        self.copy = copy
        self.ready = asyncio.Event()
        self._changed = asyncio.Condition()
        self.tasks: list[asyncio.Task[None]] = []
        self._pending = {keys.HOSTS, keys.QUEUES, keys.KERNELS}

    async def start(self) -> None:
        feeds: dict[str, Callable[[Snapshot | Changes], None]] = {
            keys.HOSTS: lambda item: self.copy.apply_hosts(item, time.monotonic()),
            keys.QUEUES: self.copy.apply_queues,
            keys.KERNELS: lambda item: self.copy.apply_kernels(item, time.monotonic()),
        }
        for prefix, feed in feeds.items():
            self.tasks.append(asyncio.create_task(self._follow(prefix, feed), name=f"watch {prefix}"))

    async def _follow(self, prefix: str, feed: Callable[[Snapshot | Changes], None]) -> None:
        async for item in self.etcd.watch(prefix):
            feed(item)
            self._pending.discard(prefix)
            if not self._pending:
                self.ready.set()
            async with self._changed:
                self._changed.notify_all()

    async def until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until `condition` holds for the copy; whether it did within `timeout` seconds."""

        async def wait() -> None:
            async with self._changed:
                await self._changed.wait_for(condition)

        try:
            await asyncio.wait_for(wait(), timeout)
        except TimeoutError:
            return condition()
        return True

    async def change(self, timeout: float) -> None:
        """Wait until anything changes, `timeout` seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait()
