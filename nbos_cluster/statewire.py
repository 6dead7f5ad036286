"""Entries and states as they travel between a replica and its daemon (docs/protocol.md), to and from records.

A replica runs user code, so what comes from it is checked here before it becomes a record: numbers, names,
offsets, hashes and sizes. What only the daemon may say (token, replica, incarnation, time) is never read from
the message.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

from . import bulk
from .content import is_address
from .marks import SIZE as MARK
from .records import Checkpoint, Component, Effects, EntryKind, Frame, LogEntry, Table
from .wire import BLOB_CHUNK, Message

_HEX = re.compile(r"[0-9a-f]*")

MAX_NAMES = 1_000_000
"""Variables in one entry at most."""
MAX_SIZE = 10**15
"""Bytes of one frame: far more than an entry can name the blobs of."""

MAX_TEXT = 4096
"""Characters of one name, reason, path or variable at most (a cell's source has ENTRY_LIMIT only)."""


class EntryError(ValueError):
    """An entry from a replica that breaks the protocol; says which field and how."""


def entry_from_wire(msg: Message, payload: bytes) -> LogEntry:
    """The entry a replica wants appended. token, replica, incarnation and time are for the daemon to fill
    in."""
    try:
        msg = bulk.unpack(msg, payload)
    except ValueError as err:
        raise EntryError(f"an entry's lists cannot be read: {err}") from err
    kind = _text(msg, "kind")
    if kind not in ("cell", "sync"):
        raise EntryError(f"a replica appends entries of kind cell or sync, not {kind[:40]!r}")
    status = _text(msg, "status", "ok")
    if status not in ("ok", "error", "aborted"):
        raise EntryError(f"an entry's status is ok, error or aborted, not {status[:40]!r}")
    return LogEntry(
        n=_count(msg, "n", least=1),
        kind=cast(EntryKind, kind),
        status=cast(Any, status),
        execution_count=_count(msg, "execution_count", 0),
        source=_text(msg, "source", "", limit=0).encode("utf-8", "replace").decode(),
        components=components_from_wire(msg.get("components", []), payload),
        deleted=_texts(msg.get("deleted", []), "deleted"),
        lost=_table(msg.get("lost", {}), "lost"),
        effects=_effects(msg.get("effects", {})),
        reason=_text(msg, "reason", ""),
    )


def any_entry_from_wire(msg: Message, payload: bytes) -> LogEntry:
    """The inverse of `entry_to_wire`, for any kind; for tests and tools, not for what a replica sends."""
    plain = entry_from_wire({**msg, "kind": "cell", "n": max(1, msg["n"])}, payload)
    fields = {name: getattr(plain, name) for name in LogEntry.__struct_fields__}
    fields |= {"n": msg["n"], "kind": msg["kind"], "incarnation": msg["incarnation"], "token": msg["token"]}
    return LogEntry(**{**fields, "replica": msg["replica"]})


def entry_to_wire(entry: LogEntry) -> tuple[Message, bytes]:
    """The entry's fields (without `type`) and the payload with its inline frames."""
    parts, payload = components_to_wire(entry.components)
    message: Message = {
        "n": entry.n,
        "kind": entry.kind,
        "status": entry.status,
        "token": entry.token,
        "replica": entry.replica,
        "incarnation": entry.incarnation,
        "execution_count": entry.execution_count,
        "source": entry.source,
        "components": parts,
        "deleted": list(entry.deleted),
        "lost": entry.lost,
        "effects": _effects_to_wire(entry.effects),
        "reason": entry.reason,
    }
    return {**message, **tables_to_wire([entry.table] if entry.table is not None else [])}, payload


def state_to_wire(state: Checkpoint) -> tuple[Message, bytes]:
    """The checkpoint's fields (without `type`) and the payload with its inline frames."""
    parts, payload = components_to_wire(state.components)
    message: Message = {
        "upto": state.upto,
        "incarnation": state.incarnation,
        "execution_count": state.execution_count,
        "components": parts,
        "lost": state.lost,
        "effects": _effects_to_wire(state.effects),
        "history": [list(item) for item in state.history],
        "gone": list(state.gone),
    }
    return {**message, **tables_to_wire(state.tables)}, payload


def tables_to_wire(tables: Iterable[Table]) -> Message:
    """The replica reads them itself, as blobs."""
    found = [{"blobs": list(table.blobs), "size": table.size, "names": table.names} for table in tables]
    return {"tables": found} if found else {}


def components_to_wire(components: Iterable[Component]) -> tuple[list[Message], bytes]:
    parts: list[Message] = []
    inline: list[bytes] = []
    at = 0
    for component in components:
        frames: list[Message] = []
        for frame in component.frames:
            if frame.data is None:
                frames.append(frame_of_blobs(frame.size, frame.blobs, frame.marks))
                continue
            frames.append({"size": frame.size, "at": at})
            inline.append(frame.data)
            at += len(frame.data)
        parts.append({"names": list(component.names), "digest": component.digest, "frames": frames})
    return parts, b"".join(inline)


def frame_of_blobs(size: int, hashes: Iterable[str], marks: bytes) -> Message:
    """A frame that stands in blobs, as it is written in an entry."""
    frame: Message = {"size": size, "blobs": list(hashes)}
    return {**frame, "marks": marks.hex()} if marks else frame


def _effects_to_wire(effects: Effects) -> Message:
    return {
        "cwd": effects.cwd,
        "environ": effects.environ,
        "sys_path": None if effects.sys_path is None else list(effects.sys_path),
        "packages": effects.packages,
    }


def components_from_wire(raw: object, payload: bytes, most: int = MAX_NAMES) -> tuple[Component, ...]:
    """Checked: raises EntryError. most: variables."""
    components = tuple(_component(item, payload) for item in _list(raw, "components"))
    names = [name for component in components for name in component.names]
    if len(names) > most:
        raise EntryError(f"an entry names {len(names)} variables, at most {most} are kept")
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise EntryError(f"an entry holds {twice[:80]!r} twice")
    return components


def _component(raw: object, payload: bytes) -> Component:
    item = _dict(raw, "a component")
    names = _texts(item.get("names"), "names")
    frames = tuple(_frame(frame, payload) for frame in _list(item.get("frames"), "frames"))
    if not names or not frames:
        raise EntryError("a component needs at least one name and one frame")
    return Component(names=names, digest=_text(item, "digest", ""), frames=frames)


def _frame(raw: object, payload: bytes) -> Frame:
    item = _dict(raw, "a frame")
    size = _count(item, "size", most=MAX_SIZE)
    if "at" in item:
        at = _count(item, "at")
        if at + size > len(payload):
            raise EntryError(f"a frame of {size} bytes at {at} is outside the payload of {len(payload)} bytes")
        return Frame(size=size, data=payload[at : at + size])
    hashes = _texts(item.get("blobs"), "blobs")
    if not all(is_address(h) for h in hashes):
        raise EntryError("a frame's blobs are BLAKE3 addresses (64 digits, lower-case hex)")
    if size > len(hashes) * BLOB_CHUNK or (size == 0) != (not hashes):
        raise EntryError(f"a frame of {size} bytes does not fit {len(hashes)} blobs of at most {BLOB_CHUNK} bytes")
    return Frame(size=size, blobs=hashes, marks=_marks(item, len(hashes)))


def _marks(item: Message, count: int) -> bytes:
    marks = _text(item, "marks", "", limit=0)
    if marks and (len(marks) != count * 2 * MARK or not _HEX.fullmatch(marks)):
        raise EntryError(f"a frame's marks are {2 * MARK} lower-case hex digits for each of its {count} blobs")
    return bytes.fromhex(marks)


def _effects(raw: object) -> Effects:
    item = _dict(raw, "effects")
    cwd, path = item.get("cwd"), item.get("sys_path")
    environ = _dict(item.get("environ") or {}, "environ")
    return Effects(
        cwd=None if cwd is None else _text(item, "cwd"),
        environ={_str(k, "environ"): None if v is None else _str(v, "environ", 0) for k, v in environ.items()},
        sys_path=None if path is None else _texts(path, "sys_path"),
        packages=_table(item.get("packages") or {}, "packages"),
    )


def _dict(raw: object, what: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise EntryError(f"{what} must be an object, not {type(raw).__name__}")
    return raw


def _list(raw: object, what: str) -> list[Any]:
    if not isinstance(raw, list):
        raise EntryError(f"{what} must be a list, not {type(raw).__name__}")
    return raw


def _str(raw: object, what: str, limit: int = MAX_TEXT) -> str:
    if not isinstance(raw, str):
        raise EntryError(f"{what} must be text, not {type(raw).__name__}")
    if limit and len(raw) > limit:
        raise EntryError(f"{what} has {len(raw)} characters, at most {limit} are kept")
    if what != "source" and not _encodable(raw):
        raise EntryError(f"{what} holds a lone surrogate, which is no text: {ascii(raw)[:80]}")
    return raw


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(item: Message, name: str, default: str | None = None, limit: int = MAX_TEXT) -> str:
    return _str(item.get(name, default), name, limit)


def _texts(raw: object, what: str) -> tuple[str, ...]:
    return tuple(_str(item, what) for item in _list(raw, what))


def _table(raw: object, what: str) -> dict[str, str]:
    return {_str(k, what): _str(v, what) for k, v in _dict(raw, what).items()}


def _count(item: Message, name: str, default: int | None = None, least: int = 0, most: int = 10**12) -> int:
    value = item.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < most:
        raise EntryError(f"{name} must be a number from {least} to {most}, not {str(value)[:40]!r}")
    return value
