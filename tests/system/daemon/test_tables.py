"""Entries and checkpoints too large for etcd, with real daemons: killed at the wrong moment, folded, collected."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from gpu_daemon.blobs import folder_of
from gpu_daemon.directory_store import DirectoryStore
from nbos_cluster import bulk, keys, membership, records, tables
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import Checkpoint, Collection, Table
from nbos_cluster.statelog import size_of
from nbos_cluster.tables import Contents
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import create, kernel_spec, view_of
from tests.system.etcdserver import EtcdServer, eventually

COUNT, BYTES = 5000, 200
NAMES = {f"variable_{i}" for i in range(COUNT)}


def large_entry(n: int) -> tuple[dict[str, Any], bytes]:
    """COUNT variables, each its own component: over a megabyte."""
    components = [
        {"names": [name], "digest": f"{n}", "frames": [{"size": BYTES, "at": BYTES * i}]}
        for i, name in enumerate(sorted(NAMES))
    ]
    entry = {"n": n, "kind": "cell", "execution_count": n, "components": components, "deleted": []}
    return bulk.pack(entry, bytes(COUNT * BYTES))


async def collected(client: Etcd) -> int:
    """How often the collection has ended."""
    found, _ = await client.range(keys.gc_fence(folder_of("ann")))
    return found[0].mod_revision if found and records.decode(found[0].value, Collection).at else 0


async def test_a_daemon_killed_between_a_table_and_its_record_loses_nothing_and_the_rest_is_collected(
    etcd: EtcdServer, client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    config = {"blob_grace": 1.0, "collect_every": 0.3}
    a = host("a", **config)
    b = host("b", **config)
    await create(client, kernel_spec("k", "a", "b"))
    replica, standby = a.replica("k", 0), b.replica("k", 1)
    await replica.ready()
    await standby.ready()
    store = DirectoryStore(tmp_path / "blobs")

    def contents_of(table: Table) -> Contents:
        return tables.decode(table, b"".join(store.get("ann", digest) for digest in table.blobs))

    def blobs() -> list[Any]:
        return list(store.contents(folder_of("ann"))) if folder_of("ann") in store.folders() else []

    token = (await replica.bid(1))["token"]
    entry, payload = large_entry(1)
    etcd.stop()
    append = asyncio.create_task(replica.send("append", payload, entry=entry, token=token, seconds=90))

    async def stored() -> bool:
        return [item.condemned for item in blobs() if item.address] == [False]

    await eventually(stored, "the table is in the store, and no record names it", 30)
    a.kill()
    etcd.start()
    a.start()
    assert (await append)["ok"]
    await standby.ready(1)
    view = await view_of(client, "k")
    assert size_of(view.log[1]) < 1000
    (pushed,) = [message for message in await standby.pushed("entry") if message["n"] == 1]
    assert (pushed["components"], pushed["tables"][0]["names"]) == ([], COUNT)

    before = await collected(client)

    async def again() -> bool:
        return await collected(client) > before

    for _ in range(3):
        await eventually(again, "another collection", 30)
        before = await collected(client)
    table = view.log[1].table
    assert table is not None
    assert {name for c in contents_of(table).components for name in c.names} == NAMES

    await replica.order(cells=[2, 70], seconds=60)
    await standby.ready(70)
    await standby.send("applied", n=70, lost={})

    async def folded() -> bool:
        last = (await view_of(client, "k")).last
        await replica.order(cells=[last + 1, last + 1])
        state = (await view_of(client, "k")).checkpoint
        return state is not None and state.upto > 1

    await eventually(folded, "the log is folded", 30)
    state = (await view_of(client, "k")).checkpoint
    assert isinstance(state, Checkpoint)
    assert len(state.tables) == 1
    assert size_of(state) < 64 * 1024
    whole = tables.whole(state, [contents_of(each) for each in state.tables])
    assert {name for c in whole.components for name in c.names} == {*NAMES, "x"}
    await client.commit(membership.delete("k"))

    async def empty() -> bool:
        return not blobs()

    await eventually(empty, "a deleted kernel's tables go", 30)
