"""The replica's end of blobs: into the store, out of it, through memory shared with the daemon (docs/protocol.md).

Guarantees: once `put` returned, the memory it was given may change: the bytes are copied (into the shared memory, at
most `arena.SIZE` of them at a time; where that has no room in time or is not to be had, into the request). Every
future ends with the daemon's reply, also over restarts of the daemon. Nothing here is needed for correctness besides:
without shared memory the bytes travel as payloads.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from nbos_cluster import marks, wire
from nbos_cluster.arena import SIZE, Arena, Room, fetch

from . import blobfiles
from .link import Link, Request

IDLE = 20.0
"""Seconds after which shared memory that is not used is given back to the system."""
AHEAD = SIZE // 4
"""Bytes of blobs that are asked for before the first has come: enough to keep the daemon busy, and little enough to
stay in the processor's cache on their way; the arena has room for `put`s beside them."""

STRAIGHT = 1024 * 1024
"""Bytes of a value from which its files are opened: a connection for them costs more than one small blob."""

AWAY = 10.0
"""Seconds that a blocking read waits for a daemon that is not connected; a restarted one is there within three."""

STEP = 256 * 1024
"""Bytes of a piece that is copied and compared."""

Reply = dict[str, Any]
CHANGED: Reply = {"ok": False, "error": "refused", "reason": "its bytes changed while they were sent"}
_Blob = tuple[Reply, Any, Callable[[], None]]
"""The daemon's reply, where the bytes are, and what to call when they are not needed there any more."""


class Places(Protocol):
    """Several places that a read fills one after the other, as if they were one run of bytes."""

    @property
    def nbytes(self) -> int: ...

    @property
    def marks(self) -> Mapping[str, bytes]:
        """Of blobs that it is filled with, by address; not of all."""
        ...

    def __setitem__(self, where: slice, data: memoryview, /) -> None: ...

    def place(self, at: int, size: int) -> memoryview | None:
        """The memory of this run itself, where it is one; None: give the bytes."""
        ...


Target = Places | memoryview


@dataclass
class _Shared:
    arena: Arena
    room: Room


