"""Large buffers in content-addressed chunks: which chunks are new.

A chunk is stored under its BLAKE3 address. Whether it changed since it was last captured is told by its mark (`marks`)
where there is one (8 to 10 GB/s a core); two different chunks pass for the same with a chance of 2**-64 per comparison.
Without marks the address itself is compared: right as well, and slower. The address of a large new chunk is not made
here: the daemon that stores it has to anyway. Marks and addresses let other threads run, so several are made at a time.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nbos_cluster import content, marks, wire

CHUNK = 4 * 1024 * 1024
"""Bytes of a chunk: what one changed byte costs."""

LONG = 1024 * 1024 * 1024
"""Frames beyond this many bytes have chunks of wire.BLOB_CHUNK, so that the log entry's list of hashes stays short."""

ALONE = 2 * CHUNK
"""Up to so many bytes of a component are hashed by the calling thread."""

LATER = 1024 * 1024
"""From so many bytes on, the address of a new chunk is left to the daemon, which makes it when it stores the chunk."""

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def chunk_size(total: int) -> int:
    return CHUNK if total <= LONG else wire.BLOB_CHUNK


@dataclass(slots=True)
class Chunk:
    """What is known of a chunk. mark: by which it is recognised (`marks`; its address where nobody can tell that).
    address: '' until somebody has made it; the same object then says so wherever the chunk is known."""

    mark: bytes = b""
    address: str = ""


@dataclass(frozen=True)
class Marks:
    """What is remembered of a frame: its size and its chunks."""

    size: int
    chunks: tuple[Chunk, ...]

    @property
    def hashes(self) -> tuple[str, ...]:
        return tuple(chunk.address for chunk in self.chunks)

    def sized(self) -> Iterator[tuple[int, Chunk]]:
        """Each chunk, with its size."""
        step = chunk_size(self.size)
        for number, chunk in enumerate(self.chunks):
            yield min(step, self.size - number * step), chunk

    def identity(self) -> str:
        """Of what the frame holds: the same on every replica, and known before all addresses are."""
        return "".join(
            chunk.mark.hex() if size >= LATER and marks.mark is not None else chunk.address
            for size, chunk in self.sized()
        )


@dataclass(frozen=True)
class FrameData:
    """A run of bytes of a component and the marks of its chunks. `fresh`: bytes in chunks not seen before."""

    data: bytes | memoryview
    marks: Marks
    fresh: int = 0

    @property
    def size(self) -> int:
        return self.marks.size

    @property
    def hashes(self) -> tuple[str, ...]:
        return self.marks.hashes

    def chunks(self) -> Iterable[tuple[Chunk, memoryview]]:
        view = memoryview(self.data).cast("B")
        step = chunk_size(view.nbytes)
        for number, chunk in enumerate(self.marks.chunks):
            yield chunk, view[number * step : (number + 1) * step]


def marks_of(frame: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The marks that an entry has for the blobs of a frame; empty where it has none, or nobody here can use them."""
    text = frame.get("marks") or ""
    size = 2 * marks.SIZE
    if marks.mark is None or len(text) != size * len(frame.get("blobs") or ()):
        return ()
    return tuple(bytes.fromhex(text[at : at + size]) for at in range(0, len(text), size))


Known = Mapping[tuple[int, bytes], Chunk]
"""Chunks by length and mark."""

_Job = tuple[memoryview, Chunk, Known]
_Marked = tuple[Chunk, bool]
"""The chunk, and whether it is new."""


def known(before: Iterable[Marks]) -> Known:
    """The chunks of frames whose places have changed: another frame came between them, or they are in another order."""
    return {(size, chunk.mark): chunk for frame in before for size, chunk in frame.sized()}


def frame(data: bytes | memoryview, before: Marks | None = None, elsewhere: Known | None = None) -> FrameData:
    """Mark `data`; chunks that have the mark they had `before`, at the same place, are the same, and so are those that
    were `elsewhere`."""
    return frames([data], [before], elsewhere)[0]


def frames(
    parts: Sequence[bytes | memoryview], before: Sequence[Marks | None], elsewhere: Known | None = None
) -> tuple[FrameData, ...]:
    """`frame` for each of them, all at the same time: a table has a hundred buffers, each of them too small to share
    out between threads."""
    views = [memoryview(data).cast("B") for data in parts]
    jobs: list[_Job] = []
    counts = []
    for view, old in zip(views, before, strict=True):
        step = chunk_size(view.nbytes)
        chunks = [view[at : at + step] for at in range(0, view.nbytes, step)]
        there = list(old.chunks) if old is not None and old.size == view.nbytes else []
        there += [Chunk()] * (len(chunks) - len(there))
        jobs += [(part, chunk, elsewhere or {}) for part, chunk in zip(chunks, there, strict=True)]
        counts.append(len(chunks))
    done = iter(_each(_mark, jobs, sum(view.nbytes for view in views)))
    return tuple(
        _framed(data, view, list(itertools.islice(done, count)))
        for data, view, count in zip(parts, views, counts, strict=True)
    )


def _framed(data: bytes | memoryview, view: memoryview, marked: list[_Marked]) -> FrameData:
    found = Marks(view.nbytes, tuple(chunk for chunk, _ in marked))
    fresh = sum(size for (size, _), (_, new) in zip(found.sized(), marked, strict=True) if new)
    return FrameData(data, found, fresh)


def _mark(job: _Job) -> _Marked:
    part, before, elsewhere = job
    if marks.mark is None:
        now = content.address(part)
        return Chunk(now.encode(), now), now != before.address and (len(part), now.encode()) not in elsewhere
    mark = marks.mark(part)
    if mark == before.mark:
        return before, False
    if (len(part), mark) in elsewhere:
        return elsewhere[len(part), mark], False
    only_address = before.address and not before.mark  # loaded from a log that had no mark of it
    if len(part) >= LATER and not only_address:
        return Chunk(mark), True
    now = content.address(part)
    return Chunk(mark, now), now != before.address


def _each(call: Callable[[_Job], _Marked], jobs: list[_Job], total: int) -> Iterable[_Marked]:
    if total <= ALONE:
        return map(call, jobs)
    batches = _batches(jobs)
    return itertools.chain.from_iterable(threads().map(lambda batch: [call(job) for job in batch], batches))


def _batches(jobs: Iterable[_Job]) -> list[list[_Job]]:
    """In order, together at least CHUNK bytes each: handing work over costs as much as hashing half a megabyte."""
    batches: list[list[_Job]] = []
    room = 0
    for job in jobs:
        if room <= 0:
            batches.append([])
            room = CHUNK
        batches[-1].append(job)
        room -= job[0].nbytes
    return batches


def threads() -> ThreadPoolExecutor:
    """For work that hashes and lets other threads run meanwhile; what it does never waits for one of them."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "NBOS hash")
            os.register_at_fork(after_in_child=_forget)
        return _pool


def _forget() -> None:
    """A forked child has the pool's object but none of its threads."""
    global _pool
    _pool = None
