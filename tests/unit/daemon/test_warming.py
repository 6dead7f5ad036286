"""How many replicas are kept warm: bounds whatever happens, Little's law, and calm."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_daemon.warming import (
    SIZE_UNKNOWN,
    Arrived,
    Drop,
    Event,
    Expected,
    Failed,
    Found,
    Gone,
    Instruction,
    Made,
    Make,
    Memory,
    Policy,
    Tick,
    Warming,
    enough,
)

MIB, GIB = 1 << 20, 1 << 30
IMAGES = ("", "a", "b")


class World(RuleBasedStateMachine):
    """A host with memory of its own, whose spares come up, fail, are taken and die as it pleases."""

    @initialize(
        kind=st.sampled_from(["fixed", "demand"]),
        keep=st.integers(0, 3),
        more=st.integers(0, 4),
        size=st.integers(1, 400),
        free=st.integers(0, 4000),
        head_start=st.sampled_from([0.0, 1.0, 50.0]),
    )
    def begin(self, kind: str, keep: int, more: int, size: int, free: int, head_start: float) -> None:
        bounds = {"keep": keep, "most": max(1, keep + more), "reserve": GIB}
        self.policy = Policy(kind=kind, head_start=head_start, **bounds)  # type: ignore[arg-type]
        self.warming = Warming(self.policy)
        self.rests: dict[str, float] = {}
        self.now = 0.0
        self.size = size * MIB
        self.others = 0
        self.total = GIB + free * MIB
        self.waiting: Counter[str] = Counter()
        self.making: Counter[str] = Counter()
        self.surplus_since: dict[str, float] = {}
        self.look()

    @property
    def available(self) -> int:
        return self.total - self.others - self.waiting.total() * self.size

    def tell(self, event: Event) -> list[Instruction]:
        steps = self.warming.handle(event)
        for step in steps:
            if isinstance(step, Make):
                assert self.now >= self.rests.get(step.image, 0), "made beside a start that has the machine for itself"
                self.making[step.image] += 1
            else:
                assert self.waiting[step.image] > 0, "a spare is dropped that is not there"
                self.waiting[step.image] -= 1
        return steps

    def look(self) -> None:
        short = self.available < self.policy.reserve
        steps = self.tell(Memory(self.available, self.now))
        if short:
            assert not any(isinstance(step, Make) for step in steps), "made although memory is short"
            assert not self.waiting.total() or self.available + self.size >= self.policy.reserve - self.size

    @rule(image=st.sampled_from(IMAGES))
    def arrives(self, image: str) -> None:
        if self.now >= self.rests.get(image, 0):
            self.rests[image] = self.now + self.policy.head_start
        self.tell(Arrived(image, self.now))
        if self.waiting[image]:
            self.waiting[image] -= 1
            self.tell(Gone(image, self.now))

    @precondition(lambda self: self.making.total())
    @rule(data=st.data(), seconds=st.floats(0.01, 60))
    def made(self, data: st.DataObject, seconds: float) -> None:
        image = data.draw(st.sampled_from(sorted(+self.making)))
        self.making[image] -= 1
        self.waiting[image] += 1
        self.tell(Made(image, seconds, self.size, self.now))

    @precondition(lambda self: self.making.total())
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        image = data.draw(st.sampled_from(sorted(+self.making)))
        self.making[image] -= 1
        steps = self.tell(Failed(image, self.now))
        assert Make(image) not in steps, "tried again at once"

    @precondition(lambda self: self.waiting.total())
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        image = data.draw(st.sampled_from(sorted(+self.waiting)))
        self.waiting[image] -= 1
        self.tell(Gone(image, self.now))

    @rule(images=st.frozensets(st.sampled_from(IMAGES)))
    def are_expected(self, images: frozenset[str]) -> None:
        self.tell(Expected(images, self.now))
        if self.policy.keep and not self.warming.short:
            first = sorted(images)[: self.policy.most]
            assert all(self.warming.wanted(image, self.now) for image in first if len(images) <= self.policy.most)

    @precondition(lambda self: self.waiting.total() + self.making.total() < self.policy.most)
    @rule(image=st.sampled_from(IMAGES))
    def is_found(self, image: str) -> None:
        """As after a restart of the daemon."""
        self.waiting[image] += 1
        self.tell(Found(((image, self.size),), self.now))

    @rule(mib=st.integers(0, 6000))
    def others_take(self, mib: int) -> None:
        self.others = min(mib * MIB, self.total)
        self.look()

    @rule(seconds=st.floats(0.1, 2000))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.look()

    @rule()
    def rest_is_over(self) -> None:
        """No longer than the start has the machine for itself; what it took is made then."""
        due = self.warming.due(self.now)
        rests = [until for until in self.rests.values() if until > self.now]
        assert due == min(rests, default=None)
        if due is not None:
            self.now = due
            self.tell(Tick(due))
            self.look()

    @rule()
    def quiet(self) -> None:
        """Everything that is asked for comes up, nobody comes: then exactly what is wanted waits, and stays."""
        self.others = 0
        for _ in range(40):
            self.now += 301
            self.look()
            while (image := next(iter(+self.making), None)) is not None:
                self.making[image] -= 1
                self.waiting[image] += 1
                self.tell(Made(image, 0.1, self.size, self.now))
        fits = (self.total - GIB) // max(self.size, SIZE_UNKNOWN)
        for image in IMAGES:
            wanted = self.warming.wanted(image, self.now)
            assert self.waiting[image] == wanted or fits <= self.policy.most, (image, dict(self.waiting), wanted)
        assert not self.tell(Memory(self.available, self.now))

    @invariant()
    def within_bounds(self) -> None:
        if not hasattr(self, "warming"):
            return
        assert self.waiting.total() + self.making.total() <= self.policy.most
        for image in IMAGES:
            assert self.warming.ready(image) == self.waiting[image]


World.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestWorld = World.TestCase


def started(policy: Policy, available: int = 64 * GIB) -> tuple[Warming, list[Instruction]]:
    warming = Warming(policy)
    return warming, warming.handle(Memory(available, 0))


def test_who_is_expected_comes_first_and_goes_when_not_expected_any_more() -> None:
    warming, steps = started(Policy(kind="demand", keep=1, most=2, images=(), calm=0))
    assert steps == []
    for _ in range(200):
        warming.handle(Arrived("old", 1))
    assert warming.wanted("old", 1) == 2
    warming.handle(Expected(frozenset({"ann", "bob"}), 2))
    assert {image: warming.wanted(image, 2) for image in ("ann", "bob", "old")} == {"ann": 1, "bob": 1, "old": 0}
    warming.handle(Expected(frozenset(), 3))
    assert warming.wanted("old", 3) == 2


@given(mean=st.floats(0, 40), confidence=st.floats(0.5, 0.999))
def test_enough_is_the_least_number_that_keeps_the_confidence(mean: float, confidence: float) -> None:
    def found(spares: int) -> float:
        return sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(spares))

    number = enough(mean, confidence, 100)
    assert found(number) >= confidence - 1e-9 or number == 0 == mean
    assert number <= 1 or found(number - 1) < confidence + 1e-9


@pytest.mark.parametrize(("mean", "number"), [(0, 0), (0.01, 1), (1, 4), (5, 10), (1e9, 7)])
def test_enough_by_example_and_bounded(mean: float, number: int) -> None:
    assert enough(mean, 0.95, 7 if mean > 100 else 20) == number


@pytest.mark.parametrize("head_start", [0.0, 2.0])
def test_by_demand_an_arrival_finds_a_spare_as_often_as_promised(head_start: float) -> None:
    """Little's law at work: a start every 5 s, 10 s to make one."""
    policy = Policy(kind="demand", keep=0, most=40, confidence=0.9, window=600, head_start=head_start)
    warming, _ = started(policy)
    dice, now, found, asked = random.Random(7), 0.0, 0, 0
    due: list[float] = []
    waiting = 0

    def carry_out(steps: list[Instruction]) -> None:
        nonlocal waiting
        for step in steps:
            if isinstance(step, Make):
                due.append(now + 10.0)
            else:
                waiting -= 1

    while now < 20_000:
        following = now + dice.expovariate(1 / 5)
        while (now := min([*due, warming.due(now) or following, following])) < following:
            if now in due:
                due.remove(now)
                waiting += 1
                carry_out(warming.handle(Made("", 10.0, 50 * MIB, now)))
            else:
                carry_out(warming.handle(Tick(now)))
        carry_out(warming.handle(Arrived("", now)))
        if now > 3000:  # the rate is known by then
            asked += 1
            found += waiting > 0
        if waiting:
            waiting -= 1
            carry_out(warming.handle(Gone("", now)))
        carry_out(warming.handle(Memory(64 * GIB, now)))
    assert 0.88 <= found / asked <= 0.98
    assert warming.wanted("", now) <= 6 + head_start / 2, "five are enough for two starts in ten seconds"


