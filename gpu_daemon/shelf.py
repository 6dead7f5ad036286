"""The tables of records (nbos_cluster/tables.py), read from the blob store and checked against their hashes.

Guarantees: what is returned is what was written, or an error of the store says why not; a table is decoded in a thread,
so that a large one holds up nobody; tables that are still named are not read twice by the collection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from gpu_daemon.blobdesk import BlobDesk
from gpu_daemon.blobs import BlobCorrupt
from nbos_cluster import tables
from nbos_cluster.records import LogEntry, Table
from nbos_cluster.tables import Contents, Naming, TableError


async def contents_of(desk: BlobDesk, owner: str, table: Table) -> Contents:
    """Raises BlobError."""
    parts = [await desk.get(owner, digest) for digest in table.blobs]
    try:
        return await asyncio.to_thread(lambda: tables.decode(table, b"".join(parts)))
    except TableError as err:
        raise BlobCorrupt(str(err)) from err


async def opened(desk: BlobDesk, owner: str, entry: LogEntry) -> LogEntry:
    """The entry with its components in it. Raises BlobError."""
    if entry.table is None:
        return entry
    return tables.put_inside(entry, await contents_of(desk, owner, entry.table))


class Shelf:
    """What the tables of records name, for the collection. Remembers those that it was asked for last."""

    def __init__(self, desk: BlobDesk) -> None:
        self._desk = desk
        self._known: dict[str, dict[Table, Naming]] = {}

    async def namings(self, folder: str, wanted: Mapping[Table, str]) -> dict[Table, Naming]:
        """wanted: the owner of each. Raises BlobError if one cannot be read: then nobody knows what it names."""
        known = self._known.get(folder, {})
        found = {}
        for table, owner in wanted.items():
            naming = known.get(table)
            found[table] = naming or tables.naming(await contents_of(self._desk, owner, table))
        self._known[folder] = found
        return found

    def keep(self, folders: Iterable[str]) -> None:
        """Forget all but these."""
        self._known = {folder: self._known[folder] for folder in folders if folder in self._known}
