"""Tables: whatever stands outside of the records, the log says the same; and nothing that somebody reads is left out of
what the collection is told."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nbos_cluster import bulk, records, statelog, tables, wire
from nbos_cluster.content import address
from nbos_cluster.records import Checkpoint, Component, Frame, LogEntry, RecordError, Table
from nbos_cluster.statelog import fold, fold_unread, spill
from nbos_cluster.statewire import entry_from_wire, entry_to_wire
from nbos_cluster.tables import Contents, TableError
from tests.unit.cluster.test_fold import component, logs


class Shelf:
    """A blob store that knows what was stored."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def store(self, blobs: dict[str, bytes]) -> None:
        assert all(address(data) == digest for digest, data in blobs.items())
        self.blobs.update(blobs)

    def read(self, table: Table) -> Contents:
        return tables.decode(table, b"".join(self.blobs[digest] for digest in table.blobs))

    def whole(self, state: Checkpoint) -> Checkpoint:
        return tables.whole(state, [self.read(table) for table in state.tables])

    def opened(self, entry: LogEntry) -> LogEntry:
        return entry if entry.table is None else tables.put_inside(entry, self.read(entry.table))

    def push(self, state: Checkpoint, count: int) -> Checkpoint:
        newest = state.tables[len(state.tables) - count :]
        state, blobs = tables.push(state, [self.read(table) for table in newest])
        self.store(blobs)
        return state


def said(state: Checkpoint) -> tuple[object, ...]:
    """What a checkpoint without tables says, whatever the order of its components."""
    assert not state.tables
    variables = {name: (c.digest, c.frames) for c in state.components for name in c.names}
    names = [name for c in state.components for name in c.names]
    assert len(names) == len(set(names)), "a name stands once"
    return variables, state.lost, state.effects, state.history, state.upto, state.execution_count


def outside(shelf: Shelf, entry: LogEntry, lost: Sequence[str]) -> LogEntry:
    record, blobs = tables.put_outside(entry, lost)
    shelf.store(blobs)
    assert shelf.opened(record) == entry
    return msgspec.structs.replace(record)


@settings(max_examples=300)
@given(logs(), st.data())
def test_entries_one_by_one_are_the_checkpoint_and_the_rest_with_tables_anywhere(
    entries: list[LogEntry], data: st.DataObject
) -> None:
    shelf, state, at = Shelf(), None, 0
    written: list[LogEntry] = []
    for entry in entries:
        lost = fold(None, entries[: entry.n]).lost if entry.n else {}
        plain = entry.kind in ("cell", "sync") and data.draw(st.booleans())
        written.append(outside(shelf, entry, list(lost)) if plain else entry)
    while at < len(entries):
        end = data.draw(st.integers(at + 1, len(entries)))
        state = fold(state, [shelf.opened(entry) for entry in written[at:end]])
        if data.draw(st.booleans()):
            state = shelf.push(state, data.draw(st.integers(0, len(state.tables))))
        assert records.decode(records.encode(state), Checkpoint) == state
        assert said(shelf.whole(state)) == said(fold(None, entries[:end]))
        at = end
        rest = fold_unread(state, written[end:])
        whole = fold(None, entries)
        assert (rest.lost, rest.effects, rest.history) == (whole.lost, whole.effects, whole.history)
    assert state is not None
    every = {digest for c in shelf.whole(state).components for frame in c.frames for digest in frame.blobs}
    needed = tables.blobs_needed(state, [tables.naming(shelf.read(table)) for table in state.tables])
    assert every | {digest for table in state.tables for digest in table.blobs} <= needed


names = st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True)


