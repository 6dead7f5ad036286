"""What is too much for etcd reaches the other replicas: entries and states whose components stand in tables."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from nbos_cluster import bulk, statelog, tables, wire
from nbos_cluster.records import Checkpoint, LogEntry
from nbos_kernel import tables as opening
from nbos_kernel.lazy import BlobMissing
from nbos_kernel.lost import NotReplicatedError

from .pair import Pair, Side


class Log:
    """What the daemons make of a pair's entries: the log, and its tables among the pair's blobs."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.entries: list[LogEntry] = []
        self.state: Checkpoint | None = None

    def cell(self, code: str, limit: int = wire.ENTRY_LIMIT) -> LogEntry:
        """Run it on the executor; its entry as it stands in etcd."""
        message, payload = bulk.pack(self.pair.cell(code), self.pair.payload)
        assert sum(len(part) for part in wire.pack({"entry": message}, payload)[:1]) < wire.MAX_HEADER
        spill = statelog.spill(statelog.entry_from_wire(message, payload), self._lost(), limit)
        assert spill.fits or limit < wire.ENTRY_LIMIT
        assert spill.needs <= {*self.pair.blobs, *spill.blobs}
        self.pair.blobs.update(spill.blobs)
        self.entries.append(spill.record)
        return spill.record

    def fold(self, merged: int = 0) -> Checkpoint:
        """Everything into a checkpoint, and its components into a table."""
        state = statelog.fold(self.state, [self.opened(entry) for entry in self.entries])
        newest = state.tables[len(state.tables) - merged :]
        self.state, blobs = tables.push(state, [self._read(table) for table in newest])
        self.pair.blobs.update(blobs)
        self.entries = []
        return self.state

    def replica(self) -> Side:
        """A new one, that starts from the log."""
        side = Side(self.pair.blobs)
        if self.state is not None:
            message, payload = statelog.state_to_wire(self.state)
            _apply(side, {"type": "state", **message}, payload)
        for entry in self.entries:
            message, payload = statelog.entry_to_wire(entry)
            _apply(side, {"type": "entry", **message}, payload)
        return side

    def _lost(self) -> set[str]:
        return {name for entry in self.entries for name in entry.lost}

    def _read(self, table: Any) -> tables.Contents:
        return tables.decode(table, b"".join(self.pair.blobs[digest] for digest in table.blobs))

    def opened(self, entry: LogEntry) -> LogEntry:
        return entry if entry.table is None else tables.put_inside(entry, self._read(entry.table))


def _apply(side: Side, message: dict[str, Any], payload: bytes) -> None:
    side.replica.arrived(json.loads(json.dumps(message)), payload)
    asyncio.run(side.replica.catch_up(lambda n, lost: None))


@pytest.fixture
def log() -> Log:
    return Log(Pair())


def test_a_hundred_thousand_variables_of_one_cell_are_replicated_and_deleted_in_one(log: Log) -> None:
    entry = log.cell("globals().update({f'number_{i}': i for i in range(100_000)}); keep = [1]")
    assert log.pair.notices == []
    assert entry.table is not None
    assert statelog.size_of(entry) < 2000
    side = log.replica()
    assert side.eval("sum(globals()[f'number_{i}'] for i in range(100_000))") == sum(range(100_000))
    assert side.replica.lost == {}
    log.fold()
    log.cell("number_7 = 'changed'")
    assert statelog.size_of(log.entries[-1]) < 2000
    assert log.replica().eval("(number_6, number_7, keep)") == (6, "changed", [1])
    gone = log.cell("for i in range(100_000): del globals()[f'number_{i}']")
    assert gone.table is not None
    assert log.pair.notices == []
    side = log.replica()
    assert not [name for name in side.ns if name.startswith("number_")]
    assert side.eval("keep") == [1]
    log.fold(merged=1)
    assert not [name for name in log.replica().ns if name.startswith("number_")]


def test_a_replica_that_starts_from_tables_has_what_the_executor_has(log: Log) -> None:
    log.cell("import numpy as np; a = np.arange(100_000); b = [a, 1]; t = 'x'; u = {'k': a}")
    log.fold()
    log.cell("a[5] = -1; t = 'y'; v = 3")
    log.fold()
    log.cell("del v; w = [t]; u = 0")
    state = log.fold()
    assert len(state.tables) == 3
    for side in (log.replica(), _after(log, "w.append(b)")):
        assert side.eval("(int(a[5]), b[0] is a, t, u, w[0])") == (-1, True, "y", 0, "y")
        assert "v" not in side.ns
        assert side.replica.lost == {}


def _after(log: Log, code: str) -> Side:
    log.cell(code)
    return log.replica()


def test_many_chunks_of_one_variable_stand_in_a_table(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an array of hundreds of gigabytes has them."""
    monkeypatch.setattr("nbos_kernel.capture.buffers.CHUNK", 64)
    monkeypatch.setattr("nbos_kernel.capture.buffers.LONG", 1 << 40)
    entry = log.cell("import numpy as np; big = np.arange(60_000 * 8)")
    assert entry.table is not None
    assert max(len(frame.blobs) for c in log.opened(entry).components for frame in c.frames) == 60_000
    changed = log.cell("big[77] = -5")
    assert statelog.size_of(changed) < 2000
    side = log.replica()
    assert side.eval("int(big[77]), int(big[-1])") == (-5, 479_999)


def test_a_damaged_table_of_a_state_never_lets_an_older_value_pass(log: Log) -> None:
    log.cell("old = [1]; both = [1]; fine = [1]")
    log.fold()
    log.cell("both = [2]; new = [2]")
    state = log.fold()
    log.cell("fine = [3]")
    log.fold()
    del log.pair.blobs[state.tables[-1].blobs[0]]
    side = log.replica()
    assert side.eval("fine") == [3]
    for name in ("old", "both"):
        with pytest.raises(NotReplicatedError, match="cannot be read"):
            exec(name, side.ns)
    (unknown,) = [name for name in side.replica.lost if name not in side.replica.capture.digests and "table" in name]
    assert "variables" in unknown
    assert "new" not in side.ns


def test_a_damaged_table_of_an_entry_never_lets_an_older_value_pass(log: Log) -> None:
    log.cell("old = [1]")
    entry = log.cell("old = [2]; new = [2]", limit=0)
    log.cell("last = [3]")
    assert entry.table is not None
    log.pair.blobs[entry.table.blobs[0]] = b"\0" * entry.table.size
    side = log.replica()
    assert side.eval("last") == [3]
    with pytest.raises(NotReplicatedError, match="cannot be read"):
        exec("old", side.ns)


def test_a_table_whose_store_is_away_is_waited_for(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "AGAIN", 0.0)
    log.cell("a = [1]")
    state = log.fold()
    asked = 0

    class Away(Exception):
        code = "away"

    async def read(hashes: Any, target: memoryview, chunk: int) -> int:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise BlobMissing("away") from Away()
        return await side._read(hashes, target, chunk)

    side = Side(log.pair.blobs)
    side.replica._read = read
    message, payload = statelog.state_to_wire(state)
    _apply(side, {"type": "state", **message}, payload)
    assert side.eval("a") == [1]
    assert asked == 3