class BlobChannel:
    """`path`: the daemon's socket. `renew()` is to be called at each new connection of the link."""

    def __init__(self, link: Link, path: str, log: logging.Logger) -> None:
        self._link, self._path, self._log = link, path, log
        self._lock = threading.Lock()
        self._shared: _Shared | None = None
        self._asked = False
        self._files = self.addresses = False
        self._trim: threading.Timer | None = None

    def renew(self, files: bool = False, addresses: bool = False) -> None:
        """The daemon may be another one now: shared memory is asked for again when it is needed next. files: it hands
        out descriptors of blobs. addresses: it makes those of what is put without one."""
        with self._lock:
            self._shared, self._asked, self._files, self.addresses = None, False, files, addresses

    # -- out ----------------------------------------------------------------------------------------------------------

    def put(self, digest: str, data: memoryview, mark: bytes = b"", wait: float | None = 5.0) -> Future[Reply]:
        """Have `data` stored, under the address `digest`; the reply's `hash` says it where this is ''. mark: what it
        has to have, else it changed and is refused. wait: seconds to wait for room in the shared memory, before the
        request carries a copy."""
        size = data.nbytes
        shared = self._get()
        at = shared.room.take(size, wait) if shared is not None else None
        done: Future[Reply] = Future()
        message = {"type": "put_blob", "hash": digest} if digest else {"type": "put_blob"}
        if shared is None or at is None:
            copy = bytes(data)
            if _marked([copy], mark):
                _pass_on(self._link.request(message, copy), done)
            else:
                done.set_result(CHANGED)
            return done
        place = shared.arena.part(at, size)
        if not _marked(_copied(data.cast("B"), place), mark):
            self._give(shared, at, size)
            done.set_result(CHANGED)
            return done

        def answered(reply: Reply) -> None:
            if reply.get("error") == "no_arena":
                again = self._link.request(message, bytes(place))
                self._give(shared, at, size)
                _pass_on(again, done)
                return
            self._give(shared, at, size)
            done.set_result(reply)

        _when(self._link.request({**message, "at": at, "size": size}), answered, done)
        return done

    def have(self, digests: Sequence[str]) -> Future[Reply]:
        """The reply's `have` holds those that need not be sent."""
        done: Future[Reply] = Future()
        _pass_on(self._link.request({"type": "have_blobs", "hashes": list(digests)}), done)
        return done

    # -- in -----------------------------------------------------------------------------------------------------------

    async def read(self, digests: Sequence[str], target: Target, chunk: int = wire.BLOB_CHUNK) -> int:
        """Fill `target` with the blobs one after the other; how many bytes they had. chunk: what one has at most.

        Raises BlobFailed with the daemon's code and reason.
        """
        work, found = self._whole(digests, target, chunk), None
        try:
            while True:
                future = work.send(found)
                found = await asyncio.shield(asyncio.wrap_future(future))
        except StopIteration as end:
            return int(end.value)
        finally:
            work.close()

    def read_now(self, digests: Sequence[str], target: Target, chunk: int = wire.BLOB_CHUNK) -> int:
        """`read` for code that cannot wait for an event loop, on any thread but the link's; it may be interrupted.

        Raises BlobFailed too when the daemon has been away for AWAY seconds.
        """
        work, found = self._whole(digests, target, chunk), None
        try:
            while True:
                found = self._wait(work.send(found))
        except StopIteration as end:
            return int(end.value)
        finally:
            work.close()

    def _wait(self, future: Future[Any]) -> Any:
        away = 0.0
        while not wait([future], timeout=0.5).done:
            away = 0.0 if self._link.connected else away + 0.5
            if away >= AWAY:
                raise BlobFailed("away", self._link.since())
        return future.result()

    def _whole(self, digests: Sequence[str], target: Target, chunk: int) -> Generator[Future[Any], Any, int]:
        """Yields each future that has to be waited for, and takes its result. Straight from the files, where the daemon
        hands them out and it is worth it; what is wrong with a blob there the daemon finds out and tells."""
        filled, left = 0, list(digests)
        while left:
            alone = left
            if self._files and target.nbytes >= STRAIGHT:
                some = left[: blobfiles.AT_ONCE]
                count, size = yield self._straight(some, target, filled)
                filled += size
                alone = left[count : count + 1] if count < len(some) and self._files else left[count:]
                left = left[count:]
                if count == len(some):
                    continue
            filled = yield from self._reading(alone, target, chunk, filled)
            left = left[len(alone) :]
        return filled

    def _straight(self, digests: Sequence[str], target: Target, at: int) -> Future[tuple[int, int]]:
        done: Future[tuple[int, int]] = Future()

        def read(future: Future[tuple[int, int]]) -> None:
            error = future.exception()
            if isinstance(error, blobfiles.NoFiles):
                self._files = False
                self._log.info("NBOS: blobs come through the daemon: %s", error)
                done.set_result((0, 0))
            elif isinstance(error, blobfiles.Stuck):
                done.set_exception(BlobFailed("away", str(error)))
            elif error is not None:
                done.set_exception(error)
            else:
                done.set_result(future.result())

        blobfiles.read(self._path, digests, target, at).add_done_callback(read)
        return done

    def _reading(
        self, digests: Sequence[str], target: Target, chunk: int, filled: int
    ) -> Generator[Future[_Blob], _Blob | None, int]:
        """How far `target` is filled then."""
        coming: deque[Future[_Blob]] = deque()
        left = deque(digests)
        try:
            while left or coming:
                while left and len(coming) < max(4, AHEAD // chunk):
                    coming.append(self._get_blob(left.popleft(), chunk))
                blob = yield coming[0]
                if blob is None:
                    raise RuntimeError("nobody waited for the blob")
                reply, data, give = blob
                coming.popleft()
                try:
                    if not reply.get("ok"):
                        raise BlobFailed(str(reply.get("error")), str(reply.get("reason") or reply.get("error")))
                    size = int(reply["size"])
                    if filled + size > target.nbytes:
                        raise BlobFailed("failed", f"a value of {target.nbytes} bytes came as more than that")
                    target[filled : filled + size] = memoryview(data)[:size]
                    filled += size
                finally:
                    give()
        finally:
            for waiting in coming:
                waiting.add_done_callback(_give_late)
        return filled

    def _get_blob(self, digest: str, room: int) -> Future[_Blob]:
        """The reply, where its bytes are, and what to call when they are not needed there any more."""
        done: Future[_Blob] = Future()
        message = {"type": "get_blob", "hash": digest}
        shared = self._get()
        at = shared.room.take(room) if shared is not None else None
        if shared is None or at is None:
            self._link.request(message).future.add_done_callback(lambda f: _as_payload(f, done))
            return done

        def answered(reply: Reply) -> None:
            if reply.get("error") == "no_arena":
                self._give(shared, at, room)
                self._link.request(message).future.add_done_callback(lambda f: _as_payload(f, done))
                return
            done.set_result((reply, shared.arena.part(at, room), lambda: self._give(shared, at, room)))

        _when(self._link.request({**message, "at": at, "room": room}), answered, done)
        return done

    # -- shared memory ------------------------------------------------------------------------------------------------

    def _get(self) -> _Shared | None:
        with self._lock:
            if self._shared is None and not self._asked and self._link.connected:
                self._asked = True
                try:
                    arena = fetch(self._path)
                    self._shared = _Shared(arena, Room(arena.size))
                    arena.close()
                except (OSError, EOFError, ValueError) as err:
                    self._log.info("NBOS: no shared memory with the daemon, blobs travel through the socket: %s", err)
            return self._shared

    def _give(self, shared: _Shared, at: int, size: int) -> None:
        shared.room.give(at, size)
        with self._lock:
            if self._trim is None and shared.room.idle:
                self._trim = threading.Timer(IDLE, self._give_back, [shared])
                self._trim.daemon = True
                self._trim.start()

    def _give_back(self, shared: _Shared) -> None:
        with self._lock:
            self._trim = None
        shared.room.when_idle(shared.arena.forget_pages)


class BlobFailed(Exception):
    """The daemon cannot give a blob: `code` is the protocol's (`missing`, `away`, …), the text its reason."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def _copied(data: memoryview, place: memoryview) -> Iterator[memoryview]:
    """Copy; the pieces of the copy, each while the processor's cache still has it."""
    for at in range(0, data.nbytes, STEP):
        piece = place[at : at + STEP]
        piece[:] = data[at : at + STEP]
        yield piece


def _marked(pieces: Iterable[bytes | memoryview], mark: bytes) -> bool:
    """Whether they have this mark, if it is one that can be compared. Takes all of them in any case."""
    if len(mark) == marks.SIZE and marks.mark is not None:
        return marks.mark_of_parts(pieces) == mark
    for _ in pieces:
        pass
    return True


def _when(request: Request, answered: Callable[[Reply], None], done: Future[Any]) -> None:
    def ended(future: Future[tuple[Reply, bytes]]) -> None:
        error = future.exception()
        if error is not None:
            done.set_exception(error)
        else:
            answered(future.result()[0])

    request.future.add_done_callback(ended)


def _pass_on(request: Request, done: Future[Reply]) -> None:
    _when(request, done.set_result, done)


def _as_payload(future: Future[tuple[Reply, bytes]], done: Future[Any]) -> None:
    error = future.exception()
    if error is not None:
        done.set_exception(error)
        return
    reply, payload = future.result()
    done.set_result((reply, payload, lambda: None))


def _give_late(future: Future[Any]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result()[2]()
