"""A daemon that was cut off and is behind what happened meanwhile: its records must not harm those of others."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from gpu_daemon.publishing import Publisher, placed_here
from nbos_cluster import keys, membership, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.kernelview import KernelView
from nbos_cluster.records import HostRecord, ReplicaRecord
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import create, kernel_spec, view_of
from tests.system.etcdserver import eventually

RECORD = keys.replica("k", 0)


class Cut:
    """A publisher on host `a` with a copy of the records that is only as new as the test makes it."""

    def __init__(self, etcd: Etcd, lease: int, view: KernelView) -> None:
        self.views = {"k": view}
        self.site: Any = SimpleNamespace(host="a", lease_id=lease, commit=etcd.commit, view=self.views.get)
        self.publisher = Publisher(self.site)
        self.task = asyncio.create_task(self.publisher.run())

    def put(self, state: str) -> None:
        record = ReplicaRecord(index=0, host="a", state=state)  # type: ignore[arg-type]
        self.publisher.put(RECORD, record, guard=placed_here(self.site, "k", 0))

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def record(client: Etcd) -> tuple[str, str] | None:
    found = await client.get(RECORD)
    if found is None:
        return None
    read = records.decode(found.value, ReplicaRecord)
    return read.host, read.state


async def moved_to_b(client: Etcd) -> None:
    """The gateway places the replica on `b`, whose daemon writes its record."""
    assert (await client.commit(membership.replan(await view_of(client, "k"), {"0": "b"}))).succeeded
    lease = await client.lease_grant(60)
    await client.put(RECORD, records.encode(ReplicaRecord(index=0, host="b", state="ready")), lease)


async def test_a_stale_daemon_neither_rewrites_nor_deletes_the_record_of_a_replica_that_moved(client: Etcd) -> None:
    await create(client, kernel_spec("k", "a"))
    cut = Cut(client, await client.lease_grant(60), await view_of(client, "k"))

    async def written(state: str) -> bool:
        return await record(client) == ("a", state)

    cut.put("starting")
    await eventually(lambda: written("starting"), "the record is written while the kernel is placed here")
    await moved_to_b(client)
    cut.site.lease_id = await client.lease_grant(60)
    asked = 0

    async def commit(txn: Any) -> Any:
        nonlocal asked
        result = await client.commit(txn)
        asked += 1
        return result

    cut.site.commit = commit
    cut.publisher.write_all_again()
    await eventually(lambda: asked > 0, "the stale daemon tries to write")
    assert await record(client) == ("b", "ready")
    cut.views["k"] = await view_of(client, "k")
    before = asked
    cut.publisher.remove(RECORD)
    await eventually(lambda: asked > before, "the daemon knows now, and tries to delete")
    assert await record(client) == ("b", "ready")
    await cut.end()


async def test_a_record_that_was_refused_is_written_once_the_copy_has_caught_up(client: Etcd) -> None:
    await create(client, kernel_spec("k", "b"))
    old = await view_of(client, "k")
    old.spec = replace(old.spec, placement={"0": "a"}) if old.spec is not None else None
    cut = Cut(client, await client.lease_grant(60), old)
    assert (await client.commit(membership.replan(await view_of(client, "k"), {"0": "a"}))).succeeded
    cut.put("ready")
    cut.views["k"] = await view_of(client, "k")

    async def written() -> bool:
        return await record(client) == ("a", "ready")

    await eventually(written, "the record is written", 5)
    await cut.end()


@pytest.mark.timeout(90)
async def test_a_daemon_stopped_past_its_lease_leaves_the_record_of_the_host_that_took_over(
    client: Etcd, host: MakeHost
) -> None:
    a, b = host("a"), host("b")
    await create(client, kernel_spec("k", "a"))
    await a.replica("k", 0).ready()
    assert a.process is not None
    a.process.send_signal(signal.SIGSTOP)

    async def lost() -> bool:
        return (await view_of(client, "k")).replicas == {}

    await eventually(lost, "the record ends with the lease", 15)
    assert (await client.commit(membership.replan(await view_of(client, "k"), {"0": "b"}))).succeeded
    await b.replica("k", 0).ready()

    async def there() -> bool:
        return await record(client) == ("b", "ready")

    await eventually(there, "b's record stands")
    a.process.send_signal(signal.SIGCONT)
    await eventually(lambda: not a.folder("k", 0).exists(), "a has ended its replica", 15)
    assert await there()


async def test_draining_set_while_the_daemon_writes_its_host_is_kept(client: Etcd, host: MakeHost) -> None:
    a = host("a")

    async def there() -> bool:
        return await client.get(keys.host("a")) is not None

    await eventually(there, "the host's record")
    assert a.process is not None
    a.process.send_signal(signal.SIGSTOP)

    async def gone() -> bool:
        return await client.get(keys.host("a")) is None

    await eventually(gone, "the lease ends", 15)
    known = HostRecord(name="a", address="127.0.0.1", pid=1, draining=True)
    await client.put(keys.host("a"), records.encode(known), await client.lease_grant(60))
    a.process.send_signal(signal.SIGCONT)

    async def mine_and_draining() -> bool:
        found = await client.get(keys.host("a"))
        record = records.decode(found.value, HostRecord) if found is not None else known
        return record.pid != 1 and record.draining

    await eventually(mine_and_draining, "the daemon writes its record and keeps `draining`", 10)
