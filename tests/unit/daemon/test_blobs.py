"""The blob store on a directory: content is checked both ways, owners are apart, errors are told apart."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import psutil
import pytest

from gpu_daemon import blobs
from gpu_daemon.blobs import BlobCorrupt, BlobError, BlobMissing, BlobRefused, BlobStoreFull, open_store
from gpu_daemon.directory_store import DirectoryStore
from gpu_daemon.drafts import FileDraft
from gpu_daemon.memory import STEP, HostMemory
from nbos_cluster.content import address

DATA = b"value" * 100
HASH = address(DATA)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "blobs")


def the_file(store: DirectoryStore) -> Path:
    return next(store.root.rglob(HASH))


def test_what_was_put_is_got(store: DirectoryStore) -> None:
    store.put("ann", HASH, DATA)
    store.put("ann", HASH, DATA)
    assert store.get("ann", HASH) == DATA


def test_the_address_of_what_is_put_without_one_is_that_of_what_was_written(store: DirectoryStore) -> None:
    digest, draft = store.write_unnamed("ann", memoryview(DATA))
    assert (digest, store.have("ann", [HASH])) == (HASH, set())
    store.settle("ann", [(digest, draft)])
    assert store.get("ann", HASH) == DATA
    before = the_file(store).stat()
    assert store.write_unnamed("ann", DATA) == (HASH, None)
    assert the_file(store).stat().st_ino == before.st_ino
    assert [path.name for path in store.root.rglob("*") if path.is_file()] == [HASH]
    with pytest.raises(BlobMissing):
        store.get("bob", HASH)


def test_what_is_damaged_is_healed_by_what_is_put_without_an_address(store: DirectoryStore) -> None:
    store.put("ann", HASH, DATA)
    the_file(store).write_bytes(DATA[:-1] + b"?")
    store.settle("ann", [store.write_unnamed("ann", DATA)])
    assert store.get("ann", HASH) == DATA


def test_too_much_is_refused_with_or_without_an_address(store: DirectoryStore) -> None:
    large = bytes(blobs.BLOB_CHUNK + 1)
    for write in (lambda: store.write("ann", address(large), large), lambda: store.write_unnamed("ann", large)):
        with pytest.raises(BlobRefused, match="cut it into several"):
            write()


@pytest.mark.parametrize("owner", ["bob", "../ann", "ann/", "", "Ann"])
def test_another_owner_cannot_read_it(store: DirectoryStore, owner: str) -> None:
    store.put("ann", HASH, DATA)
    with pytest.raises(BlobMissing):
        store.get(owner, HASH)


def test_bytes_with_another_hash_are_refused(store: DirectoryStore) -> None:
    with pytest.raises(BlobRefused):
        store.put("ann", HASH, b"other")


@pytest.mark.parametrize("name", ["", "x", "../" * 20, HASH.upper(), HASH + "\n", HASH[:-1]])
def test_a_name_that_is_no_hash_is_refused(store: DirectoryStore, name: str) -> None:
    with pytest.raises(BlobRefused):
        store.get("ann", name)


def test_a_damaged_blob_is_corrupt_and_can_be_stored_again(store: DirectoryStore) -> None:
    store.put("ann", HASH, DATA)
    the_file(store).write_bytes(DATA[:-1] + b"?")
    with pytest.raises(BlobCorrupt):
        store.get("ann", HASH)
    store.put("ann", HASH, DATA)
    assert store.get("ann", HASH) == DATA


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_leaves_nothing_behind(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A quota (EDQUOT) is played: the file systems with quotas that tests may make are not everywhere."""

    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BlobStoreFull):
        store.put("ann", HASH, DATA)
    assert [p for p in store.root.rglob("*") if p.is_file()] == []


def test_a_blob_over_the_limit_is_refused(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "BLOB_CHUNK", 10)
    with pytest.raises(BlobRefused, match="cut it"):
        store.put("ann", HASH, DATA)


def test_the_room_left_is_that_of_its_file_system(store: DirectoryStore, tmp_path: Path) -> None:
    free, total = store.free(), shutil.disk_usage(tmp_path).total
    assert free is not None
    assert 0 < free <= total
    shutil.rmtree(store.root)
    with pytest.raises(BlobError, match="the room left could not be looked up"):
        store.free()


def test_a_hosts_memory_is_told_roughly_and_looked_up_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory()
    first = memory.available()
    assert first % STEP == 0
    assert 0 < first <= psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: pytest.fail("it was looked up again"))
    assert memory.available() == first


def test_stores_are_named_by_url(tmp_path: Path) -> None:
    assert isinstance(open_store(f"file://{tmp_path}/b"), DirectoryStore)
    with pytest.raises(ValueError, match="not known"):
        open_store("gopher://bucket")


def test_a_draft_is_no_blob_until_it_is_settled(store: DirectoryStore) -> None:
    draft = store.write("ann", HASH, DATA)
    assert store.have("ann", [HASH]) == set()
    assert store.settle("ann", [(HASH, draft)]) == {}
    assert store.get("ann", HASH) == DATA
    assert store.write("ann", HASH, DATA) is None


def test_a_draft_that_is_forgotten_leaves_no_file(store: DirectoryStore) -> None:
    draft = store.write("ann", HASH, DATA)
    del draft
    with pytest.raises(BlobRefused):
        store.write("ann", HASH, b"other")
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_what_cannot_be_made_safe_is_told_apart_from_what_is(store: DirectoryStore) -> None:
    other = address(b"other")
    drafts = [(HASH, store.write("ann", HASH, DATA)), (other, store.write("ann", other, b"other"))]
    assert isinstance(drafts[0][1], FileDraft)
    os.close(drafts[0][1].handle)  # what the disk does to it: the sync fails
    drafts[0][1].handle = os.open("/dev/full", os.O_WRONLY)
    failed = store.settle("ann", drafts)
    assert list(failed) == [HASH]
    assert store.have("ann", [HASH, other]) == {other}
