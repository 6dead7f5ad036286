"""Gives memory that large outputs took back to the system once nothing happens, or something has happened for long.

Guarantees: free where there is nothing to give back; a C library without malloc_trim (any but glibc) is left alone.
glibc keeps freed blocks of up to 32 MB for the next one: a router that has passed on some images would stay large.
So blocks of a megabyte and more are mapped one by one, and unmapped when they are freed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

MAPPED_FROM = 1 << 20
"""Bytes from which a block is a mapping of its own. Saying so keeps glibc from raising the bound as it goes."""

_M_MMAP_THRESHOLD = -3  # malloc.h

CALM = 2.0
"""Seconds without a message before memory is given back."""

AT_LAST = 15.0
"""Seconds after which it is given back though messages come: a cell that prints on after a flood is never calm."""


def _trimmer() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


def system_trim() -> Callable[[], object] | None:
    """What gives memory back, after saying which blocks are to be mappings of their own; None where nothing can."""
    trim = _trimmer()
    if trim is None:
        return None
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
    return partial(trim, 0)


class Memory:
    """`busy` whenever a message was handled, `calm` when it is `due`."""

    def __init__(self, trim: Callable[[], object] | None) -> None:
        self._trim = trim
        self._last: float | None = None
        self.due: float | None = None

    def busy(self, now: float) -> None:
        if self._trim is None:
            return
        if self._last is None:
            self._last = now + AT_LAST
        self.due = min(now + CALM, self._last)

    def calm(self, now: float) -> None:
        if self._trim is not None and self.due is not None and now >= self.due:
            self.due = self._last = None
            self._trim()
