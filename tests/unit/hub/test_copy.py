"""The gateway's copy of the cluster, and what it decides about lost hosts."""

from msgspec.structs import replace

from nbos_cluster import keys
from nbos_cluster.kv import KV, Changes, Event, Snapshot
from nbos_cluster.records import LogEntry, Move, ReplicaRecord
from nbos_spawner.gateway.copy import ClusterCopy
from nbos_spawner.gateway.moves import to_leave
from nbos_spawner.gateway.repair import being_made, kernels_to_repair, lost_hosts

from .cluster_data import filled, gone, grant, host, put, replica, spec


def test_a_host_that_goes_is_absent_since_then() -> None:
    copy = filled(spec("k"))
    copy.apply_hosts(gone(keys.host("a")), now=5.0)
    assert copy.absent == {"a": 5.0}


def test_a_host_is_lost_only_after_the_grace() -> None:
    copy = filled(spec("k"))
    copy.apply_hosts(gone(keys.host("a")), now=5.0)
    assert not lost_hosts(copy, 14.9, grace=10.0)
    assert lost_hosts(copy, 15.0, grace=10.0) == {"a"}


def test_a_host_that_comes_back_is_not_lost() -> None:
    copy = filled(spec("k"))
    copy.apply_hosts(gone(keys.host("a")), now=5.0)
    copy.apply_hosts(put(keys.host("a"), host("a"), 3), now=6.0)
    assert not copy.absent


def test_a_fresh_snapshot_notices_hosts_that_went_meanwhile() -> None:
    copy = filled(spec("k"))
    copy.apply_hosts(Snapshot([], 9), now=7.0)
    assert copy.absent == {"a": 7.0, "b": 7.0, "c": 7.0}


def test_a_host_that_was_never_seen_counts_from_when_its_kernel_is() -> None:
    copy = filled(spec("k", "ada", "a", "z"))
    assert copy.absent == {"z": 0.0}


def test_an_absent_host_without_kernels_is_forgotten() -> None:
    copy = filled(spec("k", "ada", "a"))
    copy.apply_hosts(gone(keys.host("c")), now=1.0)
    copy.forget_absent()
    assert not copy.absent


def test_kernels_that_lost_most_are_placed_anew_first() -> None:
    copy = filled(spec("one", "ada", "a", "b"), spec("two", "ada", "a", "c"), spec("none", "ada", "b"))
    assert kernels_to_repair(copy, {"a", "c"}) == ["two", "one"]


def test_replicas_leave_a_draining_host_one_of_a_kernel_at_a_time() -> None:
    copy = filled(spec("k", "ada", "a", "b", "a"), spec("other", "ada", "b"))
    copy.apply_hosts(put(keys.host("a"), host("a", draining=True), 2), now=1.0)
    assert to_leave(copy) == [("k", "0")]
    moves = Move(source=0, target=3, from_host="a", to_host="c")
    copy.apply_kernels(put(keys.spec("k"), replace(spec("k", "ada", "a", "b", "a"), move=moves), 3), now=1.0)
    assert to_leave(copy) == []


def test_of_two_draining_hosts_the_emptier_one_is_left_first() -> None:
    copy = filled(spec("k1", "ada", "a"), spec("k2", "ada", "a"), spec("k3", "ada", "b"))
    for name in "ab":
        copy.apply_hosts(put(keys.host(name), host(name, draining=True), 2), now=1.0)
    assert to_leave(copy) == [("k3", "0"), ("k1", "0"), ("k2", "0")]


def test_replicas_that_are_not_ready_yet_count_as_being_made_unless_they_failed_or_move() -> None:
    copy = filled(spec("k", "ada", "a", "b", "c"), spec("fresh", "ada", "a"))
    assert being_made(copy) == set()  # nobody has used them yet
    copy.apply_kernels(put(keys.log_entry("k", 1), LogEntry(n=1, kind="cell", replica=0), 2), now=0.0)
    copy.apply_kernels(put(keys.replica("k", 0), replica(0, "a"), 3), now=0.0)
    assert being_made(copy) == {("k", "1", "b"), ("k", "2", "c")}
    failed = ReplicaRecord(index=2, host="c", state="failed")
    copy.apply_kernels(put(keys.replica("k", 2), failed, 4), now=0.0)
    assert being_made(copy) == {("k", "1", "b")}
    copy.apply_hosts(gone(keys.host("b")), now=0.0)
    assert being_made(copy) == set()


def test_grants_come_and_go_with_their_keys() -> None:
    copy = filled()
    copy.apply_hosts(put(keys.grant("a", "g1"), grant("a", "ada", "k")), now=0.0)
    assert len(copy.grants["a"]) == 1
    copy.apply_hosts(gone(keys.grant("a", "g1")), now=0.0)
    assert not copy.grants["a"]
    assert "a" in copy.hosts


def test_an_unreadable_record_hides_only_itself() -> None:
    copy = ClusterCopy()
    copy.apply_hosts(Changes([Event("put", KV(keys.host("bad"), b"\xc1", 1))], 1), now=0.0)
    copy.apply_hosts(put(keys.host("good"), host("good")), now=0.0)
    assert list(copy.hosts) == ["good"]
    assert keys.host("bad") in copy.unreadable


def test_kernels_are_counted_by_owner() -> None:
    copy = filled(spec("k1", "ada"), spec("k2", "ada"), spec("k3", "bob"))
    assert len(copy.owned_by("ada")) == 2
    copy.apply_kernels(gone(keys.spec("k1")), now=0.0)
    assert len(copy.owned_by("ada")) == 1
