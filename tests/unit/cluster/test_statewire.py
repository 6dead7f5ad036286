"""Entries from a replica, which runs user code, are checked; and come back from the wire as they were."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from test_fold import logs

from nbos_cluster.records import Checkpoint, Component, Effects, Frame, LogEntry
from nbos_cluster.statelog import entry_from_wire, entry_to_wire, fold, state_to_wire
from nbos_cluster.statewire import EntryError, any_entry_from_wire

HASH = "ab" * 32
MARK = "0f" * 8


def message(**changes: Any) -> dict[str, Any]:
    frames = [{"size": 3, "at": 0}, {"size": 2, "at": 3}, {"size": 7, "blobs": [HASH], "marks": MARK}]
    return {
        "n": 4,
        "kind": "cell",
        "status": "ok",
        "execution_count": 3,
        "source": "x = 1",
        "components": [{"names": ["x", "y"], "digest": "d", "frames": frames}],
        "deleted": ["z"],
        "lost": {"s": "a socket"},
        "effects": {"cwd": "/w", "environ": {"A": None}, "sys_path": ["/p"], "packages": {"numpy": "2"}},
        **changes,
    }


def test_an_entry_is_read() -> None:
    entry = entry_from_wire(message(), b"abcde")
    frames = (Frame(size=3, data=b"abc"), Frame(size=2, data=b"de"), Frame(size=7, blobs=(HASH,), marks=b"\x0f" * 8))
    assert entry == LogEntry(
        n=4,
        kind="cell",
        execution_count=3,
        source="x = 1",
        components=(Component(names=("x", "y"), digest="d", frames=frames),),
        deleted=("z",),
        lost={"s": "a socket"},
        effects=Effects(cwd="/w", environ={"A": None}, sys_path=("/p",), packages={"numpy": "2"}),
    )


def test_what_only_the_daemon_may_say_is_not_read() -> None:
    entry = entry_from_wire(message(token=99, replica=2, incarnation=7, at=1.0), b"abcde")
    assert (entry.token, entry.replica, entry.incarnation, entry.at) == (0, -1, 1, 0.0)


def test_little_is_needed() -> None:
    assert entry_from_wire({"n": 1, "kind": "sync"}, b"") == LogEntry(n=1, kind="sync")


def component(**changes: Any) -> dict[str, Any]:
    return {"components": [{"names": ["x"], "digest": "", "frames": [{"size": 1, "at": 0}], **changes}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 0},
        {"n": True},
        {"n": "4"},
        {"n": 10**13},
        {"kind": "origin"},
        {"kind": "reset"},
        {"kind": "abandoned"},
        {"kind": None},
        {"status": "fine"},
        {"execution_count": -1},
        {"source": 5},
        {"components": {}},
        {"components": [5]},
        component(names=[]),
        component(names="x"),
        component(names=["x", "x"]),
        component(names=[5]),
        component(names=["x" * 5000]),
        component(names=["\ud800"]),
        component(frames=[]),
        component(frames=[{"size": 6, "at": 0}]),
        component(frames=[{"size": 1, "at": 5}]),
        component(frames=[{"size": 1, "at": -1}]),
        component(frames=[{"size": -1, "at": 0}]),
        component(frames=[{"size": 1, "blobs": ["../../etc/passwd"]}]),
        component(frames=[{"size": 1, "blobs": [HASH.upper()]}]),
        component(frames=[{"size": 1, "blobs": []}]),
        component(frames=[{"size": 17 * 1024 * 1024, "blobs": [HASH]}]),
        component(frames=[{"size": 7, "blobs": [HASH], "marks": MARK + MARK}]),
        component(frames=[{"size": 7, "blobs": [HASH], "marks": MARK[1:]}]),
        component(frames=[{"size": 7, "blobs": [HASH], "marks": MARK.upper()}]),
        component(frames=[{"size": 7, "blobs": [HASH], "marks": 5}]),
        {"deleted": "z"},
        {"lost": {"x": 5}},
        {"effects": []},
        {"effects": {"environ": {"A": 5}}},
        {"effects": {"sys_path": "/p"}},
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(EntryError):
        entry_from_wire(message(**changes), b"abcde")


def test_a_source_that_is_no_text_does_not_cost_the_state() -> None:
    assert entry_from_wire(message(source="x = '\ud800'"), b"abcde").source == "x = '?'"


@given(logs())
def test_entries_come_back_as_they_were(entries: list[LogEntry]) -> None:
    for entry in entries:
        msg, payload = entry_to_wire(entry)
        assert any_entry_from_wire(json.loads(json.dumps(msg)), payload) == entry


@given(logs())
def test_a_state_holds_everything_a_replica_needs(entries: list[LogEntry]) -> None:
    state = fold(None, entries)
    msg, payload = state_to_wire(state)
    msg = json.loads(json.dumps(msg))
    again = any_entry_from_wire({**msg, "n": 1, "kind": "cell", "token": 0, "replica": -1}, payload)
    assert (again.components, again.lost, again.effects) == (state.components, state.lost, state.effects)
    history = tuple((count, source) for count, source in msg["history"])
    assert (msg["upto"], msg["execution_count"], history) == (
        state.upto,
        state.execution_count,
        state.history,
    )


def test_an_empty_state_travels() -> None:
    msg, payload = state_to_wire(Checkpoint(upto=0))
    assert (msg["components"], payload) == ([], b"")
