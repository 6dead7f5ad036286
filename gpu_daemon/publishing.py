"""The records that this daemon keeps in etcd under its lease: its host, its replicas, who waits in its queue.

Guarantees: what should stand there gets there, whatever etcd and the lease do meanwhile; changes that only tell
progress are written at most once a second; a record is deleted only if it is still the one this daemon wrote, since a
replica that moved has its record written by another host.
"""

from __future__ import annotations

import asyncio

from gpu_daemon.site import Site, log
from nbos_cluster import records
from nbos_cluster.etcd import EtcdError, EtcdUnavailable
from nbos_cluster.kv import Txn, op_delete, op_put, value_is
from nbos_cluster.records import Record

CALM = 1.0
"""Seconds between two writes that are not urgent."""
RETRY = 0.5


class Publisher:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._wanted: dict[str, bytes] = {}
        self._written: dict[str, bytes] = {}
        self._dirty: set[str] = set()
        self._urgent = asyncio.Event()
        self._wake = asyncio.Event()

    def put(self, key: str, record: Record, urgent: bool = True) -> None:
        """`record` should stand under `key`. Not urgent: within a second."""
        value = records.encode(record)
        if self._wanted.get(key) == value and key not in self._dirty:
            return
        self._wanted[key] = value
        self._mark(key, urgent)

    def remove(self, key: str) -> None:
        if self._wanted.pop(key, None) is not None:
            self._mark(key, True)

    def write_all_again(self) -> None:
        """The lease is a new one: everything under the old one is gone."""
        self._written.clear()
        self._dirty = set(self._wanted)
        self._mark("", True)

    def _mark(self, key: str, urgent: bool) -> None:
        if key:
            self._dirty.add(key)
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
                await self._flush()
            except (EtcdUnavailable, EtcdError) as err:
                log.debug("records cannot be written now: %s", err)
                await asyncio.sleep(RETRY)
                self._mark("", True)

    async def _flush(self) -> None:
        while self._dirty:
            key = next(iter(self._dirty))
            value = self._wanted.get(key)
            if value is not None:
                await self._site.commit(Txn([], [op_put(key, value, self._site.lease_id)]))
                self._written[key] = value
            elif key in self._written:
                await self._site.commit(Txn([value_is(key, self._written[key])], [op_delete(key)]))
                self._written.pop(key, None)
            if self._wanted.get(key) == value:
                self._dirty.discard(key)
