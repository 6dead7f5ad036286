"""The blob store on a directory: content is checked both ways, owners are apart, errors are told apart."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gpu_daemon import blobs
from gpu_daemon.blobs import BlobCorrupt, BlobMissing, BlobRefused, BlobStoreFull, open_store
from gpu_daemon.directory_store import DirectoryStore
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


def test_a_full_disk_is_told_and_leaves_nothing_behind(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BlobStoreFull):
        store.put("ann", HASH, DATA)
    assert [p for p in store.root.rglob("*") if p.is_file()] == []


def test_a_blob_over_the_limit_is_refused(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "BLOB_CHUNK", 10)
    with pytest.raises(BlobRefused, match="cut it"):
        store.put("ann", HASH, DATA)


def test_stores_are_named_by_url(tmp_path: Path) -> None:
    assert isinstance(open_store(f"file://{tmp_path}/b"), DirectoryStore)
    with pytest.raises(ValueError, match="not known"):
        open_store("gopher://bucket")
