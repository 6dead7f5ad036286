"""The local copy of a kernel's records: what it says after snapshots, changes, compaction and nonsense."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakestore import FakeEtcd

from nbos_cluster import election, keys, membership, records, statelog
from nbos_cluster.kernelview import KernelView, KernelViews
from nbos_cluster.kv import Txn, op_delete, op_put
from nbos_cluster.records import ClaimRecord, Component, Epoch, Frame, KernelSpec, LogEntry, ReplicaRecord

K = "kernel"


def spec(kernel: str = K) -> KernelSpec:
    return KernelSpec(
        kernel=kernel,
        owner="ada",
        replicas=1,
        placement={"0": "h"},
        key="k",
        curve_publickey="p",
        curve_secretkey="s",
    )


class World:
    """A store with one kernel, and a view of it."""

    def __init__(self) -> None:
        self.store = FakeEtcd()
        self.lease = self.store.grant()
        self.store.commit(membership.create(spec()))
        self.view = KernelView(K)
        self.read()

    def read(self) -> object:
        return self.view.apply(self.store.snapshot(keys.kernel(K)))

    def follow(self) -> Iterator[object]:
        for changes in self.store.since(self.view.revision):
            yield self.view.apply(changes)

    def claim(self, n: int, replica: int = 0) -> int:
        mine = ClaimRecord(n=n, replica=replica, host="h")
        txn = election.claim(K, n, epoch=Epoch(epoch=1, incarnation=1), claim=mine, lease=self.lease)
        outcome = election.classify(n, self.store.commit(txn))
        assert isinstance(outcome, election.Won), outcome
        return outcome.token

    def run(self, n: int, replica: int = 0, source: str = "") -> LogEntry:
        token = self.claim(n, replica)
        frame = Frame(size=1, data=b"x")
        entry = LogEntry(
            n=n,
            kind="cell",
            token=token,
            replica=replica,
            execution_count=n,
            source=source or f"x{n} = 1",
            components=(Component(names=(f"x{n}",), digest="d", frames=(frame,)),),
        )
        assert self.store.commit(election.append(K, entry, token)).succeeded
        return entry

    def fold(self, upto: int) -> None:
        view = KernelView(K)
        view.apply(self.store.snapshot(keys.kernel(K)))
        first = view.checkpoint.upto + 1 if view.checkpoint else 0
        state = statelog.fold(view.checkpoint, view.entries(first, upto))
        assert self.store.commit(statelog.fold_txn(K, view.checkpoint_rev, state, upto)).succeeded


@pytest.fixture
def world() -> World:
    return World()


def test_a_new_kernel_has_its_origin_only(world: World) -> None:
    view = world.view
    assert (view.last, view.executor, view.epoch) == (0, -1, Epoch(epoch=1, incarnation=1))
    assert view.spec == spec()
    assert list(view.log) == [0]


def test_an_execution_passes_through_the_view(world: World) -> None:
    entry = world.run(1, replica=0)
    claimed, decided = world.follow()
    assert (claimed.claims, claimed.entries) == ({1}, [])
    assert (decided.claims, decided.entries) == ({1}, [entry])
    assert (world.view.last_committed, world.view.executor, world.view.claim_of(1)) == (1, 0, None)


def test_the_holder_of_the_open_execution_is_the_executor(world: World) -> None:
    world.run(1, replica=0)
    token = world.claim(2, replica=1)
    world.read()
    held = world.view.claim_of(2)
    assert held is not None
    assert (held.token, held.lease, world.view.executor) == (token, world.lease, 1)
    world.store.expire(world.lease)
    list(world.follow())
    assert world.view.executor == 0


def test_what_is_read_anew_is_told_once(world: World) -> None:
    world.run(1)
    assert world.read()
    assert not world.read()


def test_a_replica_catches_up_from_the_log_while_it_is_there(world: World) -> None:
    entries = [world.run(n) for n in (1, 2, 3)]
    world.read()
    assert world.view.catch_up(1) == (None, entries[1:])
    assert world.view.catch_up(3) == (None, [])
    state, rest = world.view.catch_up(-1)
    assert (state, [entry.n for entry in rest]) == (None, [0, 1, 2, 3])


def test_a_replica_that_is_far_behind_gets_the_state(world: World) -> None:
    entries = [world.run(n) for n in (1, 2, 3)]
    world.fold(2)
    world.read()
    state, rest = world.view.catch_up(0)
    assert state == world.view.checkpoint
    assert rest == entries[2:]
    assert list(world.view.log) == [3]
    assert world.view.catch_up(2) == (None, entries[2:])


def test_what_came_before_a_reset_is_not_sent(world: World) -> None:
    world.run(1)
    world.fold(0)
    world.read()
    assert world.store.commit(membership.restart(world.view)).succeeded
    world.read()
    state, rest = world.view.catch_up(-1)
    assert state is not None
    assert (state.upto, state.components, state.incarnation, rest) == (2, (), 2, [])
    assert world.view.executor == -1
    assert [entry.kind for entry in world.view.catch_up(1)[1]] == ["reset"]


def test_a_deleted_kernel_is_gone(world: World) -> None:
    world.run(1)
    world.store.commit(membership.delete(K))
    *_, last = world.follow()
    assert last.gone
    assert (world.view.spec, world.view.last, world.view.log) == (None, -1, {})


def test_a_kernel_made_again_under_the_same_id_is_another(world: World) -> None:
    world.run(1)
    world.read()
    world.store.commit(membership.delete(K))
    world.store.commit(membership.create(spec()))
    delta = world.read()
    assert delta.gone
    assert [entry.kind for entry in delta.entries] == ["origin"]
    assert world.view.last == 0


def test_a_record_of_another_version_does_not_hold_up_the_others(world: World) -> None:
    bad = op_put(keys.replica(K, 0), b"\x92\x09\x80")
    good = op_put(keys.replica(K, 1), records.encode(ReplicaRecord(index=1, host="h", state="ready")))
    world.store.commit(Txn([], [bad, good]))
    world.read()
    assert list(world.view.replicas) == [1]
    assert "version 9" in world.view.errors[keys.replica(K, 0)]
    world.store.commit(Txn([], [op_delete(keys.replica(K, 0))]))
    list(world.follow())
    assert world.view.errors == {}


@pytest.mark.parametrize("key", ["replicas/x", "claims/1x", "log/", "other", "other/1"])
def test_a_key_that_is_no_record_does_not_stop_the_view(world: World, key: str) -> None:
    world.store.commit(Txn([], [op_put(keys.kernel(K) + key, b"?")]))
    late = KernelView(K)
    list(world.follow())
    world.read()
    assert world.view.last == 0
    world.store.commit(Txn([], [op_delete(keys.kernel(K) + key)]))
    list(world.follow())
    assert world.view.errors == {}
    late.apply(world.store.history[-1])
    assert late.errors == {}


def test_many_kernels_share_one_watch() -> None:
    store, views = FakeEtcd(), KernelViews()
    store.commit(membership.create(spec("one")))
    assert set(views.apply(store.snapshot(keys.KERNELS))) == {"one"}
    before = store.revision
    store.commit(membership.create(spec("two")))
    store.commit(membership.delete("one"))
    found = [views.apply(changes) for changes in store.since(before)]
    assert [set(deltas) for deltas in found] == [{"two"}, {"one"}]
    assert found[1]["one"].gone
    assert set(views.views) == {"two"}
    assert not views.apply(store.snapshot(keys.KERNELS))


def test_a_kernel_that_vanished_while_nobody_looked_is_told() -> None:
    store, views = FakeEtcd(), KernelViews()
    store.commit(membership.create(spec("one")))
    views.apply(store.snapshot(keys.KERNELS))
    store.commit(membership.delete("one"))
    assert views.apply(store.snapshot(keys.KERNELS))["one"].gone
    assert views.views == {}


def test_an_event_of_one_kernel_costs_nothing_for_the_others() -> None:
    class Untouchable(KernelView):
        @property
        def empty(self) -> bool:
            raise AssertionError("a kernel that did not change was looked at")

        def _keys(self) -> list[str]:
            raise AssertionError("a kernel that did not change was looked at")

    store, views = FakeEtcd(), KernelViews()
    store.commit(membership.create(spec("busy")))
    for changes in store.since(0):
        views.apply(changes)
    views.views["quiet"] = Untouchable("quiet")
    before = store.revision
    store.commit(membership.delete("busy"))
    for changes in store.since(before):
        assert views.apply(changes)["busy"].gone
    assert list(views.views) == ["quiet"]


def test_a_kernel_made_again_under_its_id_is_not_deleted_for_the_old_one() -> None:
    store = FakeEtcd()
    store.commit(membership.create(spec()))
    old = KernelView(K)
    old.apply(store.snapshot(keys.kernel(K)))
    store.commit(membership.delete(K, old.born))
    store.commit(membership.create(spec()))
    assert not store.commit(membership.delete(K, old.born)).succeeded
    assert keys.spec(K) in store.data
