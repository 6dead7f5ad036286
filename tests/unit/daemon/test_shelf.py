"""Tables in a real store: read once by the collection, never taken for another; records that name very many blobs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gpu_daemon.blobdesk import AT_ONCE, BlobDesk
from gpu_daemon.blobs import BlobCorrupt, BlobMissing, folder_of
from gpu_daemon.directory_store import DirectoryStore
from gpu_daemon.shelf import Shelf, contents_of, opened
from gpu_daemon.site import Refused
from nbos_cluster import tables, wire
from nbos_cluster.content import address
from nbos_cluster.kv import Txn, op_put
from nbos_cluster.records import Component, Frame, LogEntry, Table
from nbos_cluster.tables import Contents
from tests.unit.cluster.fakestore import FakeEtcd

FOLDER = folder_of("ann")
COMPONENT = Component(names=("a", "b"), digest="d", frames=(Frame(size=1, data=b"x"), Frame(size=1, blobs=("f" * 64,))))


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "blobs")


async def put(desk: BlobDesk, contents: Contents) -> Table:
    table, blobs = tables.encode(contents)
    for digest, data in blobs.items():
        await desk.put("ann", digest, data)
    return table


async def test_an_entry_is_what_it_was_before_its_table_was_written(store: DirectoryStore) -> None:
    desk = BlobDesk(store)
    entry = LogEntry(n=1, kind="cell", components=(COMPONENT,), deleted=("gone",))
    record, blobs = tables.put_outside(entry, ())
    for digest, data in blobs.items():
        await desk.put("ann", digest, data)
    assert await opened(desk, "ann", record) == entry


async def test_a_table_is_read_once_and_forgotten_when_nobody_names_it(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = BlobDesk(store)
    one, two = [await put(desk, Contents((COMPONENT,), (name,))) for name in ("x", "y")]
    reads: list[str] = []
    plain = store.get
    monkeypatch.setattr(store, "get", lambda owner, digest: reads.append(digest) or plain(owner, digest))
    shelf = Shelf(desk)
    found = await shelf.namings(FOLDER, {one: "ann"})
    assert found[one].large == ((("a", "b"), ("f" * 64,)),)
    assert found[one].covers == {"a", "b", "x"}
    assert set(await shelf.namings(FOLDER, {one: "ann", two: "ann"})) == {one, two}
    assert reads == [*one.blobs, *two.blobs]
    await shelf.namings(FOLDER, {two: "ann"})
    await shelf.namings(FOLDER, {one: "ann"})
    assert reads == [*one.blobs, *two.blobs, *one.blobs]
    shelf.keep([])
    await shelf.namings(FOLDER, {one: "ann"})
    assert len(reads) == 4


async def test_a_table_that_cannot_be_read_ends_the_collection(store: DirectoryStore) -> None:
    desk = BlobDesk(store)
    table = await put(desk, Contents((COMPONENT,)))
    (file,) = store.root.rglob(table.blobs[0])
    file.write_bytes(b"?" + file.read_bytes()[1:])
    with pytest.raises(BlobCorrupt):
        await Shelf(desk).namings(FOLDER, {table: "ann"})
    with pytest.raises(BlobMissing):
        await contents_of(desk, "ann", table)


async def test_a_blob_that_is_no_table_is_not_taken_for_one(store: DirectoryStore) -> None:
    desk, data = BlobDesk(store), b"\0" * 100
    await desk.put("ann", address(data), data)
    with pytest.raises(BlobCorrupt, match="cannot be read"):
        await contents_of(desk, "ann", Table(blobs=(address(data),), size=100, names=1))


async def test_a_record_that_names_very_many_blobs_is_told_of_some_missing_ones_at_a_time(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # thousands of them take a while
    desk, etcd = BlobDesk(store), FakeEtcd()
    blobs = {address(b"%d" % i): b"%d" % i for i in range(AT_ONCE + 10)}
    txn = Txn([], [op_put("/k", b"v")])

    async def send(some: Txn) -> Any:
        return etcd.commit(some)

    asked = 0
    for _ in range(4):
        try:
            await desk.commit(send, "ann", blobs.keys(), txn)
            break
        except Refused as refused:
            asked += 1
            missing = refused.fields["missing"]
            assert 0 < len(missing) <= AT_ONCE
            assert len(wire.pack({"type": "x", "missing": missing})[0]) < wire.MAX_HEADER
            assert "/k" not in etcd.data
            await asyncio.to_thread(lambda names=missing: [store.put("ann", name, blobs[name]) for name in names])
    assert asked == 2
    assert etcd.data["/k"].value == b"v"
