"""Cells that change more than an entry can name: nothing of it is dropped without a name and a reason."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbos_cluster import statelog, wire
from nbos_cluster.statewire import MAX_TEXT
from nbos_kernel import oversize
from nbos_kernel.capture import names
from nbos_kernel.lost import NotReplicatedError

from .pair import Pair


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of a size that tests can fill."""
    monkeypatch.setattr(oversize, "COMPONENT_BYTES", 192 * 1024)
    monkeypatch.setattr(oversize, "DELETED_BYTES", 64 * 1024)


def taken(pair: Pair, entry: dict[str, Any]) -> None:
    """The daemon takes this entry: it passes its checks, and fits once its values are blobs."""
    record = statelog.entry_from_wire(entry, pair.payload)
    assert statelog.spill(record).fits
    assert statelog.size_of(statelog.spill(record).record) <= wire.ENTRY_LIMIT


def test_thousands_of_variables_fit_one_entry(pair: Pair) -> None:
    taken(pair, pair.cell("globals().update({f'v{i}': i for i in range(10_000)})"))
    taken(pair, pair.cell("globals().update({f'l{i}': [i] for i in range(3000)})"))
    assert pair.notices == []
    assert pair.on_standby("sum(globals()[f'v{i}'] for i in range(10_000))") == sum(range(10_000))
    assert pair.on_standby("l2999") == [2999]
    changed = pair.cell("l5.append(1); v7 = 8")
    taken(pair, changed)
    assert sum(len(c["names"]) for c in changed["components"]) < 1000
    assert pair.on_standby("(l5, v7)") == ([5, 1], 8)
    pair.switch()
    assert sum(len(c["names"]) for c in pair.cell("w = 1")["components"]) <= 10_001
    assert pair.on_standby("w") == 1


@pytest.mark.usefixtures("little_room")
def test_names_without_room_are_lost_by_name_and_come_back(pair: Pair) -> None:
    entry = pair.cell("globals().update({f'variable_with_a_name_{i:06}': i for i in range(30_000)})")
    taken(pair, entry)
    held = [name for name in pair.executor.ns if name.startswith("variable_with") and name in pair.standby.ns]
    assert 1000 < len(held) < 30_000
    assert f"and {30_000 - len(held) - oversize.SHOWN} more" in pair.notices[-1]
    assert "more; `%nbos status`" in entry["lost"][oversize.MORE]
    every = pair.standby.replica.lost
    gone = [name for name in pair.executor.ns if name.startswith("variable_with") and name not in held]
    assert all(every[name] == oversize.NO_ROOM for name in gone)
    with pytest.raises(NotReplicatedError):
        exec(gone[-1], pair.standby.ns)
    for _ in range(10):
        taken(pair, pair.cell("pass"))
        if oversize.MORE not in pair.standby.replica.lost:
            break
    assert all(name in pair.standby.ns for name in gone)
    assert pair.standby.replica.lost == pair.executor.replica.lost == {}


def test_lost_names_without_room_are_known_to_a_replica_that_starts_from_the_log(pair: Pair) -> None:
    taken(pair, pair.cell("globals().update({f'g{i}': (x for x in ()) for i in range(3000)}); a = 1"))
    records = [statelog.entry_from_wire(entry, pair.payload) for entry in pair.entries]
    state, payload = statelog.state_to_wire(statelog.fold(None, records))
    fresh = Pair().standby
    fresh.blobs.update(pair.blobs)
    fresh.replica.arrived({"type": "state", **state}, payload)
    asyncio.run(fresh.replica.catch_up(lambda n, lost: None))
    assert {f"g{i}" for i in range(3000)} <= set(fresh.replica.lost)
    assert fresh.ns["a"] == 1
    assert len(oversize.summary(fresh.replica.lost)) < 3000
    taken(pair, pair.cell("for i in range(3000): del globals()[f'g{i}']"))
    assert pair.standby.replica.lost == {}


@pytest.mark.usefixtures("little_room")
def test_more_deletions_than_fit_follow_with_the_next_cells(pair: Pair) -> None:
    pair.cell("globals().update({f'variable_{i:06}': i for i in range(10_000)})")
    entry = pair.cell("for i in range(10_000): del globals()[f'variable_{i:06}']")
    taken(pair, entry)
    assert "deleted variables" in pair.notices[0]
    for _ in range(4):
        pair.cell("pass")
    assert not [name for name in pair.standby.ns if name.startswith("variable_")]


def test_names_that_the_log_cannot_hold_are_lost_with_the_reason(pair: Pair) -> None:
    entry = pair.cell("globals()['n' * 5000] = 1; globals()['\\ud800'] = 2; fine = 3")
    taken(pair, entry)
    assert len(entry["lost"]) == len(pair.notices) == 2
    assert pair.on_standby("fine") == 3
    with pytest.raises(NotReplicatedError, match="5000 characters"):
        exec("n" * 5000, pair.standby.ns)
    assert pair.cell("pass")["lost"] == {}
    assert len(pair.cell("del globals()['n' * 5000], globals()['\\ud800']")["deleted"]) == 2
    assert pair.standby.replica.lost == {}
    assert names.NAME_LIMIT == MAX_TEXT


def test_a_long_cell_is_cut_in_the_history_and_says_so(pair: Pair) -> None:
    text = oversize.source("x = 1\n" * 20_000)
    assert len(text) < 30_000
    assert text.endswith("120000 characters here")


@pytest.mark.usefixtures("little_room")
def test_objects_without_room_are_examined_again_though_no_cell_touches_them(pair: Pair) -> None:
    pair.cell("globals().update({f'object_with_a_name_{i:06}': [i] for i in range(9_000)})")
    assert oversize.NO_ROOM in pair.standby.replica.lost.values()
    pair.cell("pass")
    pair.cell("pass")
    assert pair.standby.replica.lost == pair.executor.replica.lost == {}
    assert pair.on_standby("object_with_a_name_008999") == [8999]
