"""Blobs that come together are made safe together, and none waits for long for another one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from gpu_daemon import blobdesk
from gpu_daemon.blobdesk import BlobDesk
from gpu_daemon.blobs import BlobRefused, Draft
from gpu_daemon.directory_store import DirectoryStore
from nbos_cluster.content import address

BLOBS = [b"%d" % number * 100 for number in range(6)]
LAST = 30.0


class Watched(DirectoryStore):
    """`settled`: how many blobs each settling had. Writing the last of BLOBS waits for `go`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.settled: list[int] = []
        self.go = threading.Event()

    def write(self, owner: str, digest: str, data: bytes | memoryview) -> Any:
        if bytes(data) == BLOBS[-1]:
            assert self.go.wait(LAST)
        return super().write(owner, digest, data)

    def settle(self, owner: str, written: Iterable[tuple[str, Draft | None]]) -> Any:
        written = list(written)
        self.settled.append(len(written))
        return super().settle(owner, written)


def desk_of(folder: Path) -> tuple[BlobDesk, Watched]:
    store = Watched(folder / "blobs")
    return BlobDesk(store), store


def putting(desk: BlobDesk, blobs: Iterable[bytes], owner: str = "ann") -> list[asyncio.Task[None]]:
    return [asyncio.create_task(desk.put(owner, address(data), data)) for data in blobs]


async def test_blobs_that_are_written_at_the_same_time_are_settled_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobdesk, "GATHER", LAST)
    desk, store = desk_of(tmp_path)
    store.go.set()
    await asyncio.gather(*putting(desk, BLOBS))
    assert store.settled == [len(BLOBS)]
    assert await desk.have("ann", [address(data) for data in BLOBS]) == {address(data) for data in BLOBS}


async def test_many_bytes_are_settled_though_more_are_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobdesk, "GATHER", LAST)
    monkeypatch.setattr(blobdesk, "TOGETHER", 100)
    desk, store = desk_of(tmp_path)
    slow, first = putting(desk, [BLOBS[-1], BLOBS[0]])
    await asyncio.wait_for(first, LAST / 2)
    assert not slow.done()
    store.go.set()
    await slow


async def test_a_slow_write_holds_up_the_others_for_a_moment_only(tmp_path: Path) -> None:
    desk, store = desk_of(tmp_path)
    slow, *others = putting(desk, [BLOBS[-1], *BLOBS[:2]])
    await asyncio.wait_for(asyncio.gather(*others), LAST)
    assert not slow.done()
    store.go.set()
    await slow


async def test_a_write_that_fails_is_waited_for_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobdesk, "GATHER", LAST)
    desk, store = desk_of(tmp_path)
    good = putting(desk, BLOBS[:1])[0]
    bad = asyncio.create_task(desk.put("ann", address(b"something else"), BLOBS[1]))
    with pytest.raises(BlobRefused):
        await bad
    await asyncio.wait_for(good, LAST / 2)
    await asyncio.wait_for(putting(desk, BLOBS[2:3])[0], LAST / 2)
    assert sum(store.settled) == 2


async def test_another_owners_writes_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobdesk, "GATHER", LAST)
    desk, store = desk_of(tmp_path)
    slow = putting(desk, BLOBS[-1:], "bob")[0]
    await asyncio.wait_for(putting(desk, BLOBS[:1])[0], LAST / 2)
    store.go.set()
    await slow
