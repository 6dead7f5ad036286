"""Who goes first: guarantees, turns of the overdue, priorities, the fair share of the last day; what people read."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_daemon.ledger import GIB, Ledger, Request
from gpu_daemon.order import Policy
from gpu_daemon.queue import Admit, Arrive, Ended, FairQueue, Instruction, Room
from gpu_daemon.shares import SharesError, read_shares
from gpu_daemon.simulated import simulated
from nbos_cluster.records import Resources

DEVICES = simulated("h", 2, "H200", tpcs=8, memory=8 * GIB)


def queue(count: int = 1, overdue_after: float = 3600.0, **shares: Any) -> FairQueue:
    devices = simulated("h", count, "H200", tpcs=8, memory=8 * GIB)
    return FairQueue(Ledger("h", devices), Policy(read_shares(shares), overdue_after=overdue_after))


def arrive(name: str, now: float, owner: str = "ann", groups: tuple[str, ...] = (), **resources: int) -> Arrive:
    return Arrive(Request(name, owner, "k-" + owner, 0, 1, Resources(**resources), groups), now)


def admitted(instructions: list[Instruction]) -> list[str]:
    return [i.grant.grant for i in instructions if isinstance(i, Admit)]


def crowd(q: FairQueue, now: float, *owners: str, **resources: int) -> None:
    """Somebody holds the host; these wait, in this order."""
    q.handle(arrive("running", now, "root", gpus=len(q.ledger.devices)))
    for at, owner in enumerate(owners):
        q.handle(arrive(owner, now + at, owner, **resources or {"gpus": 1}))


def test_cells_within_a_quota_go_before_others_and_those_beyond_it_do_not() -> None:
    q = queue(2, users={"vip": {"devices": 1}})
    crowd(q, 0, "ann", "bob")
    q.handle(arrive("vip1", 10, "vip", gpus=1))
    q.handle(arrive("vip2", 11, "vip", gpus=1))
    assert q.order(12)[0] == "vip1"
    assert admitted(q.handle(Ended("running", 13))) == ["vip1", "ann"]
    assert q.order(14) == ["bob", "vip2"]


def test_a_group_shares_its_quota() -> None:
    q = queue(1, groups={"vision": {"tpcs": 8}})
    crowd(q, 0, "ann", tpcs=8)
    q.handle(arrive("x", 1, "x", ("vision",), tpcs=5))
    q.handle(arrive("y", 2, "y", ("vision",), tpcs=3))
    q.handle(arrive("z", 3, "z", ("vision",), tpcs=3))
    assert admitted(q.handle(Ended("running", 4))) == ["x", "y"]
    assert q.order(5) == ["ann", "z"]


def test_memory_is_a_part_of_the_quota() -> None:
    q = queue(1, users={"vip": {"tpcs": 8, "memory": "2G"}})
    crowd(q, 0, "ann", tpcs=8)
    q.handle(arrive("large", 1, "vip", tpcs=1, memory=3 * GIB))
    q.handle(arrive("small", 2, "vip", tpcs=1, memory=2 * GIB))
    assert q.order(3) == ["small", "ann", "large"]


def test_a_kernel_may_have_a_quota_and_a_priority() -> None:
    q = queue(1, kernels={"k-vip": {"tpcs": 2, "priority": 1}})
    crowd(q, 0, "ann")
    q.handle(arrive("within", 1, "vip", tpcs=2))
    q.handle(arrive("beyond", 2, "vip", tpcs=3))
    q.handle(arrive("bob", 3, "bob", tpcs=1))
    assert q.order(4) == ["within", "beyond", "ann", "bob"]


def test_priority_goes_before_the_fair_share() -> None:
    q = queue(1, users={"low": {"priority": -1}}, groups={"high": {"priority": 2}})
    crowd(q, 0, "ann", "low")
    q.handle(arrive("high", 5, "eve", ("high",), gpus=1))
    q.handle(arrive("bob", 6, "bob", gpus=1))
    assert q.order(7) == ["high", "ann", "bob", "low"]


def test_who_used_less_in_the_last_day_goes_first_by_weight() -> None:
    q = queue(1, users={"heavy": {"weight": 10}})
    for owner, used in (("ann", 4000.0), ("bob", 7000.0), ("heavy", 30000.0)):
        q.remember_use(owner, used, at=-3600, now=0)
    crowd(q, 0, "first", "bob", "ann", "heavy", "new")
    assert q.order(10) == ["first", "new", "heavy", "ann", "bob"]


def test_use_is_forgotten_after_a_day_and_counts_while_a_cell_runs() -> None:
    q = queue(1)
    q.handle(arrive("long", 0, "ann", tpcs=4))
    assert q.used("ann", 1000) == pytest.approx(500)
    q.handle(Ended("long", 7200))
    assert q.used("ann", 7200) == pytest.approx(3600)
    assert q.used("ann", 20 * 3600) == pytest.approx(3600)
    assert q.used("ann", 25.5 * 3600) == pytest.approx(1800), "the first of its two hours is forgotten"
    assert q.used("ann", 27 * 3600) == 0


def test_within_an_equal_share_first_come_is_first_served() -> None:
    q = queue(1)
    q.remember_use("ann", 59.0, at=-10, now=0)
    crowd(q, 0, "first", "ann", "bob")
    assert q.order(5) == ["first", "ann", "bob"]


def test_an_endless_row_of_guaranteed_cells_does_not_starve_anybody() -> None:
    q = queue(1, overdue_after=100, users={"vip": {"devices": 1}})
    q.handle(arrive("vip0", 0, "vip", gpus=1))
    q.handle(arrive("ann", 0, "ann", gpus=1))
    running, now, served = "vip0", 0.0, []
    for number in range(1, 30):
        q.handle(arrive(f"vip{number}", now, "vip", gpus=1))
        now += 10
        (running,) = admitted(q.handle(Ended(running, now)))
        served.append(running)
    assert "ann" in served
    assert served.index("ann") == 9, "at its first chance once it was overdue"


def test_turns_of_the_overdue_and_guarantees_alternate() -> None:
    q = queue(1, overdue_after=10, users={"vip": {"tpcs": 8}})
    crowd(q, 0, *(f"slow{i}" for i in range(6)))
    for number in range(6):
        q.handle(arrive(f"vip{number}", 100 + number, "vip", tpcs=8))
    now, running, served = 200.0, "running", []
    for _ in range(6):
        now += 50  # far longer than the pause between turns
        (running,) = admitted(q.handle(Ended(running, now)))
        served.append(running)
    assert served == ["slow0", "vip0", "slow1", "vip1", "slow2", "vip2"]


def test_the_devices_kept_for_the_head_stay_the_same() -> None:
    """Were they chosen anew each time, newcomers could fill them in turns for ever."""
    q = queue(2)
    q.handle(arrive("a", 0, "a", tpcs=2))
    q.handle(arrive("b", 0, "b", tpcs=7))
    q.handle(arrive("head", 1, "head", gpus=1))
    assert admitted(q.handle(Ended("b", 2))) == ["head"]
    q = queue(2)
    q.handle(arrive("a", 0, "a", tpcs=5))
    q.handle(arrive("b", 0, "b", tpcs=6))
    q.handle(arrive("b2", 0, "b", tpcs=2))
    q.handle(arrive("head", 1, "head", gpus=1))  # the device of `a` is kept
    q.handle(Ended("b", 2))  # the other one is nearer now
    assert admitted(q.handle(arrive("little", 3, "c", tpcs=3))) == ["little"], "not on the device of `a`"
    assert admitted(q.handle(Ended("a", 4))) == ["head"]


def test_a_device_that_falls_ill_is_not_kept_for_the_head_any_more() -> None:
    q = queue(2)
    q.handle(arrive("a", 0, "a", tpcs=5))
    q.handle(arrive("b", 0, "b", tpcs=6))
    q.handle(arrive("head", 1, "head", gpus=1))  # the device of `a` is kept
    q.ledger.set_health(q.ledger.devices[0].uuid, False, "hot", passing=True)
    q.handle(Room(2))
    assert admitted(q.handle(arrive("little", 3, "c", tpcs=1))) == []
    assert admitted(q.handle(Ended("b", 4))) == ["head"]


def reasons(q: FairQueue, now: float) -> dict[str, str]:
    return {t.grant: t.reason for t in q.tell_all(now)}


def test_reasons_say_who_goes_first_and_why() -> None:
    q = queue(1, users={"vip": {"devices": 1}, "high": {"priority": 1}})
    q.remember_use("ann", 2 * 3600.0, at=-10, now=0)
    crowd(q, 0, "first", "ann", "bob")
    assert reasons(q, 10)["ann"] == (
        "1 GPU asked, 0 of 1 GPUs of host h free (1 cell running on its GPUs); users who had less go first "
        "(you used 2.0 GPU-hours in the last day)"
    )
    q.handle(arrive("high", 20, "high", gpus=1))
    assert reasons(q, 20)["bob"].endswith("; cells of a higher priority go first")
    q.handle(arrive("vip", 30, "vip", gpus=1))
    assert reasons(q, 30)["bob"].endswith("; cells within a guaranteed quota go first")
    q.handle(Room(4000))
    assert reasons(q, 4000)["vip"].endswith("host h free (1 cell running on its GPUs)")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"user": {}}, "unknown part 'user'"),
        ({"users": {"ann": {"tpc": 3}}}, "users.ann.tpc is unknown; there are weight"),
        ({"users": {"ann": {"tpcs": -1}}}, "users.ann.tpcs must be a whole number from 0 up, not -1"),
        ({"users": {"ann": {"weight": 0}}}, "users.ann.weight must be a number above 0"),
        ({"groups": {"g": {"priority": 5000}}}, "priorities go from -1000 to 1000"),
        ({"kernels": {"k": {"weight": 2}}}, "kernels.k.weight is unknown"),
        ({"users": {"ann": {"memory": "2 apples"}}}, "users.ann.memory: '2 apples' is no size"),
        ({"users": {"ann": {"memory": "2G"}}}, "memory alone guarantees nothing; name tpcs or devices"),
        ({"default": {"tpcs": 2}}, "default.tpcs is unknown; there are weight, priority"),
    ],
)
def test_a_wrong_table_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(SharesError, match=said):
        read_shares(config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"users": {"a": {"devices": 2}, "b": {"devices": 1}}}, "guarantee 3 whole devices, host h has 2"),
        ({"users": {"a": {"devices": 1, "tpcs": 9}}}, "9 TPCs besides 1 whole devices, host h then has 8"),
        ({"groups": {"g": {"tpcs": 1, "memory": "17G"}}}, "guarantee 17.0 GiB, the devices of host h have 16.0 GiB"),
    ],
)
def test_more_than_the_host_has_cannot_be_guaranteed(config: dict[str, Any], said: str) -> None:
    with pytest.raises(SharesError, match=said):
        read_shares(config).check("h", DEVICES)
