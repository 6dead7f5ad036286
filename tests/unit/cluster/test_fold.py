"""Folding the log: the same state, however it is cut; short history; large values out to blobs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbos_cluster import statelog
from nbos_cluster.content import address
from nbos_cluster.records import Checkpoint, Component, Effects, Frame, LogEntry
from nbos_cluster.statelog import blobs_of, fold, plan_fold, size_of, spill

NAMES = ["a", "b", "c", "d", "e"]
names = st.sampled_from(NAMES)


def component(group: Sequence[str], digest: str, data: bytes = b"x") -> Component:
    return Component(names=tuple(group), digest=digest, frames=(Frame(size=len(data), data=data),))


@st.composite
def contents(draw: st.DrawFn) -> dict[str, object]:
    """Disjoint groups of names, each written, deleted or lost."""
    order = draw(st.permutations(NAMES))[: draw(st.integers(0, len(NAMES)))]
    fields: dict[str, list[str]] = {"one": [], "two": [], "deleted": [], "lost": []}
    for name in order:
        fields[draw(st.sampled_from(list(fields)))].append(name)
    groups = [fields[key] for key in ("one", "two") if fields[key]]
    return {
        "components": tuple(component(sorted(g), draw(st.text("0123", max_size=3))) for g in groups),
        "deleted": tuple(fields["deleted"]),
        "lost": dict.fromkeys(fields["lost"], draw(st.sampled_from(["a lock", "a socket"]))),
    }


effects = st.builds(
    Effects,
    cwd=st.none() | st.sampled_from(["/a", "/b"]),
    environ=st.dictionaries(names, st.none() | st.text("xy", max_size=2), max_size=2),
    sys_path=st.none() | st.lists(names, max_size=2).map(tuple),
    packages=st.dictionaries(names, st.sampled_from(["1", "2"]), max_size=2),
)
kinds = st.sampled_from(["cell", "cell", "cell", "sync", "abandoned", "reset"])


@st.composite
def logs(draw: st.DrawFn) -> list[LogEntry]:
    entries, incarnation = [LogEntry(n=0, kind="origin")], 1
    for n in range(1, draw(st.integers(1, 10)) + 1):
        kind = draw(kinds)
        incarnation += kind == "reset"
        what = draw(contents()) if kind in ("cell", "sync") else {}
        entries.append(
            LogEntry(
                n=n,
                kind=kind,
                incarnation=incarnation,
                execution_count=draw(st.integers(0, 9)) if what else 0,
                source=draw(st.text("ab\n", max_size=5)),
                effects=draw(effects) if what else Effects(),
                **what,
            )
        )
    return entries


def values(state: Checkpoint) -> dict[str, str]:
    return {name: c.digest for c in state.components for name in c.names}


def model(entries: Sequence[LogEntry]) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """The namespace, what is lost and the packages, as a replica that applies entry by entry would have them."""
    space: dict[str, str] = {}
    lost: dict[str, str] = {}
    packages: dict[str, str] = {}
    for entry in entries:
        if entry.kind == "reset":
            space, lost = {}, {}
        for name in entry.deleted:
            space.pop(name, None)
            lost.pop(name, None)
        for c in entry.components:
            for name in c.names:
                space[name] = c.digest
                lost.pop(name, None)
        for name, why in entry.lost.items():
            space.pop(name, None)
            lost[name] = why
        packages |= entry.effects.packages
    return space, lost, packages


@given(logs(), st.data())
def test_a_folded_prefix_and_the_rest_give_the_same(entries: list[LogEntry], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(entries)))
    prefix = fold(None, entries[:cut])
    assert fold(prefix, entries[cut:]) == fold(None, entries)


@given(logs())
def test_a_fold_is_what_applying_entry_by_entry_gives(entries: list[LogEntry]) -> None:
    state = fold(None, entries)
    space, lost, packages = model(entries)
    assert (values(state), state.lost, state.effects.packages) == (space, lost, packages)
    every = [name for c in state.components for name in c.names]
    assert len(set(every)) == len(every), "a name stands once"
    assert state.upto == entries[-1].n


def test_a_gap_is_refused() -> None:
    with pytest.raises(ValueError, match="does not follow"):
        fold(None, [LogEntry(n=0, kind="origin"), LogEntry(n=2, kind="cell")])


def test_a_removed_variable_of_the_environment_stays_removed() -> None:
    first = LogEntry(n=0, kind="cell", effects=Effects(environ={"A": "1", "B": "2"}))
    second = LogEntry(n=1, kind="cell", effects=Effects(environ={"A": None}))
    assert fold(None, [first, second]).effects.environ == {"A": None, "B": "2"}


def test_a_reset_keeps_packages_only() -> None:
    full = LogEntry(
        n=0,
        kind="cell",
        execution_count=7,
        source="x",
        components=(component("a", "1"),),
        lost={"l": "why"},
        effects=Effects(cwd="/x", packages={"numpy": "2"}),
    )
    state = fold(None, [full, LogEntry(n=1, kind="reset", incarnation=2)])
    assert state == Checkpoint(upto=1, incarnation=2, effects=Effects(packages={"numpy": "2"}))


def test_the_history_is_bounded_in_inputs_and_bytes() -> None:
    many = [LogEntry(n=i, kind="cell", execution_count=i, source=f"x{i}") for i in range(700)]
    state = fold(None, many)
    assert len(state.history) == 500
    assert state.history[-1] == (699, "x699")
    large = [LogEntry(n=i, kind="cell", execution_count=i, source="é" * 20_000) for i in range(10)]
    assert [count for count, _ in fold(None, large).history] == [7, 8, 9]


def test_abandoned_executions_change_nothing() -> None:
    entries = [
        LogEntry(n=0, kind="cell", execution_count=3, source="a", components=(component("a", "1"),)),
        LogEntry(n=1, kind="abandoned", source="os.kill(…)", reason="its process died"),
    ]
    one, both = fold(None, entries[:1]), fold(None, entries)
    assert (both.components, both.execution_count, both.history) == (
        one.components,
        one.execution_count,
        one.history,
    )


def test_what_is_too_much_for_an_entry_goes_into_a_table() -> None:
    sizes = {"a": 400_000, "b": 300_000, "c": 10_000}
    blob = Component(names=("d",), digest="", frames=(Frame(size=1, blobs=("f" * 64,)),))
    parts = (*(component(k, k, k.encode() * v) for k, v in sizes.items()), blob)
    moved = spill(LogEntry(n=1, kind="cell", components=parts, deleted=("x",)), lost=["a", "z"])
    assert moved.fits
    assert statelog.size_of(moved.record) < 1000
    assert moved.record.cured == ("a",)
    assert {address(data) for data in moved.blobs.values()} == set(moved.blobs) == blobs_of(moved.record)
    assert moved.needs == {"f" * 64, *moved.blobs}


def test_what_fits_stays() -> None:
    entry = LogEntry(n=1, kind="cell", components=(component("a", "1", b"x" * 1000),))
    assert spill(entry) == statelog.Spill(entry, {}, frozenset(), True)


def test_a_checkpoint_gives_up_inputs_before_state() -> None:
    history = tuple((i, "x" * 100) for i in range(100))
    state = Checkpoint(upto=5, components=(component("a", "1"),), history=history)
    short = statelog.shorten(state, limit=2000)
    assert short is not None
    assert size_of(short) <= 2000
    assert short.components == state.components
    assert short.history[-1] == history[-1]
    assert statelog.shorten(state, limit=10) is None


def test_too_many_lost_names_say_that_they_do_not_fit() -> None:
    entry = LogEntry(n=1, kind="cell", lost={f"name_{i}": "why" for i in range(1000)})
    assert not spill(entry, limit=1000).fits


def test_a_short_log_is_not_folded() -> None:
    assert plan_fold(dict.fromkeys(range(64), 10), 63) is None


def test_the_newest_entry_is_never_folded() -> None:
    assert plan_fold(dict.fromkeys(range(65), 10), 64) == 63
    assert plan_fold({1: 10, 2: 300_000}, 2) == 1
    assert plan_fold({2: 300_000}, 2) is None


def test_a_fold_waits_for_the_slowest_replica_but_not_for_ever() -> None:
    sizes = dict.fromkeys(range(100), 10)
    assert plan_fold(sizes, 99, [99, 40, -1]) == 40
    assert plan_fold(dict.fromkeys(range(100, 200), 10), 199, [50]) is None
    assert plan_fold(dict.fromkeys(range(300), 10), 299, [40]) == 298


@given(st.dictionaries(st.integers(0, 99), st.integers(0, 100_000), min_size=1), st.lists(st.integers(-1, 99)))
def test_a_fold_always_leaves_the_newest(sizes: dict[int, int], applied: list[int]) -> None:
    upto = plan_fold(sizes, max(sizes), applied)
    assert upto is None or upto < max(sizes)
