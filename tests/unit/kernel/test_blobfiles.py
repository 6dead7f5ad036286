"""A replica reads blobs from the daemon's files: what it counts as read is right, whatever stands on the disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from xxhash import xxh3_64_digest

from gpu_daemon.blobs import BlobError, folder_of
from gpu_daemon.directory_store import DirectoryStore
from nbos_cluster import files, marks, wire
from nbos_cluster.content import address
from nbos_kernel import blobfiles
from nbos_kernel.blobchannel import BlobChannel, BlobFailed
from nbos_kernel.entries import Missing
from nbos_kernel.link import Request

PARTS = [os.urandom(3_000_000), os.urandom(70_001), os.urandom(blobfiles.STEP), os.urandom(1)]
HASHES = [address(part) for part in PARTS]
MARKS = [xxh3_64_digest(part) for part in PARTS]
SIZE = sum(map(len, PARTS))


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    store = DirectoryStore(tmp_path / "blobs")
    for digest, part in zip(HASHES, PARTS, strict=True):
        store.put("ann", digest, part)
    return store


Answer = Callable[[socket.socket, list[str]], None]


def serve(path: Path, answer: Answer) -> Iterator[str]:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def work() -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            with sock:
                answer(sock, wire.receive(sock)[0]["hashes"])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield str(path)
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


@pytest.fixture
def daemon(tmp_path: Path, store: DirectoryStore) -> Iterator[str]:
    def answer(sock: socket.socket, hashes: list[str]) -> None:
        handles = store.open_files("ann", hashes)
        files.hand_over(sock, handles)
        files.close(handles)

    yield from serve(tmp_path / "s", answer)


def file_of(store: DirectoryStore, number: int) -> Path:
    return store.root / folder_of("ann") / HASHES[number]


def places(marked: Sequence[bytes] = ()) -> tuple[Missing, bytearray]:
    memory, wanted, at = bytearray(SIZE), Missing(), 0
    for number, (digest, part) in enumerate(zip(HASHES, PARTS, strict=True)):
        frame = {"blobs": [digest], "marks": marked[number].hex() if marked else ""}
        wanted.add(memoryview(memory)[at : at + len(part)], frame, set())
        at += len(part)
    return wanted, memory


def test_they_fill_one_run_of_memory_or_several_places(daemon: str) -> None:
    one = bytearray(SIZE + 5)
    assert blobfiles.read(daemon, HASHES, memoryview(one), 5).result(10) == (4, SIZE)
    wanted, several = places()
    assert blobfiles.read(daemon, HASHES, wanted, 0).result(10) == (4, SIZE)
    assert one[5:] == several == b"".join(PARTS)
    wanted, several = places(MARKS)
    assert blobfiles.read(daemon, HASHES, wanted, 0).result(10) == (4, SIZE)
    assert several == b"".join(PARTS)


def test_where_the_log_has_marks_they_are_what_is_compared(daemon: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that is not worth it: one that nobody can compare is no reason to doubt the blob."""
    wrong = [MARKS[0], MARKS[1], MARKS[0], MARKS[3]]
    assert blobfiles.read(daemon, HASHES, places(wrong)[0], 0).result(10) == (2, len(PARTS[0]) + len(PARTS[1]))
    monkeypatch.setattr(marks, "mark", None)
    assert blobfiles.read(daemon, HASHES, places(wrong)[0], 0).result(10) == (4, SIZE)


def test_a_blob_with_another_mark_comes_through_the_daemon_which_knows_its_address(
    daemon: str, store: DirectoryStore
) -> None:
    link, (wanted, memory) = Asked(store), places([MARKS[0], MARKS[0], MARKS[2], MARKS[3]])
    assert channel(daemon, link).read_now(HASHES, wanted) == SIZE
    assert memory == b"".join(PARTS)
    assert link.digests == [HASHES[1]]


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(70_000)
        last = file.read(1)
        file.seek(70_000)
        file.write(bytes([last[0] ^ 16]))


HURT: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut off": lambda path: os.truncate(path, 5000),
    "longer": lambda path: os.truncate(path, 70_002),
    "empty": lambda path: os.truncate(path, 0),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("hurt", HURT)
def test_reading_stops_in_front_of_what_is_not_as_it_was_stored(
    daemon: str, store: DirectoryStore, hurt: str, marked: bool
) -> None:
    HURT[hurt](file_of(store, 1))
    wanted, memory = places(MARKS if marked else ())
    assert blobfiles.read(daemon, HASHES, wanted, 0).result(10) == (1, len(PARTS[0]))
    assert memory[: len(PARTS[0])] == PARTS[0]
    assert blobfiles.read(daemon, HASHES, memoryview(memory), 0).result(10) == (1, len(PARTS[0]))


def test_a_blob_that_goes_while_it_is_read_is_read_to_its_end(store: DirectoryStore) -> None:
    (handle,) = store.open_files("ann", HASHES[:1])
    assert handle is not None
    file_of(store, 0).unlink()
    memory = bytearray(len(PARTS[0]))
    assert blobfiles._fill(handle, memoryview(memory), HASHES[0], b"")
    assert memory == PARTS[0]


