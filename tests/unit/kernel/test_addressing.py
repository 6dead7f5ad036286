"""Whose work a chunk's address is: a new one's the daemon's; what the store has, or an entry twice, is sent once."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from gpu_daemon.directory_store import DirectoryStore
from nbos_cluster import content, marks
from nbos_cluster.content import address
from nbos_kernel.append import Appender, Entry, Put
from nbos_kernel.blobchannel import BlobChannel
from nbos_kernel.capture import buffers
from nbos_kernel.capture.changes import Changes, Packed
from nbos_kernel.entries import Layout
from nbos_kernel.link import Request

MIB = 1 << 20
LARGE = os.urandom(24 * MIB)
"""Six chunks: more than are sent without asking."""


class Link:
    """To a daemon with a real store, which notes what it is asked."""

    connected = True

    def __init__(self, store: DirectoryStore) -> None:
        self.store, self.puts, self.free = store, list[str](), 1 << 40

    def request(self, message: dict[str, Any], payload: bytes = b"") -> Request:
        request = Request(message, payload)
        reply: dict[str, Any] = {"ok": True}
        if message["type"] == "have_blobs":
            there = sorted(self.store.have("ann", message["hashes"]))
            reply |= {"have": there, "free": self.free, "where": self.store.where}
        else:
            self.puts.append(message.get("hash", ""))
            digest, draft = self.store.write_unnamed("ann", payload)
            assert message.get("hash", digest) == digest
            self.store.settle("ann", [(digest, draft)])
            reply |= {"hash": digest}
        request.future.set_result((reply, b""))
        return request


class Reporter:
    def sends(self, sizes: Iterable[int]) -> None:
        assert all(size > 0 for size in sizes)

    def follow(self, future: Future[Any], size: int) -> None:
        pass


class Replica:
    """What of it is told that a value was lost."""

    def __init__(self) -> None:
        self.capture, self.lost = self, dict[str, str]()

    def lose(self, lost: dict[str, str]) -> None:
        self.lost.update(lost)


@pytest.fixture
def link(tmp_path: Path) -> Link:
    return Link(DirectoryStore(tmp_path / "blobs"))


@pytest.fixture
def addressed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what the replica makes addresses of."""
    found: list[int] = []

    def made(data: content.Content) -> str:
        found.append(len(data))
        return address(data)

    monkeypatch.setattr(content, "address", made)
    return found


def appender(link: Link, addresses: bool = True) -> Appender:
    blobs = BlobChannel(link, "", logging.getLogger("test"))  # type: ignore[arg-type]
    blobs.renew(addresses=addresses)
    blobs._asked = True  # no shared memory
    return Appender(link, Replica(), None, blobs, Reporter())  # type: ignore[arg-type]


def packed(*values: bytes | bytearray, name: str = "x") -> Packed:
    return Packed((name,), "d", buffers.frames(values, [None] * len(values)))


def store(appender: Appender, *components: Packed, meanwhile: Callable[[], object] = int) -> list[dict[str, Any]]:
    """What the entry says of them."""
    entry = Entry(1, "cell", "ok", 1, "", Changes(components=list(components)), {})
    layout = Layout(components)
    meanwhile()
    puts: list[Put] = appender._put(layout, list(components))
    asyncio.run(appender._stored_all(entry, puts))
    return layout.encode(entry.changes.components)[0]


def named(encoded: list[dict[str, Any]]) -> list[str]:
    return [digest for component in encoded for frame in component["frames"] for digest in frame["blobs"]]


def chunks(data: bytes) -> list[str]:
    return [address(data[at : at + buffers.CHUNK]) for at in range(0, len(data), buffers.CHUNK)]


def test_of_a_new_value_the_daemon_makes_all_addresses_but_one(link: Link, addressed: list[int]) -> None:
    encoded = store(appender(link), packed(LARGE))
    assert addressed == [buffers.CHUNK]
    assert named(encoded) == chunks(LARGE)
    assert link.puts == [*chunks(LARGE)[:1], *[""] * 5]
    assert link.store.have("ann", chunks(LARGE)) == set(chunks(LARGE))