@given(st.lists(st.tuples(names, st.booleans(), st.booleans()), min_size=1, max_size=12), st.data())
def test_what_a_checkpoint_needs_is_what_a_reader_asks_for(
    steps: list[tuple[list[str], bool, bool]], data: st.DataObject
) -> None:
    """Exactly: neither more (a value that was written over holds no blobs for ever) nor less."""
    shelf, state = Shelf(), Checkpoint(upto=0)
    for n, (group, deleted, push) in enumerate(steps, start=1):
        if deleted:
            entry = LogEntry(n=n, kind="cell", deleted=tuple(group))
        else:
            frame = Frame(size=1, blobs=(f"{n:064x}",))
            entry = LogEntry(n=n, kind="cell", components=(Component(names=tuple(group), digest="", frames=(frame,)),))
        state = fold(state, [entry])
        if push:
            state = shelf.push(state, data.draw(st.integers(0, len(state.tables))))
    read = {digest for c in shelf.whole(state).components for frame in c.frames for digest in frame.blobs}
    own = {digest for table in state.tables for digest in table.blobs}
    needed = tables.blobs_needed(state, [tables.naming(shelf.read(table)) for table in state.tables])
    assert needed == read | own


@given(st.lists(st.integers(1, 10**9), max_size=40))
def test_there_are_few_tables_whatever_their_sizes(sizes: list[int]) -> None:
    standing: list[int] = []
    for size in sizes:
        count = tables.to_merge(standing, size)
        standing = [*standing[: len(standing) - count], size + sum(standing[len(standing) - count :])]
        assert all(older >= 2 * newer for older, newer in pairwise(standing))
    assert len(standing) <= 36


def test_twenty_thousand_variables_of_which_cells_change_one() -> None:
    """What etcd holds stays small, whatever is folded, and so does what is written for a change."""
    shelf, state, count = Shelf(), Checkpoint(upto=0), 20_000
    variable = [component([f"variable_{i}"], f"{i:032x}", bytes(100)) for i in range(count)]
    n = written = 0
    for first in range(0, count, 500):
        n += 1
        state = fold(state, [LogEntry(n=n, kind="cell", components=tuple(variable[first : first + 500]))])
        state = _push_if_large(shelf, state)
    for _ in range(40):
        entries = []
        for _ in range(64):
            n += 1
            changed = component([f"variable_{n * 7919 % count}"], f"{n:032x}", bytes(100))
            entries.append(LogEntry(n=n, kind="cell", components=(changed,)))
            assert statelog.size_of(entries[-1]) < 1000
        before = len(shelf.blobs)
        state = _push_if_large(shelf, fold(state, entries))
        assert statelog.size_of(state) < statelog.CHECKPOINT_LIMIT
        written += sum(len(data) for data in list(shelf.blobs.values())[before:])
    assert len(shelf.whole(state).components) == count
    assert written < 3 * sum(table.size for table in state.tables)
    assert len(state.tables) <= 4


def _push_if_large(shelf: Shelf, state: Checkpoint) -> Checkpoint:
    size = statelog.push_at(state)
    return shelf.push(state, tables.to_merge([table.size for table in state.tables], size)) if size else state


def test_a_component_of_sixty_thousand_chunks_is_one_small_entry() -> None:
    hashes = [f"{i:064x}" for i in range(60_000)]
    frames = [{"size": 10, "at": 0}, {"size": 60_000 * wire.BLOB_CHUNK, "blobs": hashes}]
    message = {
        "n": 1,
        "kind": "cell",
        "components": [{"names": ["big"], "digest": "d", "frames": frames}],
        "deleted": [],
    }
    packed, payload = bulk.pack(message, bytes(10))
    assert len(wire.pack({"type": "append", "entry": packed}, payload)[0]) < 1000
    spilled = spill(entry_from_wire(packed, payload))
    assert spilled.fits
    assert statelog.size_of(spilled.record) < 1000
    assert spilled.needs == {*hashes, *spilled.blobs}
    again = Shelf()
    again.store(spilled.blobs)
    (found,) = again.opened(spilled.record).components
    assert found.frames[1].blobs == tuple(hashes)
    assert 60_000 * wire.BLOB_CHUNK > 500 * 10**9


