"""Large buffers in content-addressed chunks: which chunks are new, told without hashing them twice.

A chunk is known by its BLAKE3 address (what it is stored under). Whether it changed since it was last captured is
told by xxh3 where `xxhash` can be imported (8 to 10 GB/s a core); two different chunks pass for the same with a
chance of 2**-64 per comparison. Without xxhash the address itself is compared: right as well, and slower.
Both release the interpreter for large inputs, so chunks are hashed by several threads.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
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

_Job = tuple[memoryview, tuple[bytes, str], "Known"]
_Marked = tuple[bytes, str, bool]

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def chunk_size(total: int) -> int:
    return CHUNK if total <= LONG else wire.BLOB_CHUNK


@dataclass(frozen=True)
class Marks:
    """What is remembered of a frame: its size, and for each chunk the quick mark and the address."""

    size: int
    quick: tuple[bytes, ...]
    hashes: tuple[str, ...]


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

    def chunks(self) -> Iterable[tuple[str, memoryview]]:
        view = memoryview(self.data).cast("B")
        step = chunk_size(view.nbytes)
        for number, digest in enumerate(self.hashes):
            yield digest, view[number * step : (number + 1) * step]


def marks_of(frame: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The marks that an entry has for the blobs of a frame; empty where it has none, or nobody here can use them."""
    text = frame.get("marks") or ""
    size = 2 * marks.SIZE
    if marks.mark is None or len(text) != size * len(frame.get("blobs") or ()):
        return ()
    return tuple(bytes.fromhex(text[at : at + size]) for at in range(0, len(text), size))


Known = Mapping[tuple[int, bytes], str]
"""Addresses by length and quick mark."""


def known(before: Iterable[Marks]) -> Known:
    """The chunks of frames whose places have changed: another frame came between them, or they are in another order."""
    return {
        (min(chunk_size(marks.size), marks.size - number * chunk_size(marks.size)), quick): address
        for marks in before
        for number, (quick, address) in enumerate(zip(marks.quick, marks.hashes, strict=True))
    }


def frame(data: bytes | memoryview, before: Marks | None = None, elsewhere: Known | None = None) -> FrameData:
    """Mark `data`; chunks that have the quick mark they had `before`, at the same place, keep their address, and so do
    those that were `elsewhere`."""
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
        there = list(zip(old.quick, old.hashes, strict=True)) if old is not None and old.size == view.nbytes else []
        there += [(b"", "")] * (len(chunks) - len(there))
        jobs += [(chunk, mark, elsewhere or {}) for chunk, mark in zip(chunks, there, strict=True)]
        counts.append(len(chunks))
    done = iter(_each(_mark, jobs, sum(view.nbytes for view in views)))
    return tuple(
        _framed(data, view, list(itertools.islice(done, count)))
        for data, view, count in zip(parts, views, counts, strict=True)
    )


def _framed(data: bytes | memoryview, view: memoryview, marked: list[_Marked]) -> FrameData:
    step = chunk_size(view.nbytes)
    fresh = sum(min(step, view.nbytes - step * number) for number, (_, _, new) in enumerate(marked) if new)
    return FrameData(data, Marks(view.nbytes, tuple(q for q, _, _ in marked), tuple(h for _, h, _ in marked)), fresh)


def _mark(job: _Job) -> _Marked:
    part, (quick, digest), elsewhere = job
    if marks.mark is None:
        now = content.address(part)
        return now.encode(), now, now != digest and (len(part), now.encode()) not in elsewhere
    mark = marks.mark(part)
    if mark == quick:
        return mark, digest, False
    if (len(part), mark) in elsewhere:
        return mark, elsewhere[len(part), mark], False
    now = content.address(part)  # of what was loaded from the log only the address is known
    return mark, now, now != digest


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
