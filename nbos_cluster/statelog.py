"""The state log: folding entries into a checkpoint, what must leave them for the blob store, when to fold. No
IO.

Guarantees (tests/unit/cluster/test_fold.py and test_tables.py try to break them):
- applying entries one by one gives what applying `fold` of a prefix and then the rest gives, wherever their components
  stand: in the records, or in tables outside of them (`tables`);
- the newest entry is never folded away: the claim of the next execution compares with it (see `election`);
- a fold counts only if nobody folded or replaced the kernel since it was computed.
How entries and states look on a replica's socket is in `statewire`, re-exported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from . import keys, records, tables
from .kv import Compare, Txn, exists, mod_is, op_delete_range, op_put
from .records import Checkpoint, Effects, LogEntry
from .statewire import EntryError, entry_from_wire, entry_to_wire, state_to_wire
from .wire import ENTRY_LIMIT

__all__ = [
    "EntryError",
    "Spill",
    "blobs_of",
    "entry_from_wire",
    "entry_to_wire",
    "fold",
    "fold_txn",
    "fold_unread",
    "plan_fold",
    "push_at",
    "shorten",
    "size_of",
    "spill",
    "state_to_wire",
    "weight",
]

HISTORY_INPUTS = 500
HISTORY_BYTES = 128 * 1024
FOLD_ENTRIES = 64
FOLD_BYTES = 256 * 1024
CHECKPOINT_LIMIT = 1024 * 1024
"""Bytes of a checkpoint in etcd (whose own limit is 1.5 MB)."""

PUSH_AT = 512 * 1024
"""Bytes of components that a checkpoint holds itself at most; beyond it they are pushed into a table."""

TABLE_WEIGHT = 64
"""So many bytes of an entry's table count as one for `plan_fold`: not in etcd, but read by every new replica."""

LAG_FACTOR = 4
"""How many times the limits above a lagging replica may hold a fold back, before it gets a whole state
instead."""


def fold(state: Checkpoint | None, entries: Sequence[LogEntry]) -> Checkpoint:
    """The checkpoint after `entries`, which must follow `state` without a gap. ValueError when they do
    not, or when the components of an entry stand in a table: put them inside first. Those of `state` may."""
    upto = state.upto if state is not None else (entries[0].n - 1 if entries else -1)
    state = state or Checkpoint(upto=upto)
    for entry in entries:
        if entry.n != state.upto + 1:
            raise ValueError(f"entry {entry.n} does not follow {state.upto}; the log has no gaps")
        state = _step(state, entry)
    return state


def fold_unread(state: Checkpoint | None, entries: Sequence[LogEntry]) -> Checkpoint:
    """As `fold`, of everything but components: no table needs to be read. After a reset that is everything."""
    bare = replace(state, components=(), tables=(), gone=()) if state is not None else None
    return fold(bare, [tables.without_components(entry) for entry in entries])


def _step(state: Checkpoint, entry: LogEntry) -> Checkpoint:
    if entry.table is not None:
        raise ValueError(f"the components of entry {entry.n} stand in a table that was not read")
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
            *tables.without(state.components, written | gone),
            *tables.without(entry.components, set(entry.lost)),
        ),
        gone=tuple(sorted(gone.union(state.gone) - (written - gone))) if state.tables else (),
        lost={k: v for k, v in state.lost.items() if k not in written and k not in gone} | entry.lost,
        effects=merge_effects(state.effects, entry.effects),
        history=_history(state.history, entry),
    )


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
    """The hashes of every blob the record itself names. What its tables name besides: `tables.blobs_needed`."""
    return set() if record is None else tables.blobs_needed(record, ())


def size_of(record: Checkpoint | LogEntry) -> int:
    """Bytes the record takes in etcd."""
    return len(records.encode(record))


def weight(entry: LogEntry, size: int) -> int:
    """What an entry of `size` bytes in etcd counts for `plan_fold`."""
    return size + (entry.table.size // TABLE_WEIGHT if entry.table is not None else 0)


@dataclass(frozen=True, slots=True)
class Spill:
    """Store every blob (by hash) first, then write `record`. needs: every blob that must be in the store by then.
    fits: the record is now within the limit."""

    record: LogEntry
    blobs: dict[str, bytes]
    needs: frozenset[str]
    fits: bool


def spill(entry: LogEntry, lost: Iterable[str] = (), limit: int = ENTRY_LIMIT) -> Spill:
    """Put the components and deletions into a table if the entry has more than `limit` bytes. lost: the names
    that are lost until now."""
    needs = blobs_of(entry)
    if size_of(entry) <= limit:
        return Spill(entry, {}, frozenset(needs), True)
    record, blobs = tables.put_outside(entry, lost)
    return Spill(record, blobs, frozenset(needs.union(blobs)), size_of(record) <= limit)


def push_at(state: Checkpoint, limit: int = PUSH_AT) -> int:
    """How many bytes of components the checkpoint holds, if they should now be pushed into a table; else 0."""
    size = size_of(replace(state, lost={}, effects=Effects(), history=(), tables=()))
    return size if size > limit else 0


def shorten(state: Checkpoint, limit: int = CHECKPOINT_LIMIT) -> Checkpoint | None:
    """A checkpoint that is too large gives up its oldest inputs: they are a convenience, the state is not. None if
    that does not help."""
    while state.history and size_of(state) > limit:
        state = replace(state, history=state.history[len(state.history) // 2 + 1 :])
    return state if size_of(state) <= limit else None


def plan_fold(sizes: dict[int, int], last: int, applied: Iterable[int] = ()) -> int | None:
    """Up to which entry the log should be folded now; None when it is short enough.

    sizes: weight of each entry held, by number. last: the newest entry, which always stays. applied: how far
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
