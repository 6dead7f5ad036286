"""Which components of an entry the blob store has room for. No IO.

Guarantees: of a component that does not fit no byte is sent, so that it takes no room from the ones behind it, in this
entry and the next; what others store at the same time is not foreseen (then the store itself says that it is full).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .capture.buffers import Chunk
from .capture.changes import Packed
from .reports.progress import size

Wanted = tuple[Packed, Chunk, memoryview]
"""A component, what is known of one of its chunks, the chunk's bytes."""

BLOCK = 4096
"""File systems give whole blocks."""


def fitting(
    wanted: Sequence[Wanted], there: Collection[str], free: int
) -> tuple[list[Wanted], list[tuple[Wanted, int]]]:
    """What to send of `wanted` (the chunks of each component together) while `free` bytes are left; and the first
    chunk of each component that does not fit, with the bytes it needs. there: chunks that take room already."""
    sent: set[str | int] = set(there)
    kept: list[Wanted] = []
    refused: list[tuple[Wanted, int]] = []
    for chunks in _by_component(wanted):
        new = {key(chunk): -(-data.nbytes // BLOCK) * BLOCK for _, chunk, data in chunks}
        needs = sum(count for each, count in new.items() if each not in sent)
        if needs > free:
            refused.append((chunks[0], needs))
            continue
        free -= needs
        sent.update(new)
        kept += chunks
    return kept, refused


def key(chunk: Chunk) -> str | int:
    """Equal for chunks that are stored once, as far as that is known."""
    return chunk.address or id(chunk)


def why(where: str, needs: int, free: int) -> str:
    return f"{where} is full ({size(free)} free, {size(needs)} needed); delete kernels or files, or enlarge it"


def _by_component(wanted: Sequence[Wanted]) -> list[list[Wanted]]:
    found: dict[int, list[Wanted]] = {}
    for each in wanted:
        found.setdefault(id(each[0]), []).append(each)
    return list(found.values())
