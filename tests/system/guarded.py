"""An etcd with access control on, and clients that are who their certificate says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from nbos_cluster import access, certs, etcdauth, keys, membership, records
from nbos_cluster.etcd import Etcd, TLSFiles
from nbos_cluster.records import HostRecord

from .daemon.site import kernel_spec
from .etcdserver import EtcdServer

SPEC = kernel_spec("k", "a", "b")


@dataclass
class Guarded:
    """An etcd with access control on."""

    server: EtcdServer

    def files(self, common: str) -> TLSFiles:
        place = self.server.directory / "tls"
        return TLSFiles(place / "ca.pem", *certs.issue(place, f"client-{common}", common=common))

    def client(self, common: str) -> Etcd:
        return Etcd([self.server.endpoint], self.files(common))

    async def set_up(self) -> None:
        async with self.client(access.ROOT) as root:
            await etcdauth.check_safe(root, self.files(access.ROOT))
            await etcdauth.setup(root, ["a", "b"])
            await root.commit(membership.create(SPEC))

    @asynccontextmanager
    async def daemon(self, host: str) -> AsyncIterator[tuple[Etcd, int]]:
        """A daemon's connection with its lease, under which its host record stands."""
        async with self.client(access.daemon_user(host)) as etcd:
            lease = await etcd.lease_grant(60)
            await etcd.put(keys.host(host), records.encode(HostRecord(name=host, address=host, pid=1)), lease)
            yield etcd, lease


async def first(etcd: Etcd, prefix: str) -> Any:
    """The first thing that a watch tells, and one change that it would have told."""
    found = etcd.watch(prefix)
    try:
        return await anext(found)
    finally:
        await found.aclose()  # type: ignore[attr-defined]
