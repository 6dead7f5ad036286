"""Blobs read by the replica itself, from the files that the daemon hands it descriptors of (docs/protocol.md).

Guarantees: what is counted as read is what the log names, compared in the memory that it is used from; every
descriptor is closed; a read ends within `PATIENCE`, with `Stuck` where the disk has not answered: it may still write
to the memory that it was given, which is then nobody else's. Whatever else is wrong with a blob here (gone, damaged, a
disk that cannot read) is left to the daemon to find and to tell: this only stops in front of it.

Compared is the mark (`marks`) that the log has for a blob, where it has one: that these bytes have the address was seen
by the daemon that wrote them, and what can happen to them since is damage, which a mark finds as surely and several
times as fast. Otherwise it is the address. A piece is compared while it still lies in the processor's cache, and pieces
of several blobs are read at the same time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Protocol

from nbos_cluster import content, files, marks

from .capture import buffers

PATIENCE = 45.0
"""Seconds that a disk may take for AT_ONCE blobs, as the daemon's patience with it."""

STEP = 512 * 1024
"""Bytes of a piece: half of what the cache of a core holds at least."""

AT_ONCE = files.AT_ONCE


class Places(Protocol):
    @property
    def marks(self) -> Mapping[str, bytes]: ...

    def place(self, at: int, size: int) -> memoryview | None: ...


class NoFiles(Exception):
    """The daemon hands out none, or not any more."""


class Stuck(Exception):
    """The disk has not answered; what was to be filled must not be used."""


def read(path: str, digests: Sequence[str], target: Places | memoryview, at: int) -> Future[tuple[int, int]]:
    """Fill `target` from `at` on with the first of these blobs. The result: how many, and how many bytes they had.

    The future fails with NoFiles when blobs are to be asked for in another way, and with Stuck.
    """
    done: Future[tuple[int, int]] = Future()

    def work() -> None:
        try:
            done.set_result(_read(path, digests, target, at))
        except BaseException as err:  # noqa: BLE001 - whoever waits is told
            done.set_exception(err)

    threading.Thread(target=work, name="NBOS files", daemon=True).start()
    return done


def _read(path: str, digests: Sequence[str], target: Places | memoryview, at: int) -> tuple[int, int]:
    try:
        handles = files.ask(path, digests)
    except (OSError, EOFError, ValueError, KeyError) as err:
        raise NoFiles(str(err)) from err
    sizes: list[int] = []
    jobs: list[Future[bool]] = []
    known = {} if isinstance(target, memoryview) else target.marks
    try:
        for handle, digest in zip(handles, digests, strict=True):
            size = os.fstat(handle).st_size if handle is not None else 0
            place = _place(target, at, size)
            if handle is None or place is None:
                break
            jobs.append(buffers.threads().submit(_fill, handle, place, digest, known.get(digest, b"")))
            sizes.append(size)
            at += size
    finally:
        files.close(handles[len(jobs) :])  # each job closes its own
    if wait(jobs, PATIENCE).not_done:
        raise Stuck(f"the disk of the blob store has not answered for {PATIENCE:g} s")
    count = next((number for number, job in enumerate(jobs) if not job.result()), len(jobs))
    return count, sum(sizes[:count])


def _place(target: Places | memoryview, at: int, size: int) -> memoryview | None:
    if isinstance(target, memoryview):
        return target[at : at + size] if at + size <= target.nbytes else None
    return target.place(at, size)


def _fill(handle: int, place: memoryview, digest: str, mark: bytes) -> bool:
    """Whether the file holds just what fills `place`, and that has this mark, or this address where none is known."""
    pieces = _Pieces(handle, place)
    try:
        if mark and marks.mark is not None:
            same = marks.mark_of_parts(pieces) == mark
        else:
            same = content.address_of_parts(pieces) == digest
        return same and pieces.done == place.nbytes
    except OSError:
        return False
    finally:
        os.close(handle)


class _Pieces:
    """What `place` was filled with, piece by piece."""

    def __init__(self, handle: int, place: memoryview) -> None:
        self._handle, self._place, self.done = handle, place, 0

    def __iter__(self) -> Iterator[memoryview]:
        while got := os.preadv(self._handle, [self._place[self.done : self.done + STEP]], self.done):
            piece = self._place[self.done : self.done + got]
            self.done += got
            yield piece
