"""Entries and states whose components stand in tables outside of them (docs/state-store.md, "Tables"): read and put
together before they are applied.

Guarantees: what comes out is the entry or state with every component in it, the newest of each name; a table whose
store is away is waited for, since nothing can be right without it. One that is gone or damaged never lets an older
value pass for the newest: every variable that it may hold anew is lost, by name where the name is known.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbos_cluster import bulk, wire

from .entries import Read

Message = Mapping[str, Any]

AGAIN = 1.0
"""Seconds between two looks for a table while the store is away."""

LONG = 256 * 1024
"""Bytes from which a table is taken apart in a thread."""


@dataclass
class _Parts:
    """Put together from the newest to the oldest."""

    components: list[dict[str, Any]] = field(default_factory=list)
    payload: bytearray = field(default_factory=bytearray)
    seen: set[str] = field(default_factory=set)

    def add(self, components: Iterable[Message], payload: bytes | memoryview, gone: Iterable[str]) -> None:
        names: set[str] = set()
        for component in components:
            names.update(component["names"])
            if left := [name for name in component["names"] if name not in self.seen]:
                self.components.append({**component, "names": left, "frames": self._frames(component, payload)})
        self.seen.update(names, gone)

    def _frames(self, component: Message, payload: bytes | memoryview) -> list[Any]:
        frames = []
        for frame in component["frames"]:
            if "at" in frame:
                at, size = frame["at"], frame["size"]
                frames.append({"size": size, "at": len(self.payload)})
                self.payload += payload[at : at + size]
            else:
                frames.append(frame)
        return frames


async def whole(
    entry: Message, payload: bytes, read: Read, held: Collection[str], log: logging.Logger
) -> tuple[Message, bytes]:
    """The entry or state, complete, and its payload. held: the names that stand here before it is applied."""
    tables = entry.get("tables") or ()
    if not tables:
        return entry, payload
    parts, deleted = _Parts(), list(entry.get("deleted") or ())
    parts.add(entry["components"], payload, entry.get("gone") or ())
    damage, lost = "", dict(entry.get("lost") or {})
    for table in reversed(tables):
        try:
            lists, inline = await _opened(table, read, log)
        except (OSError, ValueError, LookupError) as err:
            damage = damage or f"the table of {table['names']} variables that it may stand in cannot be read: {err}"
            lost[f"({table['names']} variables, table {table['blobs'][0][:8]})"] = damage
            continue
        if damage:
            older = [name for component in lists["components"] for name in component["names"]]
            lost.update({name: damage for name in older if name not in parts.seen})
            continue
        parts.add(lists["components"], inline, lists["gone"])
        deleted += lists["gone"]
    if damage and "upto" not in entry:
        lost.update({name: damage for name in held if name not in parts.seen})
    found = {**entry, "components": parts.components, "deleted": deleted, "lost": lost, "tables": []}
    return found, bytes(parts.payload)


async def _opened(table: Message, read: Read, log: logging.Logger) -> tuple[dict[str, Any], memoryview]:
    """The lists of a table and its inline frames. Raises OSError or ValueError when it is gone or damaged."""
    data = bytearray(table["size"])
    hashes: Sequence[str] = table["blobs"]
    while True:
        try:
            size = await read(hashes, memoryview(data), wire.BLOB_CHUNK)
            break
        except Exception as err:  # whatever `read` raises; asked again, or raised as what it means here
            if getattr(err.__cause__, "code", "") != "away":
                raise OSError(str(err)) from err
            log.warning("NBOS: waiting for the table of %d variables: %s", table["names"], err)
            await asyncio.sleep(AGAIN)
    if size != len(data):
        raise ValueError(f"a table of {len(data)} bytes came as {size} bytes")
    return await asyncio.to_thread(bulk.split, data) if size > LONG else bulk.split(data)
