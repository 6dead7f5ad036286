"""Which addresses of an entry's chunks are made here instead of by the daemon that stores them. No IO besides hashing.

The daemon makes the address of what it stores in any case, so a chunk that is certainly new needs none from here. One
is needed to find out that the store has a chunk already, and that two chunks of an entry are the same one.

Guarantees: a chunk that stands in the store, or twice in an entry, is sent for nothing only where the first new chunk
of its component (as a rule: all of it) is not in the store; an address is given to no chunk whose bytes have changed
since it was marked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from nbos_cluster import content, marks

from .capture import buffers
from .fitting import Wanted


def pending(wanted: Iterable[Wanted]) -> list[Wanted]:
    return [each for each in wanted if not each[1].address]


def repeated(wanted: Sequence[Wanted]) -> list[Wanted]:
    """Chunks that seem to be the same as another of the entry. A mark is no proof of that, an address is."""
    counts = Counter((chunk.mark, data.nbytes) for _, chunk, data in wanted)
    return [each for each in pending(wanted) if counts[each[1].mark, each[2].nbytes] > 1]


def samples(wanted: Sequence[Wanted]) -> list[Wanted]:
    """One chunk of each component of which no address is known: whether it is stored says how it is with the others."""
    known = {id(component) for component, chunk, _ in wanted if chunk.address}
    first: dict[int, Wanted] = {}
    for each in pending(wanted):
        if id(each[0]) not in known:
            first.setdefault(id(each[0]), each)
    return list(first.values())


def likely(wanted: Sequence[Wanted], there: Collection[str]) -> list[Wanted]:
    """What may be stored already, since something of its component is."""
    stored = {id(component) for component, chunk, _ in wanted if chunk.address in there}
    return [each for each in pending(wanted) if id(each[0]) in stored]


def make(some: Sequence[Wanted]) -> set[str]:
    """Make the addresses of these chunks; those that were made."""
    found = buffers.threads().map(_address, some) if len(some) > 1 else map(_address, some)
    return {address for address in found if address}


def _address(each: Wanted) -> str:
    _, chunk, data = each
    if not chunk.address:
        found = content.address(data)
        if marks.mark is None or marks.mark(data) == chunk.mark:
            chunk.address = found
    return chunk.address
