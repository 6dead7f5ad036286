"""What a bidder is told, case by case; the machine test holds the promises."""

from __future__ import annotations

import pytest
from test_kernelview import K, World, spec

from nbos_cluster import election, keys, membership, records
from nbos_cluster.election import AlreadyThere, Appended, Fenced, Lost, Won
from nbos_cluster.records import ClaimRecord, Epoch, GrantRecord, LogEntry

FIRST = Epoch(epoch=1, incarnation=1)


@pytest.fixture
def world() -> World:
    return World()


def bid(world: World, n: int, replica: int = 0, epoch: Epoch = FIRST) -> Won | Lost:
    mine = ClaimRecord(n=n, replica=replica, host=f"host-{replica}")
    txn = election.claim(K, n, epoch=epoch, claim=mine, lease=world.lease)
    return election.classify(n, world.store.commit(txn), mine)


def append(world: World, n: int, token: int) -> Appended | AlreadyThere | Fenced:
    txn = election.append(K, LogEntry(n=n, kind="cell", token=token), token)
    return election.classify_append(n, token, world.store.commit(txn))


def test_who_comes_second_learns_who_has_it(world: World) -> None:
    assert isinstance(bid(world, 1, 0), Won)
    lost = bid(world, 1, 1)
    assert isinstance(lost, Lost)
    assert lost.code == "taken"
    assert lost.holder == ClaimRecord(n=1, replica=0, host="host-0")
    assert lost.reason == "replica 0 on host-0 holds execution 1"


def test_a_decided_execution_is_stale(world: World) -> None:
    world.run(1)
    assert bid(world, 1) == Lost("stale", 2, "execution 1 is decided already, the next is 2")


def test_a_folded_execution_is_stale_too(world: World) -> None:
    for n in (1, 2, 3):
        world.run(n)
    world.fold(2)
    lost = bid(world, 1)
    assert isinstance(lost, Lost)
    assert (lost.code, lost.next) == ("stale", 4)


def test_the_execution_after_next_is_behind(world: World) -> None:
    lost = bid(world, 2)
    assert isinstance(lost, Lost)
    assert (lost.code, lost.next) == ("behind", 1)


def test_another_epoch_or_no_kernel(world: World) -> None:
    lost = bid(world, 1, epoch=Epoch(epoch=2, incarnation=1))
    assert isinstance(lost, Lost)
    assert lost.code == "epoch"
    world.store.commit(membership.delete(K))
    assert bid(world, 1) == Lost("epoch", None, "the kernel is gone")


def test_the_grant_goes_with_the_claim_and_with_the_entry(world: World) -> None:
    grant = GrantRecord(grant="g", host="h", owner="ada", kernel=K, replica=0, n=1, shares=())
    mine = ClaimRecord(n=1, replica=0, host="h", grant="g")
    txn = election.claim(K, 1, epoch=FIRST, claim=mine, grant=grant, lease=world.lease)
    token = world.store.commit(txn).revision
    key = keys.grant("h", "g")
    assert world.store.data[key].lease == world.lease
    entry = LogEntry(n=1, kind="cell", token=token)
    assert world.store.commit(election.append(K, entry, token, grant_key=key)).succeeded
    assert key not in world.store.data


def test_a_repeated_append_is_recognised_and_a_late_one_fenced(world: World) -> None:
    old = world.claim(1)
    world.store.expire(world.lease)
    assert append(world, 1, old) == Fenced("the claim of execution 1 ended with its lease")
    world.lease = world.store.grant()
    new = world.claim(1, replica=1)
    assert append(world, 1, old) == Fenced("replica 1 on h holds execution 1")
    assert isinstance(append(world, 1, new), Appended)
    assert isinstance(append(world, 1, new), AlreadyThere)
    assert append(world, 1, old) == Fenced("execution 1 was decided by another: cell", decided=True)


def test_an_entry_without_the_claims_token_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="put the claim's in"):
        election.append(K, LogEntry(n=1, kind="cell"), 5)


def test_an_abandoned_execution_says_why(world: World) -> None:
    token = world.claim(1)
    free = election.abandon(K, 1, "gave up")
    assert election.classify_abandon(1, world.store.commit(free)) == Fenced("replica 0 on h holds execution 1")
    held = election.abandon(K, 1, "its process died", token)
    assert isinstance(election.classify_abandon(1, world.store.commit(held)), Appended)
    assert isinstance(election.classify_abandon(1, world.store.commit(held)), AlreadyThere)
    entry = records.decode(world.store.data[keys.log_entry(K, 1)].value, LogEntry)
    assert (entry.kind, entry.reason) == ("abandoned", "its process died")
    assert append(world, 1, token) == Fenced(
        "execution 1 was decided by another: abandoned (its process died)", decided=True
    )
    assert isinstance(bid(world, 2), Won)


def test_a_restart_fences_what_runs(world: World) -> None:
    token = world.claim(1)
    world.read()
    restart = membership.restart(world.view)
    assert world.store.commit(restart).succeeded
    assert not world.store.commit(restart).succeeded
    fenced = append(world, 1, token)
    assert isinstance(fenced, Fenced)
    assert fenced.decided
    assert isinstance(bid(world, 2, epoch=Epoch(epoch=2, incarnation=2)), Won)


def test_a_kernel_id_in_use_is_told(world: World) -> None:
    found = membership.classify_create(spec(), world.store.commit(membership.create(spec())))
    assert isinstance(found, membership.Created), "our own first try"
    other = records.decode(records.encode(spec()), type(spec()))
    other = type(other)(**{f: getattr(other, f) for f in other.__struct_fields__} | {"owner": "eve"})
    found = membership.classify_create(other, world.store.commit(membership.create(other)))
    assert found == membership.Exists(spec())


def test_a_new_plan_raises_the_epoch_once(world: World) -> None:
    plan = membership.replan(world.view, {"0": "x", "1": "y"})
    assert world.store.commit(plan).succeeded
    assert not world.store.commit(plan).succeeded
    world.read()
    assert world.view.spec is not None
    assert (world.view.spec.placement, world.view.spec.replicas) == ({"0": "x", "1": "y"}, 2)
    assert world.view.epoch == Epoch(epoch=2, incarnation=1)
