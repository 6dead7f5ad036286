"""Promise 3 and the queue's promises, attacked: any sequence of requests, ends, cancellations, broken devices, restarts
of the daemon and hours that pass, under quotas, priorities, weights and a course.

Invariants: no TPC, device or byte granted twice; who waits is not granted; nobody waits longer than the order allows,
whoever comes meanwhile; what a course keeps is taken by no one else. NBOS_LEDGER_STEPS=10000 makes the long runs long.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_daemon.ledger import Ledger, Request
from gpu_daemon.order import Policy
from gpu_daemon.queue import Admit, Arrive, Ended, FairQueue, Leave, Room
from gpu_daemon.reservations import read_reservations
from gpu_daemon.shares import read_shares
from gpu_daemon.simulated import simulated
from nbos_cluster.records import Device, GrantRecord, Resources

STEPS = int(os.environ.get("NBOS_LEDGER_STEPS", "500"))

DEVICES = (*simulated("h", 2, "H200", tpcs=6, memory=600), *simulated("g", 1, "A100", tpcs=4, memory=400))
RESOURCES = st.one_of(
    st.builds(
        Resources, gpus=st.integers(1, 4), memory=st.sampled_from([0, 0, 300, 500]), model=st.sampled_from(["", "H"])
    ),
    st.builds(Resources, tpcs=st.integers(1, 7), memory=st.sampled_from([0, 0, 50, 300, 700])),
)
GROUPS = {"a": ("vision",), "b": (), "c": ("vision", "course"), "s": ("course",), "t": ("course",)}
OWNERS = sorted(GROUPS)
SHARES = read_shares(
    {
        "users": {"a": {"tpcs": 4, "weight": 2}, "b": {"priority": 5}},
        "groups": {"vision": {"devices": 1, "tpcs": 2, "memory": 900}},
        "kernels": {"kb": {"tpcs": 1, "priority": -3}},
    }
)
SEATS, SEAT = 2, 2
COURSE = read_reservations(
    [
        {
            "name": "course",
            "groups": ["course"],
            "seats": SEATS,
            "tpcs": SEAT,
            "days": ["thu"],  # where the clock of these tests begins
            "from": "00:02",
            "to": "00:03",
            "timezone": "UTC",
        }
    ]
)
LONGEST = 10.0
"""Seconds that a cell takes at most."""
TICK = 8.0
COURSES = {"no course": (), "a course": COURSE}
POLICY = {name: Policy(SHARES, course, overdue_after=20.0, unknown_run=LONGEST) for name, course in COURSES.items()}


class World:
    """A queue, the cells that run on its grants, and what the promises say about both."""

    def __init__(self, course: bool, now: float) -> None:
        self.policy = POLICY["a course" if course else "no course"]
        self.queue = FairQueue(Ledger("h", DEVICES), self.policy)
        self.now = now
        self.names = 0
        self.running: dict[str, tuple[GrantRecord, float]] = {}
        self.waiting: dict[str, tuple[float, int]] = {}
        """Since when, and how many waited before."""
        self.longest_wait = 0.0

    def do(self, event: Arrive | Leave | Ended | Room) -> None:
        before = self.free_seats()
        members = others = 0
        for step in self.queue.handle(event):
            if isinstance(step, Admit):
                self.waiting.pop(step.grant.grant, None)
                self.running[step.grant.grant] = (step.grant, self.now)
                members += "course" in GROUPS[step.grant.owner]
                others += "course" not in GROUPS[step.grant.owner]
            else:
                self.waiting.pop(step.grant, None)
        if self.course_is_on and others and not members:
            assert self.free_seats() >= min(before, self.empty_seats()), "others took the room of a course"

    @property
    def course_is_on(self) -> bool:
        return bool(self.policy.reservations) and 120 <= self.now < 180

    def members(self) -> dict[str, int]:
        """The TPCs that each member with a seat holds in slices."""
        held: dict[str, int] = {}
        for record, _ in self.running.values():
            if "course" in GROUPS[record.owner]:
                tpcs = sum(len(s.tpcs) for s in record.shares if not s.whole)
                held[record.owner] = held.get(record.owner, 0) + tpcs
        return {owner: tpcs for owner, tpcs in held.items() if tpcs}

    def empty_seats(self) -> int:
        return max(0, SEATS - len(self.members()))

    def free_seats(self) -> int:
        """How many seats there is room for now, counted anew from what was handed out."""
        found = 0
        for device in (d for d in self.queue.ledger.devices if d.healthy):
            shares = [s for r, _ in self.running.values() for s in r.shares if s.uuid == device.uuid]
            tpcs = device.tpcs - sum(len(s.tpcs) for s in shares)
            memory = device.memory - sum(s.memory for s in shares)
            found += min(tpcs // SEAT, memory // (device.memory * SEAT // device.tpcs))
        return found

    def arrive(self, resources: Resources, owner: str, wait: bool) -> None:
        self.names += 1
        name = f"g{self.names}"
        self.waiting[name] = (self.now, len(self.waiting))
        request = Request(name, owner, "k" + owner, 0, self.names, resources, GROUPS[owner])
        self.do(Arrive(request, self.now, wait))
        if not wait:
            assert name not in self.waiting

    def time_passes(self, seconds: float) -> None:
        """Cells end when they have taken as long as cells may; the daemon looks again every few seconds."""
        self.now += seconds
        for name, (_, since) in sorted(self.running.items()):
            if self.now - since >= LONGEST:
                self.end(name, True)
        self.do(Room(self.now))

    def end(self, name: str, used: bool) -> None:
        del self.running[name]
        self.do(Ended(name, self.now, used))

    def leave(self, name: str) -> None:
        del self.waiting[name]
        self.do(Leave(name, self.now))

    def health(self, uuid: str, healthy: bool) -> None:
        self.queue.ledger.set_health(uuid, healthy, "")
        self.do(Room(self.now))
        self.waiting = {name: (self.now, ahead) for name, (_, ahead) in self.waiting.items()}

    def restart(self) -> None:
        """The daemon starts again: grants of living replicas are restored, those who waited bid again (later)."""
        ledger = Ledger("h", DEVICES)
        self.queue = FairQueue(ledger, self.policy)
        for record, _ in self.running.values():
            assert self.queue.restore(record, self.now) == ""
        self.waiting.clear()

    def no_tpc_or_byte_twice(self) -> None:
        self.queue.validate_state()
        for device in DEVICES:
            shares = [s for r, _ in self.running.values() for s in r.shares if s.uuid == device.uuid]
            tpcs = [t for s in shares for t in s.tpcs]
            assert len(tpcs) == len(set(tpcs))
            assert all(0 <= t < device.tpcs for t in tpcs)
            assert sum(s.memory for s in shares) <= device.memory
            assert len(shares) == 1 or not any(s.whole for s in shares)

    def the_books_are_what_was_handed_out(self) -> None:
        assert self.queue.ledger.grants == {name: record for name, (record, _) in self.running.items()}
        assert set(self.queue.order(self.now)) == set(self.waiting)

    def everybody_who_waits_can_be_told_why(self) -> None:
        tells = self.queue.tell_all(self.now)
        assert [t.position for t in tells] == list(range(1, len(self.waiting) + 1))
        assert all(t.reason and t.of == len(self.waiting) for t in tells)

    def nobody_waits_for_ever(self) -> None:
        """Overdue, then a turn after each of those who were there before. A turn: its own drain, that of the guaranteed
        request that is owed one, and the pause between turns; each seen a tick late."""
        turn = self.policy.turn_every + 2 * (LONGEST + TICK) + TICK
        for name, (since, ahead) in self.waiting.items():
            bound = self.policy.overdue_after + (ahead + 1) * turn
            if self.policy.reservations and since < 180 and self.now >= 120:
                bound += 60 + TICK
            self.longest_wait = max(self.longest_wait, (self.now - since) / bound)
            assert self.now - since <= bound, f"{name} waits for {self.now - since:.0f} s"

    def check(self) -> None:
        self.no_tpc_or_byte_twice()
        self.the_books_are_what_was_handed_out()
        self.everybody_who_waits_can_be_told_why()
        self.nobody_waits_for_ever()


class PromiseThree(RuleBasedStateMachine):
    @initialize(course=st.booleans(), start=st.floats(0, 150))
    def configure(self, course: bool, start: float) -> None:
        self.world = World(course, start)

    @rule(asked=st.lists(st.tuples(RESOURCES, st.sampled_from(OWNERS)), min_size=1, max_size=6), wait=st.booleans())
    def arrive(self, asked: list[tuple[Resources, str]], wait: bool) -> None:
        for resources, owner in asked:
            self.world.arrive(resources, owner, wait)

    @rule(seconds=st.floats(0, TICK))
    def time_passes(self, seconds: float) -> None:
        self.world.time_passes(seconds)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), used=st.booleans())
    def end(self, data: st.DataObject, used: bool) -> None:
        self.world.end(data.draw(st.sampled_from(sorted(self.world.running))), used)

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.world.leave(data.draw(st.sampled_from(sorted(self.world.waiting))))

    @rule(device=st.sampled_from(DEVICES), healthy=st.booleans())
    def health(self, device: Device, healthy: bool) -> None:
        self.world.health(device.uuid, healthy)

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @invariant()
    def promises(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


PromiseThree.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPromiseThree = PromiseThree.TestCase


@pytest.mark.parametrize("course", [False, True])
@pytest.mark.parametrize("load", [0.3, 0.6])
def test_the_promises_hold_in_a_long_crowded_run(course: bool, load: float) -> None:
    """Hypothesis' sequences are short; here the queue is never empty, and waits reach their bounds. load: arrivals a
    second, of which the host can serve about 0.3."""
    chance = random.Random(f"{course} {load}")
    world = World(course, now=60.0)
    for _ in range(STEPS):
        if world.now > 400:  # the course is over, and comes again in a week
            world.now = 60.0 + chance.random()
            world = World(course, world.now)
        for _ in range(sum(chance.random() < load for _ in range(2))):
            whole = chance.random() < 0.3
            asked = Resources(gpus=chance.choice([1, 1, 2, 3])) if whole else Resources(tpcs=chance.randint(1, 6))
            world.arrive(asked, chance.choice(OWNERS), wait=True)
        world.time_passes(2.0)
        if chance.random() < 0.1 and world.running:
            world.end(chance.choice(sorted(world.running)), True)
        if chance.random() < 0.02 and world.waiting:
            world.leave(chance.choice(sorted(world.waiting)))
        world.check()
