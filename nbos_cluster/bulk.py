"""Lists that are too long for a message's or a record's JSON: as bytes, next to the inline frames they refer to.

Guarantees: `split` gives back what `join` was given, and `unpack` what `pack` was given; broken bytes raise
ValueError. Standard library only: it runs in the user's image.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]

FEW = 4096
"""Names and hashes up to this many stand in the message itself."""

LISTS = ("components", "deleted")
"""The fields of an entry that can be long."""

_HEAD = struct.Struct("!Q")


def join(lists: Mapping[str, Any], payload: bytes | memoryview) -> bytes:
    """One run of bytes: the lists, then the frames that stand inline in them."""
    text = _text(lists)
    return b"".join([_HEAD.pack(len(text)), text, payload])


def split(data: bytes | bytearray | memoryview) -> tuple[Message, memoryview]:
    """The lists and the payload."""
    view = memoryview(data)
    if view.nbytes < _HEAD.size:
        raise ValueError(f"a table of {view.nbytes} bytes is none")
    (size,) = _HEAD.unpack(view[: _HEAD.size])
    end = _HEAD.size + size
    if end > view.nbytes:
        raise ValueError(f"a table of {view.nbytes} bytes has lists of {size} bytes")
    return _object(view[_HEAD.size : end]), view[end:]


def pack(entry: Message, payload: bytes) -> tuple[Message, bytes]:
    """The entry with its lists in the payload when they are long: field `bulk` says where."""
    if length(entry) <= FEW:
        return entry, payload
    text = _text({name: entry[name] for name in LISTS})
    short = {name: value for name, value in entry.items() if name not in LISTS}
    return {**short, "bulk": {"at": len(payload), "size": len(text)}}, payload + text


def unpack(entry: Message, payload: bytes) -> Message:
    """The entry with its lists, wherever they stood."""
    where = entry.get("bulk")
    if where is None:
        return entry
    at, size = (where.get("at"), where.get("size")) if isinstance(where, dict) else (None, None)
    if not isinstance(at, int) or not isinstance(size, int) or not 0 <= at <= at + size <= len(payload):
        raise ValueError(f"bulk {str(where)[:80]!r} is outside the payload of {len(payload)} bytes")
    found = _object(memoryview(payload)[at : at + size])
    return {**entry, **{name: found.get(name, []) for name in LISTS}}


def length(entry: Mapping[str, Any]) -> int:
    """How many names and hashes the lists hold."""
    count = len(entry["deleted"])
    for component in entry["components"]:
        count += len(component["names"]) + sum(1 + len(frame.get("blobs", ())) for frame in component["frames"])
    return count


def _text(lists: Mapping[str, Any]) -> bytes:
    return json.dumps(lists, separators=(",", ":")).encode()


def _object(text: memoryview) -> Message:
    found = json.loads(bytes(text))
    if not isinstance(found, dict):
        raise ValueError("the lists are no object")
    return found
