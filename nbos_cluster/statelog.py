"""The state log: folding entries into a checkpoint, what must leave them for the blob store, when to fold. No
IO.

Guarantees (tests/unit/cluster/test_fold.py tries to break them):
- applying entries one by one gives what applying `fold` of a prefix and then the rest gives;
- the newest entry is never folded away: the claim of the next execution compares with it (see `election`);
- a fold counts only if nobody folded or replaced the kernel since it was computed.
How entries and states look on a replica's socket is in `statewire`, re-exported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from . import keys, records
from .content import address
from .kv import Compare, Txn, exists, mod_is, op_delete_range, op_put
from .records import Checkpoint, Component, Effects, Frame, LogEntry
from .statewire import EntryError, entry_from_wire, entry_to_wire, state_to_wire
from .wire import BLOB_CHUNK, ENTRY_LIMIT

__all__ = [
    "EntryError",
    "Spill",
    "blobs_of",
    "entry_from_wire",
    "entry_to_wire",
    "fold",
    "fold_txn",
    "plan_fold",
    "size_of",
    "spill",
    "state_to_wire",
]

HISTORY_INPUTS = 500
HISTORY_BYTES = 128 * 1024
FOLD_ENTRIES = 64
FOLD_BYTES = 256 * 1024
CHECKPOINT_LIMIT = 1024 * 1024
"""Bytes of a checkpoint in etcd; it holds every variable, so it may be larger than an entry (etcd: 1.5 MB)."""

LAG_FACTOR = 4
"""How many times the limits above a lagging replica may hold a fold back, before it gets a whole state
instead."""


def fold(state: Checkpoint | None, entries: Sequence[LogEntry]) -> Checkpoint:
    """The checkpoint after `entries`, which must follow `state` without a gap. ValueError when they do
    not."""
    upto = state.upto if state is not None else (entries[0].n - 1 if entries else -1)
    state = state or Checkpoint(upto=upto)
    for entry in entries:
        if entry.n != state.upto + 1:
            raise ValueError(f"entry {entry.n} does not follow {state.upto}; the log has no gaps")
        state = _step(state, entry)
    return state


def _step(state: Checkpoint, entry: LogEntry) -> Checkpoint:
    if entry.kind == "abandoned":
        return replace(state, upto=entry.n)
    if entry.kind == "reset":
        kept = Effects(packages=state.effects.packages)
        return Checkpoint(upto=entry.n, incarnation=entry.incarnation, effects=kept)
    written = {name for component in entry.components for name in component.names}
    gone = set(entry.deleted) | set(entry.lost)
    return replace(
        state,
        upto=entry.n,
        incarnation=entry.incarnation,
        execution_count=entry.execution_count or state.execution_count,
        components=(
            *_without(state.components, written | gone),
            *_without(entry.components, set(entry.lost)),
        ),
        lost={k: v for k, v in state.lost.items() if k not in written and k not in gone} | entry.lost,
        effects=merge_effects(state.effects, entry.effects),
        history=_history(state.history, entry),
    )


def _without(components: Iterable[Component], names: set[str]) -> list[Component]:
    """Components without `names`. What stays of a group keeps its stream and says which names of it still
    count."""
    kept = []
    for component in components:
        if names.isdisjoint(component.names):
            kept.append(component)
        elif rest := tuple(name for name in component.names if name not in names):
            kept.append(replace(component, names=rest))
    return kept


def merge_effects(old: Effects, new: Effects) -> Effects:
    """Both, the newer last. A removed variable stays as None, so that a replica that starts removes it
    too."""
    return Effects(
        cwd=new.cwd if new.cwd is not None else old.cwd,
        environ={**old.environ, **new.environ},
        sys_path=new.sys_path if new.sys_path is not None else old.sys_path,
        packages={**old.packages, **new.packages},
    )


def _history(old: tuple[tuple[int, str], ...], entry: LogEntry) -> tuple[tuple[int, str], ...]:
    if entry.kind != "cell" or not entry.source:
        return old
    inputs = (*old, (entry.execution_count, entry.source))[-HISTORY_INPUTS:]
    room = HISTORY_BYTES
    for at in range(len(inputs) - 1, -1, -1):
        room -= len(inputs[at][1].encode("utf-8", "replace"))
        if room < 0:
            return inputs[at + 1 :]
    return inputs


def blobs_of(record: Checkpoint | LogEntry | None) -> set[str]:
    """The hashes of every blob the record needs."""
    if record is None:
        return set()
    return {h for component in record.components for frame in component.frames for h in frame.blobs}


def size_of(record: Checkpoint | LogEntry) -> int:
    """Bytes the record takes in etcd."""
    return len(records.encode(record))


@dataclass(frozen=True, slots=True)
class Spill:
    """Store every blob (by hash) first, then write `record`. fits: it is now within the limit."""

    record: Checkpoint | LogEntry
    blobs: dict[str, bytes]
    fits: bool


def spill(record: Checkpoint | LogEntry, limit: int | None = None) -> Spill:
    """Move inline frames to blobs, largest first, until the record takes at most `limit` bytes in etcd.

    Nothing moves while it fits. Frames smaller than what a hash takes stay. A checkpoint that is still too
    large gives up its oldest inputs: they are a convenience, the state is not.
    """
    if limit is None:
        limit = CHECKPOINT_LIMIT if isinstance(record, Checkpoint) else ENTRY_LIMIT
    over = size_of(record) - limit
    moved: set[Frame] = set()
    frames = {f for c in record.components for f in c.frames if f.data is not None and f.size > _HASH_COST}
    for frame in sorted(frames, key=lambda f: f.size, reverse=True):
        if over <= 0:
            break
        moved.add(frame)
        over -= frame.size - _HASH_COST
    blobs: dict[str, bytes] = {}
    new = _map_frames(record, lambda frame: _to_blobs(frame, blobs) if frame in moved else frame)
    while isinstance(new, Checkpoint) and new.history and size_of(new) > limit:
        new = replace(new, history=new.history[len(new.history) // 2 + 1 :])
    return Spill(new, blobs, size_of(new) <= limit)


_HASH_COST = 80


def _to_blobs(frame: Frame, blobs: dict[str, bytes]) -> Frame:
    data = frame.data or b""
    hashes = []
    for at in range(0, len(data), BLOB_CHUNK):
        chunk = data[at : at + BLOB_CHUNK]
        hashes.append(address(chunk))
        blobs[hashes[-1]] = chunk
    return Frame(size=frame.size, blobs=tuple(hashes))


def _map_frames(record: Checkpoint | LogEntry, change: Callable[[Frame], Frame]) -> Checkpoint | LogEntry:
    components = tuple(replace(c, frames=tuple(change(f) for f in c.frames)) for c in record.components)
    return replace(record, components=components)


def plan_fold(sizes: dict[int, int], last: int, applied: Iterable[int] = ()) -> int | None:
    """Up to which entry the log should be folded now; None when it is short enough.

    sizes: bytes of each entry held, by number. last: the newest entry, which always stays. applied: how far
    each replica has come; a fold waits for the slowest, but not for ever (it then gets a whole state).
    """
    count, size = len(sizes), sum(sizes.values())
    if count <= FOLD_ENTRIES and size <= FOLD_BYTES:
        return None
    upto = last - 1
    if count <= LAG_FACTOR * FOLD_ENTRIES and size <= LAG_FACTOR * FOLD_BYTES:
        upto = min([upto, *(a for a in applied if a >= 0)])
    return upto if any(n <= upto for n in sizes) else None


def fold_txn(kernel: str, old_rev: int, new: Checkpoint, upto: int, *, upto_rev: int = 0) -> Txn:
    """Put the checkpoint and delete the entries it holds, in one step.

    old_rev: revision of the checkpoint it was folded from, 0 for none. upto_rev: revision of entry `upto`,
    where known; it tells this kernel from one made under the same id after a deletion.
    """
    if new.upto != upto:
        raise ValueError(f"the checkpoint holds the log up to {new.upto}, not {upto}")
    key, last = keys.checkpoint(kernel), keys.log_entry(kernel, upto)
    same: Compare = mod_is(last, upto_rev) if upto_rev else exists(last)
    return Txn(
        [mod_is(key, old_rev), same, exists(keys.log_entry(kernel, upto + 1))],
        [
            op_put(key, records.encode(new)),
            op_delete_range(keys.log_entry(kernel, 0), keys.log_entry(kernel, upto + 1)),
        ],
    )
