"""Folding kernels' logs in the background, so that they and etcd stay short. The daemon that appended does it.

Guarantees: the folded log says what the log said (`statelog`, `tables`); a table is in the store before a record names
it, and a daemon that dies between the two leaves nothing but blobs that nobody names.
"""

from __future__ import annotations

import asyncio

from gpu_daemon.blobs import BlobError
from gpu_daemon.shelf import contents_of, opened
from gpu_daemon.site import Refused, Site, log
from nbos_cluster import statelog, tables
from nbos_cluster.etcd import EtcdError, EtcdUnavailable
from nbos_cluster.kernelview import KernelView
from nbos_cluster.records import Checkpoint


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
        owner, old_rev, upto_rev = view.spec.owner, view.checkpoint_rev, view.log_revs[upto]
        try:
            folded, blobs = await self._folded(view, owner, upto)
            state = statelog.shorten(folded)
            if state is None:
                log.error(
                    "the folded log of kernel %s has %d bytes besides its variables, limit %d: not folded",
                    kernel, statelog.size_of(folded), statelog.CHECKPOINT_LIMIT,
                )  # fmt: skip
                return
            for digest, data in blobs.items():
                await store_blob(self._site, owner, digest, data)
            txn = statelog.fold_txn(kernel, old_rev, state, upto, upto_rev=upto_rev)
            # The other blobs it names have been named all the time by what it replaces.
            await self._site.blobs.commit(self._site.commit, owner, blobs.keys(), txn)
        except (EtcdUnavailable, EtcdError, Refused, BlobError) as err:
            log.warning("the log of kernel %s could not be folded yet: %s", kernel, err)

    async def _folded(self, view: KernelView, owner: str, upto: int) -> tuple[Checkpoint, dict[str, bytes]]:
        """The checkpoint up to `upto`, and the blobs of a new table in it, if there is one. Raises BlobError."""
        desk, before = self._site.blobs, view.checkpoint
        entries = view.entries(before.upto + 1 if before is not None else min(view.log), upto)
        state = statelog.fold(before, [await opened(desk, owner, entry) for entry in entries])
        size = statelog.push_at(state)
        if not size:
            return state, {}
        count = tables.to_merge([table.size for table in state.tables], size)
        newest = state.tables[len(state.tables) - count :]
        contents = [await contents_of(desk, owner, table) for table in newest]
        return await asyncio.to_thread(tables.push, state, contents)


async def store_blob(site: Site, owner: str, digest: str, data: bytes) -> None:
    """Put what was spilled out of a record. Raises Refused with the store's reason."""
    try:
        await site.blobs.put(owner, digest, data)
    except BlobError as err:
        raise Refused(err.code, str(err)) from err
