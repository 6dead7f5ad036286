"""`nbos drain` against a real etcd: what it changes, what it leaves, what it says."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from nbos.draincommand import lines, look, replicas_on
from nbos.hostchange import DrainFailed, set_draining
from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import HostRecord, Move, ReplicaRecord
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
    found = await look(client)
    assert [replicas_on(found, [host]) for host in "abcd"] == [1, 1, 1, 0]
    assert replicas_on(found, ["a", "c"]) == 2


async def test_what_waits_is_told_with_the_reason(client: Etcd) -> None:
    for name in "ab":
        host = HostRecord(name=name, address="", pid=1, max_replicas=1, draining=name == "a")
        await client.put(keys.host(name), records.encode(host))
    await client.put(keys.spec("k"), records.encode(kernel_spec("k", "a", "b")))
    said = lines(await look(client), ["a"])
    assert said == ["  kernel k: waits: kernel k cannot be placed: b holds 1 of at most 1 replicas"]
    await client.put(keys.host("c"), records.encode(HostRecord(name="c", address="", pid=1)))
    assert lines(await look(client), ["a"]) == ["  kernel k: waits for its turn to go to host c"]
    move = Move(source=0, target=2, from_host="a", to_host="c")
    moving = replace(kernel_spec("k", "a", "b", "c"), move=move, replicas=2)
    await client.put(keys.spec("k"), records.encode(moving))
    assert lines(await look(client), ["a"]) == ["  kernel k: replica 2 starts on host c"]
