"""Tables: components that are too many, or name too many blobs, for a record in etcd. No IO.

Guarantees (tests/unit/cluster/test_tables.py tries to break them):
- a table is immutable and named by the hashes of its blobs: who reads it knows that it is the one that was written;
- a checkpoint whose components were pushed into tables, and merged there, says the same as before;
- merging follows sizes: each table is at least twice as large as the next newer one, so that there are few, and each
  byte of a table is written again about as often as the state doubles;
- what `blobs_needed` leaves out of a checkpoint's tables, no reader of that checkpoint asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from . import bulk
from .content import address
from .records import Checkpoint, Component, LogEntry, Table
from .statewire import EntryError, components_from_wire, components_to_wire
from .wire import BLOB_CHUNK

GROWTH = 2


@dataclass(frozen=True, slots=True)
class Contents:
    """What a table holds: components, and names that were deleted from what stands before it."""

    components: tuple[Component, ...] = ()
    gone: tuple[str, ...] = ()


class TableError(ValueError):
    """The bytes of a table are none."""


def encode(contents: Contents) -> tuple[Table, dict[str, bytes]]:
    """The table and the blobs it consists of, which are to be stored first."""
    parts, payload = components_to_wire(contents.components)
    data = bulk.join({"components": parts, "gone": list(contents.gone)}, payload)
    blobs = {}
    hashes = []
    for at in range(0, len(data), BLOB_CHUNK):
        chunk = data[at : at + BLOB_CHUNK]
        hashes.append(address(chunk))
        blobs[hashes[-1]] = chunk
    names = sum(len(component.names) for component in contents.components)
    return Table(blobs=tuple(hashes), size=len(data), names=names), blobs


def decode(table: Table, data: bytes) -> Contents:
    """The inverse, from the blobs joined. Raises TableError."""
    if len(data) != table.size:
        raise TableError(f"a table of {table.size} bytes came as {len(data)} bytes")
    try:
        lists, payload = bulk.split(data)
        components = components_from_wire(lists.get("components", []), bytes(payload), most=sys.maxsize)
        return Contents(components, tuple(map(str, lists.get("gone", []))))
    except (ValueError, EntryError) as err:
        raise TableError(f"a table cannot be read: {err}") from err


# -- entries ----------------------------------------------------------------------------------------------------------


def put_outside(entry: LogEntry, lost: Iterable[str]) -> tuple[LogEntry, dict[str, bytes]]:
    """The entry with its components and deletions in a table, and the table's blobs. lost: names lost until now."""
    table, blobs = encode(Contents(entry.components, entry.deleted))
    written = {name for component in entry.components for name in component.names} | set(entry.deleted)
    cured = tuple(sorted(written.intersection(lost)))
    return replace(entry, components=(), deleted=(), table=table, cured=cured), blobs


def put_inside(entry: LogEntry, contents: Contents) -> LogEntry:
    """The inverse."""
    return replace(entry, components=contents.components, deleted=contents.gone, table=None, cured=())


def without_components(entry: LogEntry) -> LogEntry:
    """What an entry says about everything but components, also where its table was not read."""
    written = {name for component in entry.components for name in component.names}
    deleted = tuple(sorted({*written, *entry.cured, *entry.deleted}))
    return replace(entry, components=(), deleted=deleted, table=None, cured=())


# -- checkpoints ------------------------------------------------------------------------------------------------------


def without(components: Iterable[Component], names: set[str]) -> list[Component]:
    """Components without `names`. What stays of a group keeps its stream and says which names of it still
    count."""
    kept = []
    for component in components:
        if names.isdisjoint(component.names):
            kept.append(component)
        elif rest := tuple(name for name in component.names if name not in names):
            kept.append(replace(component, names=rest))
    return kept


def overlay(older: Contents, newer: Contents, bottom: bool) -> Contents:
    """Both as one. bottom: nothing stands before `older`, so that deletions have done their work."""
    written = {name for component in newer.components for name in component.names}
    components = (*without(older.components, written.union(newer.gone)), *newer.components)
    gone = () if bottom else tuple(sorted({*older.gone, *newer.gone}))
    return Contents(components, gone)


def whole(state: Checkpoint, contents: Sequence[Contents]) -> Checkpoint:
    """The checkpoint with everything in it. contents: of its tables, oldest first."""
    found = Contents()
    for each in (*contents, Contents(state.components, state.gone)):
        found = overlay(found, each, bottom=True)
    return replace(state, components=found.components, tables=(), gone=())


def to_merge(sizes: Sequence[int], new: int) -> int:
    """How many of the newest tables (sizes, oldest first) a new one of `new` bytes is written together with."""
    count = 0
    while count < len(sizes) and sizes[-1 - count] < GROWTH * new:
        new += sizes[-1 - count]
        count += 1
    return count


def push(state: Checkpoint, merged: Sequence[Contents]) -> tuple[Checkpoint, dict[str, bytes]]:
    """The checkpoint with its components in one new table, and the blobs of that. merged: the contents of the newest
    tables, oldest first, which the new one replaces."""
    kept = state.tables[: len(state.tables) - len(merged)]
    found = merged[0] if merged else Contents()
    for each in (*merged[1:], Contents(state.components, state.gone)):
        found = overlay(found, each, bottom=not kept)
    if not kept:
        found = Contents(found.components)
    if not found.components and not found.gone:
        return replace(state, components=(), tables=kept, gone=()), {}
    table, blobs = encode(found)
    return replace(state, components=(), tables=(*kept, table), gone=()), blobs


# -- what tables name -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Naming:
    """Of a table's contents, what matters to the collection: (variables, blobs) of the components that have blobs, and
    every name that it writes or deletes."""

    large: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    covers: frozenset[str]


def naming(contents: Contents) -> Naming:
    large = []
    for component in contents.components:
        blobs = tuple(digest for frame in component.frames for digest in frame.blobs)
        if blobs:
            large.append((component.names, blobs))
    names = {name for component in contents.components for name in component.names}
    return Naming(tuple(large), frozenset(names.union(contents.gone)))


def blobs_needed(record: Checkpoint | LogEntry, tables: Sequence[Naming]) -> set[str]:
    """Every blob the record needs: its own, those of its tables, and what these name and nothing newer covers.
    tables: oldest first."""
    found = {digest for component in record.components for frame in component.frames for digest in frame.blobs}
    found.update(digest for table in tables_of(record) for digest in table.blobs)
    covered = {name for component in record.components for name in component.names}
    covered.update(record.gone if isinstance(record, Checkpoint) else ())
    for table in reversed(tables):
        for names, blobs in table.large:
            if not covered.issuperset(names):
                found.update(blobs)
        covered |= table.covers
    return found


def tables_of(record: Checkpoint | LogEntry) -> tuple[Table, ...]:
    """Oldest first."""
    if isinstance(record, Checkpoint):
        return record.tables
    return () if record.table is None else (record.table,)