def test_what_is_taken_is_made_again_at_once() -> None:
    warming, steps = started(Policy(kind="fixed", keep=2))
    assert steps == [Make(""), Make("")]
    warming.handle(Made("", 1, 0, 1))
    warming.handle(Made("", 1, 0, 1))
    warming.handle(Arrived("", 2))
    assert warming.handle(Gone("", 2)) == [Make("")]


def test_what_is_taken_is_made_again_when_its_start_has_had_the_machine_for_itself() -> None:
    warming, _ = started(Policy(kind="fixed", keep=1, head_start=1))
    warming.handle(Made("", 1, 0, 1))
    assert warming.handle(Arrived("", 2)) == warming.handle(Gone("", 2)) == []
    assert warming.handle(Arrived("", 2.5)) == [], "and no other start puts it off"
    assert warming.due(2.5) == 3
    assert warming.handle(Tick(3)) == [Make("")]
    assert warming.due(3) is None


def test_too_many_are_dropped_only_after_a_calm_while() -> None:
    warming, _ = started(Policy(kind="demand", keep=1, most=8, window=100, calm=60))
    warming.handle(Made("", 30, MIB, 1))
    for second in range(10):
        for step in warming.handle(Arrived("", second)):
            assert step == Make("")
    making = warming.wanted("", 10) - 1
    assert making > 3
    for _ in range(making):
        warming.handle(Made("", 30, MIB, 11))
    dropped = {}
    for now in range(11, 600):
        for step in warming.handle(Memory(64 * GIB, now)):
            assert step == Drop(""), "thrash: made again what is not asked for"
            dropped[now] = dropped.get(now, 0) + 1
    assert sum(dropped.values()) == making
    assert min(dropped) >= 11 + 60