def test_what_is_known_keeps_its_address_and_is_not_sent(link: Link, addressed: list[int]) -> None:
    writer, first = appender(link), packed(LARGE)
    store(writer, first)
    changed = bytearray(LARGE)
    changed[5 * MIB] ^= 1
    (frame,) = buffers.frames([changed], [first.frames[0].marks])
    encoded = store(writer, Packed(("x",), "e", (frame,)))
    assert frame.fresh == buffers.CHUNK
    assert named(encoded) == chunks(changed)
    assert link.puts[6:] == [""]


def test_what_is_still_on_its_way_has_its_address_as_soon_as_it_is_stored(link: Link) -> None:
    """The next cell is captured while the blobs of the last are being stored."""
    first = packed(LARGE)
    again = Packed(("x",), "e", buffers.frames([LARGE, b"more"], [first.frames[0].marks, None]))
    store(appender(link), first)
    assert again.frames[0].hashes == tuple(chunks(LARGE))


def test_what_the_store_has_from_before_is_not_sent(link: Link) -> None:
    store(appender(link), packed(LARGE))
    link.puts.clear()
    other = os.urandom(2 * MIB)
    encoded = store(appender(link), packed(LARGE), packed(other, name="y"))
    assert named(encoded) == [*chunks(LARGE), address(other)]
    assert link.puts == [address(other)]


def test_a_chunk_that_stands_twice_in_an_entry_is_sent_once(link: Link) -> None:
    half = os.urandom(buffers.CHUNK)
    encoded = store(appender(link), packed(half * 3), packed(half, name="y"))
    assert named(encoded) == [address(half)] * 4
    assert link.puts == [address(half)]


def test_a_daemon_that_makes_no_addresses_is_sent_them(link: Link) -> None:
    encoded = store(appender(link, addresses=False), packed(LARGE))
    assert named(encoded) == link.puts == chunks(LARGE)


def test_where_nobody_can_tell_marks_addresses_do_it_all(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "mark", None)
    first = packed(LARGE)
    (component,) = encoded = store(appender(link), first)
    assert named(encoded) == link.puts == chunks(LARGE)
    assert "marks" not in component["frames"][0]
    (again,) = buffers.frames([LARGE], [first.frames[0].marks])
    assert (again.fresh, again.marks.identity()) == (0, first.frames[0].marks.identity())


@pytest.mark.parametrize("size", [2 * MIB, len(LARGE)])
def test_bytes_that_change_before_they_are_sent_are_not_stored(link: Link, size: int) -> None:
    """Else the log would hold one value, and the marks by which the next change is found another."""
    data = bytearray(LARGE[:size])

    def thread() -> None:
        data[size - 1] ^= 1

    writer = appender(link)
    assert store(writer, packed(data), meanwhile=thread) == []
    assert "changed while they were sent" in writer._replica.lost["x"]


def test_bytes_that_change_into_what_the_store_has_are_refused_too(link: Link) -> None:
    changed = bytes([LARGE[0] ^ 1]) + LARGE[1:]
    store(appender(link), packed(changed))
    data = bytearray(LARGE)

    def thread() -> None:
        data[0] ^= 1

    assert store(appender(link), packed(data), meanwhile=thread) == []


def test_what_was_loaded_from_a_log_without_marks_is_recognised_by_its_addresses(addressed: list[int]) -> None:
    before = buffers.Marks(len(LARGE), tuple(buffers.Chunk(address=digest) for digest in chunks(LARGE)))
    (frame,) = buffers.frames([LARGE], [before])
    assert (frame.fresh, list(frame.hashes)) == (0, chunks(LARGE))
    assert sum(addressed) == len(LARGE)
    assert buffers.frames([LARGE], [frame.marks])[0] == frame
    assert sum(addressed) == len(LARGE)


def test_a_full_store_is_asked_what_it_has_before_a_value_is_refused(link: Link) -> None:
    """Though its first chunk is another now."""
    changed = os.urandom(buffers.CHUNK) + LARGE[buffers.CHUNK :]
    store(appender(link), packed(LARGE))
    link.puts.clear()
    link.free = buffers.CHUNK
    encoded = store(appender(link), packed(changed))
    assert named(encoded) == chunks(changed)
    assert link.puts == chunks(changed)[:1]
    link.free = buffers.CHUNK - 1
    full = appender(link)
    assert store(full, packed(os.urandom(len(LARGE)))) == []
    assert "is full" in full._replica.lost["x"]
