"""Loans inside the ledger, attacked: cells come and go, move when they like, say so late or twice, daemons restart.

Invariant, beside the queue's own: what cells are really on is disjoint, always. NBOS_LEDGER_STEPS=10000 makes the long
run long.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_daemon.ledger import Ledger, Request
from gpu_daemon.loans import Late, Reslice
from gpu_daemon.order import Policy
from gpu_daemon.queue import Admit, Arrive, Ended, FairQueue, Gave, Instruction, Leave, Refuse, Room
from gpu_daemon.shares import read_shares
from gpu_daemon.simulated import simulated
from nbos_cluster.records import Device, GrantRecord, Resources

STEPS = int(os.environ.get("NBOS_LEDGER_STEPS", "500"))
DEVICES = simulated("h", 2, "H200", tpcs=8, memory=800)
LENDABLE = {device.uuid for device in DEVICES}
SHARES = read_shares(
    {
        "users": {
            "ann": {"tpcs": 4, "memory": 200, "priority": 2},
            "bob": {"tpcs": 1, "memory": 100},
            "low": {"priority": -1},
        },
        "groups": {"vision": {"tpcs": 1, "memory": 100}},
    }
)
GROUPS = {"ann": (), "bob": ("vision",), "eve": (), "low": (), "cat": ("vision",)}
POLICY = Policy(SHARES, lend=True, give_back=2.0, overdue_after=1000.0)


@dataclass
class Cell:
    """on: the TPCs that its work may really be on. sent: what it was told last (version and TPCs)."""

    record: GrantRecord
    on: frozenset[int]
    sent: tuple[int, frozenset[int]]
    said: list[int] = field(default_factory=list)
    """Versions that it has moved to, and has yet to tell."""


class World:
    """The daemon's shell and its cells."""

    def __init__(self, devices: tuple[Device, ...] = DEVICES) -> None:
        self.devices, self.now, self.names = devices, 0.0, 0
        self.queue = FairQueue(Ledger("h", devices), POLICY)
        self.cells: dict[str, Cell] = {}
        self.waiting: set[str] = set()
        self.late: list[str] = []
        self.carry_out(self.queue.lend_on(LENDABLE, 0.0))

    def carry_out(self, steps: list[Instruction]) -> None:
        for step in steps:
            match step:
                case Admit(grant):
                    self.waiting.discard(grant.grant)
                    tpcs = frozenset(grant.shares[0].tpcs)
                    stays = self.queue.loans.stays(grant.grant)
                    self.cells[grant.grant] = Cell(grant, tpcs, (grant.version, tpcs if stays is None else stays))
                case Refuse(grant):
                    self.waiting.discard(grant)
                case Reslice(grant, stays, told):
                    cell = self.cells[grant.grant]
                    assert grant.version > cell.sent[0] if told else grant.version == cell.sent[0]
                    cell.record = grant
                    self.records_are_disjoint()
                    if told:
                        cell.sent = (grant.version, stays)
                case Late(grant):
                    self.late.append(grant)

    def arrive(self, owner: str, resources: Resources, borrow: int | None = 0, wait: bool = True) -> str:
        self.names += 1
        name = f"g{self.names}"
        self.waiting.add(name)
        one = Request(name, owner, "k" + owner, 0, self.names, resources, GROUPS[owner], borrow)
        self.carry_out(self.queue.handle(Arrive(one, self.now, wait)))
        return name

    def moves(self, name: str) -> None:
        """At a step boundary, or paused, the cell goes to where it was told to be."""
        cell = self.cells[name]
        cell.on = cell.sent[1]
        cell.said.append(cell.sent[0])

    def says(self, name: str, which: int = -1) -> None:
        """Its message arrives; the same one may come again later."""
        self.carry_out(self.queue.handle(Gave(name, self.cells[name].said[which], self.now)))

    def gives(self, name: str) -> None:
        self.moves(name)
        self.says(name)

    def end(self, name: str) -> None:
        del self.cells[name]
        self.carry_out(self.queue.handle(Ended(name, self.now)))

    def leave(self, name: str) -> None:
        self.waiting.discard(name)
        self.carry_out(self.queue.handle(Leave(name, self.now)))

    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.queue.handle(Room(self.now)))

    def restart(self) -> None:
        """What is known afterwards is what the records say; those who waited bid again (later)."""
        self.queue = FairQueue(Ledger("h", self.devices), POLICY)
        self.waiting.clear()
        for name, cell in self.cells.items():
            assert self.queue.restore(cell.record, self.now) == ""
            stays = self.queue.loans.stays(name)
            if stays is not None and cell.record.wants:
                cell.record = self.queue.grants[name]
                cell.sent = (cell.record.version, stays)
        self.carry_out(self.queue.lend_on(LENDABLE, self.now))

    def records_are_disjoint(self) -> None:
        for device in self.devices:
            recorded = [
                t for c in self.cells.values() for s in c.record.shares if s.uuid == device.uuid for t in s.tpcs
            ]
            assert len(recorded) == len(set(recorded)), "two records name a TPC: a restart would refuse one of them"

    def check(self) -> None:
        self.queue.validate_state()
        self.records_are_disjoint()
        assert self.queue.grants == {name: cell.record for name, cell in self.cells.items()}
        for device in self.devices:
            here = [c for c in self.cells.values() if any(s.uuid == device.uuid for s in c.record.shares)]
            on = [t for c in here for t in (c.on if len(c.record.shares) == 1 else range(device.tpcs))]
            assert len(on) == len(set(on)), "two cells are on one TPC"
            for cell in (c for c in here if len(c.record.shares) == 1):
                (share,) = cell.record.shares
                assert cell.on <= set(share.tpcs), f"{cell.record.grant} is on more than it holds"
                assert set(share.tpcs) - set(share.lent) <= cell.sent[1], "it was asked for what it keeps"


