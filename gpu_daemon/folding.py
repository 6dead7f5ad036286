"""Folding kernels' logs in the background, so that they and etcd stay short. The daemon that appended does it."""

from __future__ import annotations

import asyncio

from gpu_daemon.site import Site, log
from nbos_cluster import statelog
from nbos_cluster.etcd import EtcdError, EtcdUnavailable
from nbos_cluster.records import Checkpoint
from nbos_cluster.wire import ENTRY_LIMIT


class Folding:
    """At most one fold of a kernel at a time; one that fails is tried again after a later entry."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._busy: set[str] = set()

    def consider(self, kernel: str) -> None:
        """Called after each append."""
        if kernel not in self._busy and self._plan(kernel) is not None:
            self._busy.add(kernel)
            task = self._site.spawn(self._fold(kernel), f"folding the log of kernel {kernel}")
            task.add_done_callback(lambda _: self._busy.discard(kernel))

    def _plan(self, kernel: str) -> int | None:
        view = self._site.view(kernel)
        if view is None or view.spec is None:
            return None
        applied = [record.applied for record in view.replicas.values()]
        return statelog.plan_fold(view.log_sizes, view.last, applied)

    async def _fold(self, kernel: str) -> None:
        view, upto = self._site.view(kernel), self._plan(kernel)
        if view is None or view.spec is None or upto is None:
            return
        first = view.checkpoint.upto + 1 if view.checkpoint is not None else min(view.log)
        state = statelog.fold(view.checkpoint, view.entries(first, upto))
        owner, old_rev, upto_rev = view.spec.owner, view.checkpoint_rev, view.log_revs[upto]
        spill = statelog.spill(state)
        if not spill.fits or not isinstance(spill.record, Checkpoint):
            size = statelog.size_of(spill.record)
            log.error("the folded log of kernel %s has %d bytes, limit %d: not folded", kernel, size, ENTRY_LIMIT)
            return
        for digest, data in spill.blobs.items():
            await asyncio.to_thread(self._site.blobs.put, owner, digest, data)
        try:
            await self._site.commit(statelog.fold_txn(kernel, old_rev, spill.record, upto, upto_rev=upto_rev))
        except (EtcdUnavailable, EtcdError) as err:
            log.warning("the log of kernel %s could not be folded yet: %s", kernel, err)
