"""The records that this daemon keeps in etcd under its lease: its host, its replicas, who waits in its queue.

Guarantees: what should stand there gets there, whatever etcd and the lease do meanwhile; changes that only tell
progress are written at most once a second. A daemon that was cut off harms nobody: a record is written only while its
guard holds in the same transaction (a replica's: the kernel still places it on this host), and deleted only while it
stands under this daemon's own lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from gpu_daemon.site import Site, log
from nbos_cluster import keys, records
from nbos_cluster.etcd import EtcdError, EtcdUnavailable, LeaseGone
from nbos_cluster.kv import Compare, Txn, lease_is, mod_is, op_delete, op_put
from nbos_cluster.records import Record

CALM = 1.0
"""Seconds between two writes that are not urgent."""
RETRY = 0.5

Guard = Callable[[], Sequence[Compare] | None]
"""What must hold for the record to be written now, by the local copy; None: by that, it is not ours to write."""


def placed_here(site: Site, kernel: str, index: int) -> Guard:
    """The guard of a replica's record. The local copy may be behind, so that etcd compares the spec's revision."""

    def guard() -> Sequence[Compare] | None:
        view = site.view(kernel)
        if view is None or view.spec is None or view.spec.placement.get(str(index)) != site.host:
            return None
        return [mod_is(keys.spec(kernel), view.spec_rev)]

    return guard


def _always() -> Sequence[Compare]:
    return ()


class Publisher:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._wanted: dict[str, tuple[bytes, Guard]] = {}
        self._dirty: dict[str, bool] = {}
        """Keys to be written, and whether that is urgent."""
        self._urgent = asyncio.Event()
        self._wake = asyncio.Event()
        self._said = ""

    def put(self, key: str, record: Record, urgent: bool = True, guard: Guard = _always) -> None:
        """`record` should stand under `key` while `guard` holds. Not urgent: within a second."""
        value = records.encode(record)
        known = self._wanted.get(key)
        self._wanted[key] = (value, guard)
        if known is None or known[0] != value or key in self._dirty:
            self._mark(key, urgent)

    def remove(self, key: str) -> None:
        if self._wanted.pop(key, None) is not None:
            self._mark(key, True)

    def write_all_again(self) -> None:
        """The lease is a new one: everything under the old one is gone."""
        self._dirty = dict.fromkeys(self._wanted, True)
        self._mark("", True)

    def _mark(self, key: str, urgent: bool) -> None:
        if key:
            self._dirty[key] = urgent or self._dirty.get(key, False)
        self._wake.set()
        if urgent:
            self._urgent.set()

    async def run(self) -> None:
        """For as long as the daemon lives. Sleeps while nothing changes."""
        while True:
            await self._wake.wait()
            try:
                await asyncio.wait_for(self._urgent.wait(), CALM)
            except TimeoutError:
                log.debug("writing what is not urgent")
            self._wake.clear()
            self._urgent.clear()
            try:
                refused = await self._flush()
            except (EtcdUnavailable, EtcdError) as err:
                known = isinstance(err, EtcdUnavailable | LeaseGone) or str(err) == self._said
                log.log(logging.DEBUG if known else logging.ERROR, "records cannot be written now: %s", err)
                self._said = str(err)
                await asyncio.sleep(RETRY)
                self._mark("", True)
            else:
                self._again(refused)

    def _again(self, refused: set[str]) -> None:
        """Records whose guard did not hold: the local copy is behind, what it lacks is on its way."""
        if refused:
            self._dirty |= dict.fromkeys(refused, True)
            asyncio.get_running_loop().call_later(RETRY, self._mark, "", True)

    async def _flush(self) -> set[str]:
        """The keys that were refused."""
        refused: set[str] = set()
        while self._dirty:
            # What is urgent first: a router waits for the record of a replica that is ready.
            key = max(self._dirty, key=self._dirty.__getitem__)
            del self._dirty[key]
            try:
                if not await self._write(key):
                    refused.add(key)
            except BaseException:
                self._dirty |= dict.fromkeys({*refused, key}, True)
                raise
        return refused

    async def _write(self, key: str) -> bool:
        """Whether what is wanted under `key` now stands there."""
        lease = self._site.lease_id
        if key not in self._wanted:
            await self._site.commit(Txn([lease_is(key, lease)], [op_delete(key)]))
            return True
        value, guard = self._wanted[key]
        compare = guard()
        if compare is None:
            return False
        return (await self._site.commit(Txn(compare, [op_put(key, value, lease)]))).succeeded
