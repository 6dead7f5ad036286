"""Records come back as they were; another version or kind is refused with words."""

from __future__ import annotations

from typing import get_args, get_origin

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbos_cluster import keys, records
from nbos_cluster.records import (
    Checkpoint,
    ClaimRecord,
    DeviceShare,
    Epoch,
    Frame,
    GrantRecord,
    HostRecord,
    KernelSpec,
    LogEntry,
    QueueTicket,
    Record,
    RecordError,
    ReplicaRecord,
    Versioned,
)

KINDS: list[type[Record]] = [
    HostRecord,
    GrantRecord,
    KernelSpec,
    Epoch,
    ReplicaRecord,
    ClaimRecord,
    LogEntry,
    Checkpoint,
    QueueTicket,
]
numbers = st.integers(-(2**62), 2**62)
LEAVES: dict[object, st.SearchStrategy[object]] = {
    int: numbers,
    dict[str, int]: st.dictionaries(st.text(max_size=9), numbers, max_size=4),
    dict[str, tuple[int, int]]: st.dictionaries(st.text(max_size=9), st.tuples(numbers, numbers), max_size=4),
    float: st.floats(allow_nan=False),
    tuple[int, ...]: st.lists(numbers, max_size=4).map(tuple),
    tuple[tuple[int, str], ...]: st.lists(st.tuples(numbers, st.text(max_size=9)), max_size=4).map(tuple),
}


def values(kind: object) -> st.SearchStrategy[object]:
    """Any value of a field's type."""
    if kind in LEAVES:
        return LEAVES[kind]
    if isinstance(kind, type) and issubclass(kind, Record):
        return any_record(kind)
    inner = get_args(kind)
    if get_origin(kind) is tuple and issubclass(inner[0], Record):
        return st.lists(any_record(inner[0]), max_size=3).map(tuple)
    if inner and isinstance(inner[0], type) and issubclass(inner[0], Record):
        return st.none() | any_record(inner[0])
    return st.from_type(kind)  # type: ignore[arg-type]


def any_record(kind: type[Record]) -> st.SearchStrategy[Record]:
    return st.builds(kind, **{field.name: values(field.type) for field in msgspec.structs.fields(kind)})


@settings(deadline=None, max_examples=40)
@given(st.data())
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_record_comes_back_as_it_was(kind: type[Record], data: st.DataObject) -> None:
    record = data.draw(any_record(kind))
    assert records.decode(records.encode(record), kind) == record


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_record_of_another_kind_is_refused(kind: type[Record]) -> None:
    other = Epoch(epoch=1, incarnation=1) if kind is not Epoch else ClaimRecord(n=1, replica=0, host="h")
    with pytest.raises(RecordError, match=kind.__name__):
        records.decode(records.encode(other), kind)


def test_another_version_says_what_to_do() -> None:
    body = msgspec.Raw(msgspec.msgpack.encode(Epoch(epoch=1, incarnation=1)))
    newer = msgspec.msgpack.encode(Versioned(records.VERSION_TABLES + 1, body))
    with pytest.raises(RecordError, match="the same NBOS version on every host"):
        records.decode(newer, Epoch)


@pytest.mark.parametrize("raw", [b"", b"\xff", b"not a record", msgspec.msgpack.encode([1])])
def test_bytes_that_are_no_record_are_refused(raw: bytes) -> None:
    with pytest.raises(RecordError):
        records.decode(raw, Epoch)


def test_frames_keep_the_difference_between_empty_and_absent() -> None:
    share = DeviceShare(uuid="u", index=0, model="m", tpcs=(1, 2), memory=3, whole=False, kind="simulated")
    assert share.tpcs == (1, 2)
    entry = LogEntry(n=1, kind="cell", components=())
    assert records.decode(records.encode(entry), LogEntry).components == ()
    assert Frame(size=0, data=b"").data == b""


@pytest.mark.parametrize("bad", ["", "../x", "a/b", "-a", ".", "é", "a" * 129, "a b", "a\n"])
def test_identifiers_cannot_leave_their_place(bad: str) -> None:
    with pytest.raises(ValueError, match="may hold only"):
        keys.kernel(bad)


def test_keys_sort_as_executions_do() -> None:
    assert sorted(keys.claim("k", n) for n in (10, 9, 100)) == [keys.claim("k", n) for n in (9, 10, 100)]
