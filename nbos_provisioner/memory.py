"""Gives memory that large outputs took back to the system once nothing happens.

Guarantees: free where there is nothing to give back; a C library without malloc_trim (any but glibc) is left alone.
glibc keeps freed blocks of up to 32 MB for the next one: a router that has passed on some images would stay large.
So blocks of a megabyte and more are mapped one by one, and unmapped when they are freed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

MAPPED_FROM = 1 << 20
"""Bytes from which a block is a mapping of its own. Saying so keeps glibc from raising the bound as it goes."""

_M_MMAP_THRESHOLD = -3  # malloc.h

CALM = 2.0
"""Seconds without a message before memory is given back."""


def _trimmer() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


class Memory:
    """`busy` whenever something was done, `due` is when `calm` is to be called."""

    def __init__(self) -> None:
        self._trim = _trimmer()
        if self._trim is not None:
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
        self.due: float | None = None

    def busy(self, now: float) -> None:
        if self._trim is not None:
            self.due = now + CALM

    def calm(self, now: float) -> None:
        if self._trim is not None and self.due is not None and now >= self.due:
            self.due = None
            self._trim(0)
