"""The mark of a chunk: XXH3 with 64 bits, where the package `xxhash` is there. Several times as fast as its address.

It tells whether bytes are still the ones that they were: two contents have the same by a chance of 2**-64 for each
comparison. So a replica recognises by it the chunks that it wrote or loaded itself. Contents with equal marks can
be made on purpose, so nothing is stored or fetched by its mark, nor shared between kernels (`content` is for that).
Marking lets other threads run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .content import Content

try:
    from xxhash import xxh3_64 as _marker
    from xxhash import xxh3_64_digest as _digest
except ImportError:
    _marker = _digest = None  # type: ignore[assignment,misc]

SIZE = 8
"""Bytes of a mark."""

mark: Callable[[Content], bytes] | None = _digest
"""The mark of contiguous bytes; None where nobody can tell it."""


def mark_of_parts(parts: Iterable[Content]) -> bytes:
    """The mark of `parts` joined, without joining them. Only where there is `mark`."""
    marker = _marker()
    for part in parts:
        marker.update(part)
    return marker.digest()