def quiet(world: World) -> None:
    """Every cell does as it was told, until nothing changes."""
    for _ in range(50):
        moved = [n for n, c in world.cells.items() if c.on != c.sent[1] or (c.said and c.said[-1] != c.sent[0])]
        for name in moved:
            world.gives(name)
        if not moved:
            return
    raise AssertionError("loans go to and fro for ever")


def tpcs(world: World, name: str) -> int:
    return len(world.cells[name].on)


def test_a_cell_keeps_its_quota_and_borrows_the_rest_of_what_it_asks_for() -> None:
    world = World(DEVICES[:1])
    bob = world.arrive("bob", Resources(tpcs=8, memory=100))
    (share,) = world.cells[bob].record.shares
    assert (len(share.tpcs), len(share.lent)) == (8, 4), "four are owed to ann"
    world.check()


def test_nothing_is_lent_of_an_owner_with_a_running_cell() -> None:
    world = World(DEVICES[:1])
    eve = world.arrive("eve", Resources(tpcs=1, memory=10), borrow=7)
    quiet(world)
    ann = world.arrive("ann", Resources(tpcs=2, memory=50))
    quiet(world)
    assert (tpcs(world, ann), tpcs(world, eve)) == (2, 4), "two more are owed to ann, who is there"
    assert world.arrive("ann", Resources(tpcs=2, memory=50), wait=False) in world.cells, "at once"
    world.check()


def test_what_is_lent_goes_back_when_its_owner_asks_and_is_lent_again_afterwards() -> None:
    world = World(DEVICES[:1])
    eve = world.arrive("eve", Resources(tpcs=4, memory=100), borrow=4)
    quiet(world)
    assert tpcs(world, eve) == 8
    ann = world.arrive("ann", Resources(tpcs=4, memory=200))
    assert ann not in world.cells, "eve's cell is still on its TPCs"
    assert world.queue.news(world.now)[0].reason.startswith("its room on host h is on loan to other cells")
    world.check()
    world.moves(eve)
    assert ann not in world.cells, "nobody has said so yet"
    world.says(eve)
    assert (tpcs(world, ann), tpcs(world, eve)) == (4, 4)
    world.end(ann)
    quiet(world)
    assert tpcs(world, eve) == 8


def test_a_borrower_of_everything_is_left_with_nothing_and_gets_it_again() -> None:
    world = World((simulated("h", 1, "H200", tpcs=6, memory=800)[0],))
    eve = world.arrive("eve", Resources(tpcs=6, memory=100))
    assert len(world.cells[eve].record.shares[0].lent) == 6
    owners = [world.arrive(who, Resources(tpcs=n, memory=50)) for who, n in (("ann", 4), ("bob", 1), ("cat", 1))]
    quiet(world)
    assert (tpcs(world, eve), [tpcs(world, name) for name in owners]) == (0, [4, 1, 1])
    world.check()
    world.restart()
    world.check()
    for name in owners:
        world.end(name)
    quiet(world)
    assert tpcs(world, eve) == 6


def test_a_cell_that_does_not_borrow_waits_and_is_told_why() -> None:
    world = World((simulated("h", 1, "H200", tpcs=6, memory=800)[0],))
    eve = world.arrive("eve", Resources(tpcs=3, memory=100), borrow=-1)
    assert eve not in world.cells
    assert "does not borrow: leave out borrow=no" in world.queue.news(world.now)[0].reason
    world.time_passes(POLICY.overdue_after)
    assert eve in world.cells, "nobody waits for ever"


def test_replicas_that_cannot_give_back_are_treated_as_before() -> None:
    world = World((simulated("h", 1, "H200", tpcs=6, memory=800)[0],))
    assert world.cells[world.arrive("eve", Resources(tpcs=6, memory=100), borrow=None)].record.shares[0].lent == ()


def test_the_higher_priority_borrows_what_the_lower_one_has_on_loan() -> None:
    world = World((simulated("h", 1, "H200", tpcs=8, memory=800)[0],))
    low = world.arrive("low", Resources(tpcs=1, memory=10), borrow=7)
    quiet(world)
    assert tpcs(world, low) == 8
    eve = world.arrive("eve", Resources(tpcs=1, memory=10), borrow=7)
    quiet(world)
    assert tpcs(world, eve) > tpcs(world, low) == 1
    world.check()


