"""Folding kernels' logs in the background, so that they and etcd stay short. The daemon that appended does it."""

from __future__ import annotations

from gpu_daemon.blobs import BlobError
from gpu_daemon.site import Refused, Site, log
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
        txn = statelog.fold_txn(kernel, old_rev, spill.record, upto, upto_rev=upto_rev)
        try:
            for digest, data in spill.blobs.items():
                await store_blob(self._site, owner, digest, data)
            # The other blobs it names have been named all the time by what it replaces.
            await self._site.blobs.commit(self._site.commit, owner, spill.blobs.keys(), txn)
        except (EtcdUnavailable, EtcdError, Refused) as err:
            log.warning("the log of kernel %s could not be folded yet: %s", kernel, err)


async def store_blob(site: Site, owner: str, digest: str, data: bytes) -> None:
    """Put what was spilled out of a record. Raises Refused with the store's reason."""
    try:
        await site.blobs.put(owner, digest, data)
    except BlobError as err:
        raise Refused(err.code, str(err)) from err
