"""`nbos drain` against a real etcd: what it changes, what it leaves, what it says."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from nbos.draincommand import DrainFailed, replicas_on, set_draining
from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import HostRecord, ReplicaRecord
from tests.system.daemon.site import kernel_spec
from tests.system.etcdserver import EtcdServer


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Etcd]:
    async with Etcd([etcd.endpoint]) as opened:
        yield opened


async def test_a_drained_host_keeps_its_lease_and_all_else(client: Etcd) -> None:
    lease = await client.lease_grant(60)
    record = HostRecord(name="a", address="10.0.0.1", pid=7, since=3.0)
    await client.put(keys.host("a"), records.encode(record), lease)
    await set_draining(client, "a", True)
    found = await client.get(keys.host("a"))
    assert found is not None
    assert found.lease == lease
    drained = records.decode(found.value, HostRecord)
    assert (drained.draining, drained.pid, drained.since) == (True, 7, 3.0)
    await set_draining(client, "a", False)
    back = await client.get(keys.host("a"))
    assert back is not None
    assert records.decode(back.value, HostRecord) == record


async def test_a_host_that_is_not_there_is_named_with_those_that_are(client: Etcd) -> None:
    await client.put(keys.host("a"), records.encode(HostRecord(name="a", address="", pid=1)))
    with pytest.raises(DrainFailed, match=r"no host 'b' is there; there are: a$"):
        await set_draining(client, "b", True)


async def test_replicas_count_where_they_are_placed_and_where_they_still_run(client: Etcd) -> None:
    await client.put(keys.spec("k"), records.encode(kernel_spec("k", "a", "b")))
    await client.put(keys.replica("k", 1), records.encode(ReplicaRecord(index=1, host="c", state="ready")))
    assert [await replicas_on(client, [host]) for host in "abcd"] == [1, 1, 1, 0]
    assert await replicas_on(client, ["a", "c"]) == 2