def test_a_bid_that_does_not_wait_calls_nothing_back() -> None:
    world = World(DEVICES[:1])
    eve = world.arrive("eve", Resources(tpcs=4, memory=100), borrow=4)
    quiet(world)
    ann = world.arrive("ann", Resources(tpcs=4, memory=200), wait=False)
    assert ann not in world.cells
    assert world.cells[eve].sent[1] == world.cells[eve].on
    world.check()


def test_who_leaves_the_queue_while_its_room_comes_back_gets_nothing() -> None:
    world = World(DEVICES[:1])
    eve = world.arrive("eve", Resources(tpcs=4, memory=100), borrow=4)
    quiet(world)
    ann = world.arrive("ann", Resources(tpcs=4, memory=200))
    world.leave(ann)
    world.gives(eve)
    quiet(world)
    assert tpcs(world, eve) == 8
    assert len(world.queue) == 0
    world.check()


def test_what_is_said_of_an_older_slice_gives_back_only_what_was_recalled_then() -> None:
    world = World(DEVICES[:1])
    eve = world.arrive("eve", Resources(tpcs=1, memory=10), borrow=7)
    quiet(world)
    world.arrive("bob", Resources(tpcs=1, memory=50))
    old = world.cells[eve].sent[0]
    world.arrive("ann", Resources(tpcs=4, memory=200))
    assert world.cells[eve].sent[0] > old
    world.carry_out(world.queue.handle(Gave(eve, old, world.now)))
    held = set(world.cells[eve].record.shares[0].tpcs)
    assert len(held) == 7, "bob's one is given back, ann's four are not"
    world.cells[eve].on = frozenset(held)
    world.check()


def test_a_borrower_that_does_not_answer_is_late_once() -> None:
    world = World(DEVICES[:1])
    eve = world.arrive("eve", Resources(tpcs=4, memory=100), borrow=4)
    quiet(world)
    world.arrive("ann", Resources(tpcs=4, memory=200))
    assert world.queue.loans.next_at() == 2.0
    world.time_passes(1.9)
    assert world.late == []
    world.time_passes(0.2)
    world.time_passes(5.0)
    assert world.late == [eve]


ASKS = st.one_of(
    st.builds(Resources, tpcs=st.integers(1, 8), memory=st.sampled_from([0, 10, 50, 200])),
    st.builds(Resources, gpus=st.integers(1, 2)),
)


class Lent(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(
        owner=st.sampled_from(sorted(GROUPS)),
        asks=ASKS,
        borrow=st.sampled_from([None, -1, 0, 2, 8]),
        wait=st.booleans(),
    )
    def arrive(self, owner: str, asks: Resources, borrow: int | None, wait: bool) -> None:
        self.world.arrive(owner, asks, borrow, wait)

    @precondition(lambda self: self.world.cells)
    @rule(data=st.data(), how=st.sampled_from(["moves", "gives", "end", "again"]))
    def cell(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.cells)))
        if how == "again":
            said = self.world.cells[name].said
            if said:
                self.world.says(name, data.draw(st.integers(0, len(said) - 1)))
        else:
            getattr(self.world, how)(name)

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.world.leave(data.draw(st.sampled_from(sorted(self.world.waiting))))

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.world.time_passes(seconds)

    @rule(lendable=st.sampled_from([LENDABLE, set(), {DEVICES[0].uuid}]))
    def the_mechanism_changes(self, lendable: set[str]) -> None:
        self.world.carry_out(self.world.queue.lend_on(lendable, self.world.now))

    @rule(device=st.sampled_from(DEVICES), healthy=st.booleans())
    def health(self, device: Device, healthy: bool) -> None:
        self.world.queue.ledger.set_health(device.uuid, healthy, "")
        self.world.time_passes(0)

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @rule()
    def everybody_gives_back(self) -> None:
        quiet(self.world)
        assert not self.world.queue._coming, "nobody waits for loans that were given back"

    @invariant()
    def promises(self) -> None:
        self.world.check()


Lent.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLent = Lent.TestCase


@pytest.mark.parametrize("seed", [1, 2])
def test_no_tpc_is_used_twice_in_a_long_crowded_run(seed: int) -> None:
    chance, world = random.Random(seed), World()
    for _ in range(STEPS):
        if chance.random() < 0.5:
            whole = chance.random() < 0.1
            asks = Resources(gpus=1) if whole else Resources(tpcs=chance.randint(1, 8), memory=chance.choice([10, 50]))
            world.arrive(chance.choice(sorted(GROUPS)), asks, chance.choice([None, 0, 0, 2, 8]), True)
        for name in sorted(world.cells):
            if chance.random() < 0.5:
                world.moves(name)
            cell = world.cells[name]
            if cell.said and chance.random() < 0.6:
                world.says(name, chance.randrange(len(cell.said)))
            if chance.random() < 0.3:
                world.end(name)
        for name in sorted(world.waiting):
            if chance.random() < 0.1:
                world.leave(name)
        world.time_passes(chance.random())
        if chance.random() < 0.02:
            world.restart()
        world.check()
    quiet(world)
    world.check()