def test_a_failure_is_tried_again_with_a_growing_pause() -> None:
    warming, _ = started(Policy(kind="fixed", keep=1))
    now, pauses = 0.0, []
    for _ in range(11):
        assert not warming.handle(Failed("", now))
        failed = now
        while not warming.handle(Memory(64 * GIB, now)):
            now += 0.5
        pauses.append(now - failed)
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses[-1] == 300


def test_short_of_memory_the_least_asked_for_goes_first_and_comes_back_after_a_calm_while() -> None:
    warming, _ = started(Policy(kind="fixed", keep=1, images=("", "rare"), calm=60, reserve=GIB))
    for image in ("", "rare"):
        warming.handle(Made(image, 1, 100 * MIB, 1))
    warming.handle(Arrived("", 2))
    assert warming.handle(Memory(GIB - 50 * MIB, 3)) == [Drop("rare")]
    assert warming.handle(Memory(GIB + 500 * MIB, 4)) == []
    assert warming.handle(Memory(GIB + 500 * MIB, 63)) == []
    assert warming.handle(Memory(GIB + 500 * MIB, 64)) == [Make("rare")]


def test_every_popular_image_gets_one_before_any_gets_its_second() -> None:
    warming, steps = started(Policy(kind="fixed", keep=3, most=4, images=("",)))
    assert steps == [Make("")] * 3
    for _ in range(3):
        warming.handle(Made("", 1, 0, 1))
    made = [warming.handle(Arrived(image, 2)) for image in ("torch", "torch", "r")]
    assert made == [[Make("torch")], [Drop(""), Make("torch")], [Drop(""), Make("r")]]
    assert {image: warming.wanted(image, 2) for image in ("torch", "r", "")} == {"torch": 2, "r": 1, "": 1}


def test_off_keeps_none() -> None:
    warming, steps = started(Policy(kind="off"))
    assert steps == [] == warming.handle(Arrived("", 1))
