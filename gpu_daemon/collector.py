"""Collecting blobs that nothing names any more, in the background. Every daemon does; the lock in etcd makes it one at
a time for each owner, and whoever finds a namespace due takes it.

Guarantees: nothing is collected in a store that belongs to another cluster, while a record or one of its tables cannot
be read (the others' are collected), or after
the lease that the lock is under may have ended. What goes wrong is logged and tried again; it never ends the daemon.
"""

from __future__ import annotations

import asyncio
import random
import uuid

from gpu_daemon import collecting
from gpu_daemon.blobdesk import BlobDesk
from gpu_daemon.blobs import BlobError, BlobStore
from gpu_daemon.collecting import Plan
from gpu_daemon.shelf import Shelf
from gpu_daemon.site import Site, log
from nbos_cluster import keys, records
from nbos_cluster.errors import EtcdError, EtcdUnavailable
from nbos_cluster.kv import missing, op_get, op_put
from nbos_cluster.records import Collection, RecordError


class LostLock(RuntimeError):
    """The lease that the lock is under may have ended: somebody else may collect now."""


class Collector:
    """grace: seconds that a blob stays though nothing names it. every: seconds between two collections."""

    def __init__(self, site: Site, grace: float, every: float) -> None:
        self._site, self._grace, self._every = site, grace, every
        self._desk: BlobDesk = site.blobs
        self._store: BlobStore = site.blobs.store
        self._shelf = Shelf(site.blobs)

    async def run(self) -> None:
        """For as long as the daemon lives."""
        if not self._every:
            return
        ours = None
        while True:
            # Not all daemons at once.
            await asyncio.sleep(self._every * random.uniform(0.5, 1.0))
            try:
                ours = ours if ours is not None else await self._is_ours()
                if ours:
                    await self.look_through()
            except (BlobError, EtcdUnavailable, EtcdError, RecordError, LostLock) as err:
                log.warning("blobs are not collected now: %s", err)

    async def look_through(self) -> None:
        """Collect in every namespace that is due."""
        await self._drop_own_locks()
        folders = await self._desk.call(self._store.folders)
        self._shelf.keep(folders)
        for folder in folders:
            await self.collect(folder)

    async def collect(self, folder: str, force: bool = False) -> Plan | None:
        """One namespace; None when it is not due, or somebody else is at it."""
        answers = (await self._site.commit(collecting.look(folder))).responses
        fence, last = collecting.read_fence(folder, answers), collecting.last_of(answers)
        now = await self._desk.call(self._store.now)
        if fence.locked or (last is not None and last.at > 0 and now - last.at < self._every / 2 and not force):
            return None
        begin = collecting.begin(folder, fence, self._site.host, self._site.lease_id, last)
        token = collecting.begun(await self._site.commit(begin))
        if token is None:
            return None
        done = last or Collection(host=self._site.host)
        try:
            plan = await self._sweep(folder, token, now)
            done = Collection(
                host=self._site.host,
                at=now,
                kept=plan.kept,
                kept_bytes=plan.kept_bytes,
                condemned=len(plan.condemn),
                removed=len(plan.remove),
            )
        finally:
            await self._site.commit(collecting.end(folder, token, done))
        if plan.condemn or plan.remove or plan.restore:
            log.info(
                "blobs of %s: %d kept, %d set aside, %d deleted, %d brought back",
                folder[:8], plan.kept, len(plan.condemn), len(plan.remove), len(plan.restore),
            )  # fmt: skip
        return plan

    async def _sweep(self, folder: str, token: int, now: float) -> Plan:
        # What is in the store first: what is put later is not looked at.
        stored = await self._desk.call(lambda: list(self._store.contents(folder)))
        kvs, _ = await self._site.etcd.range(keys.KERNELS)
        namings = await self._shelf.namings(folder, collecting.tables_of(kvs, folder))
        plan = collecting.plan(stored, collecting.named(kvs, folder, namings), now, self._grace)
        if not (await self._site.commit(collecting.still_ours(folder, token))).succeeded:
            raise LostLock(f"the lock of {folder[:8]} ended while its blobs were looked at")
        await self._desk.call(self._carry_out, folder, plan)
        return plan

    def _carry_out(self, folder: str, plan: Plan) -> None:
        """In a thread."""
        steps = (
            *((self._store.restore, item) for item in plan.restore),
            *((self._store.condemn, item) for item in plan.condemn),
            *((self._store.remove, item) for item in plan.remove),
        )
        for step, item in steps:
            lease = self._site.lease
            if lease is None or not lease.sure:
                raise LostLock("this host's lease may have ended")
            step(folder, item)

    async def _is_ours(self) -> bool:
        """Whether the store belongs to this cluster: two that share a folder by mistake must not collect each other."""
        etcd, key = self._site.etcd, keys.GC_STORE
        mine = uuid.uuid4().hex.encode()
        result = await etcd.txn([missing(key)], [op_put(key, mine)], [op_get(key)])
        cluster = (mine if result.succeeded else result.responses[0][0].value).decode()
        found = await self._desk.call(self._store.identity, cluster)
        if found != cluster:
            log.error(
                "%s belongs to another cluster (%s, this one is %s): nothing is collected in it. Give each cluster a "
                "store of its own; or, when etcd was made anew on purpose, delete the file 'cluster' in it",
                self._store.where, found[:40], cluster,
            )  # fmt: skip
        return found == cluster

    async def _drop_own_locks(self) -> None:
        """A lock of before a restart of this daemon: its lease was resumed, and the collection is not."""
        kvs, _ = await self._site.etcd.range(keys.GC)
        for kv in kvs:
            if kv.key.endswith("/lock") and records.decode(kv.value, Collection).host == self._site.host:
                folder = kv.key.split("/")[-2]
                answers = (await self._site.commit(collecting.look(folder))).responses
                last = collecting.last_of(answers) or Collection(host=self._site.host)
                await self._site.commit(collecting.end(folder, kv.mod_revision, last))