def test_a_hundred_thousand_variables_in_one_cell_are_one_small_entry() -> None:
    written = [
        {"names": [f"variable_{i}"], "digest": "d" * 32, "frames": [{"size": 1, "at": i}]} for i in range(100_000)
    ]
    packed, payload = bulk.pack({"n": 1, "kind": "cell", "components": written, "deleted": ["x"]}, bytes(100_000))
    assert sum(len(part) for part in wire.pack({"type": "append", "entry": packed}, payload)) < wire.MAX_PAYLOAD
    spilled = spill(entry_from_wire(packed, payload), lost=["variable_7", "other"])
    assert spilled.fits
    assert statelog.size_of(spilled.record) < 1000
    assert spilled.record.cured == ("variable_7",)
    assert spilled.record.table is not None
    assert spilled.record.table.names == 100_000
    assert entry_to_wire(spilled.record)[0]["tables"][0]["names"] == 100_000


def test_records_with_tables_are_refused_by_who_does_not_know_them() -> None:
    """An older NBOS would see an empty entry instead; what has no table is what it was."""
    entry = LogEntry(n=1, kind="cell", components=(component("a", "1"),))
    record, _ = tables.put_outside(entry, ())
    old, new = (msgspec.msgpack.decode(records.encode(each), type=records.Versioned) for each in (entry, record))
    assert (old.version, new.version) == (1, 2)
    with pytest.raises(RecordError, match="version 3"):
        records.decode(msgspec.msgpack.encode(records.Versioned(3, new.body)), LogEntry)


def test_an_entry_written_before_there_were_tables_still_loads() -> None:
    frame = {"size": 1, "data": b"x"}
    body = {"type": "entry", "n": 3, "kind": "cell", "components": [{"names": ["a"], "digest": "d", "frames": [frame]}]}
    raw = msgspec.msgpack.encode([1, body])
    entry = records.decode(raw, LogEntry)
    assert (entry.n, entry.table, entry.components[0].names) == (3, None, ("a",))


def test_a_table_that_was_not_read_is_never_folded() -> None:
    record, _ = tables.put_outside(LogEntry(n=1, kind="cell", components=(component("a", "1"),)), ())
    with pytest.raises(ValueError, match="was not read"):
        fold(Checkpoint(upto=0), [record])


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"\xff" * len(d), lambda d: b""])
def test_bytes_that_are_no_table_are_refused(damage: object) -> None:
    table, blobs = tables.encode(Contents((component("a", "1"),), ("b",)))
    (data,) = blobs.values()
    assert tables.decode(table, data) == Contents((component("a", "1"),), ("b",))
    with pytest.raises(TableError):
        tables.decode(table, damage(data))  # type: ignore[operator]


def test_a_long_table_is_several_blobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOB_CHUNK", 100)
    contents = Contents(tuple(component([f"v{i}"], "d", bytes(50)) for i in range(20)))
    table, blobs = tables.encode(contents)
    assert len(blobs) > 5
    assert tables.decode(table, b"".join(blobs[digest] for digest in table.blobs)) == contents


def test_the_narrowed_part_of_a_group_keeps_its_blobs() -> None:
    frame = Frame(size=1, blobs=("f" * 64,))
    shelf = Shelf()
    state = fold(
        None, [LogEntry(n=0, kind="cell", components=(Component(names=("a", "b"), digest="", frames=(frame,)),))]
    )
    state = fold(shelf.push(state, 0), [LogEntry(n=1, kind="cell", components=(component("a", "2"),))])
    naming = [tables.naming(shelf.read(table)) for table in state.tables]
    assert "f" * 64 in tables.blobs_needed(state, naming)
    state = fold(state, [LogEntry(n=2, kind="cell", deleted=("b",))])
    assert "f" * 64 not in tables.blobs_needed(state, naming)
    assert replace(state, upto=0).gone == ("b",)