def test_what_finds_no_place_is_left_out(daemon: str) -> None:
    assert blobfiles.read(daemon, HASHES, memoryview(bytearray(SIZE - 1)), 0).result(10)[0] == 3
    assert blobfiles.read(daemon, HASHES[1:], places()[0], 0).result(10) == (0, 0)


def open_below(folder: Path) -> list[str]:
    """Files there that this process holds open; other threads may open and close files elsewhere meanwhile."""
    found = []
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{handle}"))
    return [name for name in found if name.startswith(str(folder))]


def test_no_descriptor_stays_open_and_none_can_write(daemon: str, store: DirectoryStore) -> None:
    file_of(store, 2).write_bytes(b"other")
    for _ in range(3):
        blobfiles.read(daemon, [*HASHES, address(b"no such")], places()[0], 0).result(10)
    deadline = time.monotonic() + 10
    while open_below(store.root) and time.monotonic() < deadline:
        time.sleep(0.005)  # the daemon's own are closed a moment after it has handed them over
    assert open_below(store.root) == []
    (handle,) = files.ask(daemon, HASHES[:1])
    assert handle is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(handle, b"x", 0)
    os.close(handle)


def test_what_a_disk_may_still_write_to_is_not_used(daemon: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else filled it, the late bytes would come on top."""
    answers, fill = threading.Event(), blobfiles._fill

    def late(handle: int, place: memoryview, digest: str, mark: bytes) -> bool:
        answers.wait(10)
        return fill(handle, place, digest, mark)

    monkeypatch.setattr(blobfiles, "_fill", late)
    monkeypatch.setattr(blobfiles, "PATIENCE", 0.05)
    try:
        with pytest.raises(blobfiles.Stuck, match="has not answered"):
            blobfiles.read(daemon, HASHES, places()[0], 0).result(10)
    finally:
        answers.set()


def older(sock: socket.socket, hashes: list[str]) -> None:
    """A daemon that does not know the question closes the connection."""


def wrong(sock: socket.socket, hashes: list[str]) -> None:
    with Path(sock.getsockname()).with_name("handed").open("w") as file:
        files.hand_over(sock, [file.fileno(), None])


@pytest.mark.parametrize("answer", [older, wrong])
def test_a_daemon_that_hands_out_none_is_told_apart(tmp_path: Path, answer: Answer) -> None:
    serving = serve(tmp_path / "s", answer)
    path = next(serving)
    with pytest.raises(blobfiles.NoFiles):
        blobfiles.read(path, HASHES, places()[0], 0).result(10)
    assert next(serving, None) is None
    assert open_below(tmp_path) == []
    with pytest.raises(blobfiles.NoFiles):
        blobfiles.read(path, HASHES, places()[0], 0).result(10)


class Asked:
    """A link to a daemon that gives blobs out of `store`, and remembers which."""

    connected = True

    def __init__(self, store: DirectoryStore) -> None:
        self.store, self.digests = store, list[str]()

    def request(self, message: dict[str, str], payload: bytes = b"") -> Request:
        request = Request(message, payload)
        self.digests.append(message["hash"])
        try:
            data = self.store.get("ann", message["hash"])
            request.future.set_result(({"ok": True, "size": len(data)}, data))
        except BlobError as err:
            request.future.set_result(({"ok": False, "error": err.code, "reason": str(err)}, b""))
        return request


def channel(path: str, link: Asked) -> BlobChannel:
    found = BlobChannel(link, path, logging.getLogger("test"))  # type: ignore[arg-type]
    found.renew(files=True)
    found._asked = True  # no shared memory
    return found


def test_what_the_files_do_not_give_comes_through_the_daemon_and_only_that(daemon: str, store: DirectoryStore) -> None:
    link, (wanted, memory) = Asked(store), places()
    file_of(store, 1).rename(file_of(store, 1).with_suffix(".kept"))
    get, store.get = store.get, lambda owner, digest: PARTS[HASHES.index(digest)]  # type: ignore[method-assign]
    assert channel(daemon, link).read_now(HASHES, wanted) == SIZE
    assert memory == b"".join(PARTS)
    assert link.digests == [HASHES[1]]
    store.get = get  # type: ignore[method-assign]
    with pytest.raises(BlobFailed, match="is not in the blob store") as failed:
        channel(daemon, link).read_now(HASHES, places()[0])
    assert failed.value.code == "missing"


def test_a_damaged_file_is_set_aside_by_the_daemon_that_is_asked_for_it(daemon: str, store: DirectoryStore) -> None:
    flip(file_of(store, 1))
    with pytest.raises(BlobFailed, match="damaged") as failed:
        asyncio.run(channel(daemon, Asked(store)).read(HASHES, memoryview(bytearray(SIZE))))
    assert failed.value.code == "corrupt"
    assert not file_of(store, 1).exists()


def test_where_no_files_are_handed_out_all_comes_through_the_daemon(tmp_path: Path, store: DirectoryStore) -> None:
    serving, link, memory = serve(tmp_path / "s", older), Asked(store), bytearray(SIZE)
    blobs = channel(next(serving), link)
    assert asyncio.run(blobs.read(HASHES, memoryview(memory))) == SIZE
    assert memory == b"".join(PARTS)
    assert link.digests == HASHES
    assert next(serving, None) is None
