"""How low clocks may go: the governor alone, against cells that follow LithOS' model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gpu_daemon.power.governor import Cap, Failed, Governor, Look, Policy, Ran
from nbos_cluster.simdevice import Device, Kernel

CLOCKS = tuple(range(345, 1981, 15))
TOP = CLOCKS[-1]
POLICY = Policy(slip=0.04, least=0.5, down_after=60.0, up_after=5.0)


class Played:
    """A device whose cells take what the model says at its clock."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.governor, self.now, self.mhz = Governor(policy, {"a": CLOCKS}), 0.0, TOP
        self.switches: list[tuple[float, int, int]] = []

    def take(self, caps: list[Cap]) -> None:
        for cap in caps:
            self.switches.append((self.now, self.mhz, cap.mhz))
            self.mhz = cap.mhz

    def look(self, *keys: str | None) -> None:
        self.now += 2.0
        self.take(self.governor.handle(Look("a", dict.fromkeys(keys, 1 / max(1, len(keys))), self.now)))

    def run(self, key: str, sensitivity: float) -> float:
        """Its seconds."""
        began = self.now
        self.look(key)
        took = 10.0 * (1 + sensitivity * (TOP / self.mhz - 1))
        self.now += took
        self.take(self.governor.handle(Ran("a", key, took, began, self.now)))
        return took


@pytest.mark.parametrize(("sensitivity", "mhz"), [(1.0, 1905), (0.5, 1845), (0.1, 1425), (0.0, 990)])
def test_the_clock_of_a_kind_of_cell_is_what_the_formula_says(sensitivity: float, mhz: int) -> None:
    """f = f_max / (1 + slip/s), on the chip's next clock above, and no lower than half."""
    played = Played()
    for _ in range(60):
        played.run("k", sensitivity)
    assert played.mhz == mhz
    assert played.governor.cap("a") == (mhz, TOP)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 5))
def test_what_runs_becomes_no_slower_than_was_allowed(one: float, other: float, times: int) -> None:
    played = Played()
    for _ in range(40):
        for _ in range(times):
            played.run("one", one)
        played.run("other", other)
    share = times / (times + 1)
    loss = (share * one + (1 - share) * other) * (TOP / played.mhz - 1)
    assert loss <= POLICY.slip * 1.1, "the shares are of the last minutes, and differ from the long run's"


def test_nothing_is_guessed_and_what_is_unknown_has_full_clock() -> None:
    played = Played()
    for _ in range(40):
        played.run("k", 0.2)
    assert played.mhz < TOP
    before = played.now
    while played.mhz < TOP:
        played.look("k", "new")
    assert played.now - before <= POLICY.up_after + 2
    for _ in range(40):
        played.look(None)  # nothing will ever be known of it: it counts as the most that a clock can cost
    assert played.mhz == 1905


def test_an_idle_device_is_not_switched_and_a_lost_one_is_left_alone() -> None:
    played = Played()
    for _ in range(40):
        played.run("k", 0.2)
    count = len(played.switches)
    for _ in range(100):
        played.look()
    assert len(played.switches) == count
    played.governor.handle(Failed("a"))
    for _ in range(100):
        played.look("new")
    assert len(played.switches) == count
    assert played.governor.cap("a") is None


def test_an_execution_during_which_the_clock_changed_says_nothing() -> None:
    played = Played()
    for _ in range(2):
        played.run("k", 0.2)
    began = played.now
    played.look("k")
    assert [at for at, _, _ in played.switches] == [played.now]
    played.governor.handle(Ran("a", "k", 999.0, began, played.now + 1))
    assert played.governor.sensitivity("k") == 1.0, "no sample below full clock yet"


def test_a_kind_that_was_not_seen_at_full_clock_for_long_is_measured_anew() -> None:
    played = Played()
    for _ in range(20):
        played.run("k", 0.2)
    assert played.mhz < TOP
    for _ in range(210):
        played.run("k", 0.2)
    assert TOP in [to for _, _, to in played.switches[2:]]


def test_the_simulated_device_has_a_clock_that_kernels_feel_as_their_sensitivity_says() -> None:
    assert Kernel(64.0, 0.5).seconds(32, 0.5) == pytest.approx(5.0)
    assert Kernel(64.0, 0.5, sensitivity=0.0).seconds(32, 0.5) == pytest.approx(2.5)
    device = Device(32, clock=0.5)
    device.open("c")
    device.launch("c", Kernel(64.0, sensitivity=0.5), "tag")
    assert device.next_at() == pytest.approx(3.0)
    with pytest.raises(ValueError, match="part of the highest"):
        Device(clock=0.0)


class GovernorMachine(RuleBasedStateMachine):
    """Whatever runs in whatever order: a clock of the chip, no lower than allowed, never switched more often than
    said."""

    def __init__(self) -> None:
        super().__init__()
        self.played = Played()

    @rule(key=st.sampled_from(["x", "y", "z"]), sensitivity=st.floats(0, 1), again=st.integers(1, 8))
    def run(self, key: str, sensitivity: float, again: int) -> None:
        for _ in range(again):
            self.played.run(key, sensitivity)

    @rule(keys=st.lists(st.sampled_from(["x", "y", "z", "new", None]), max_size=3), times=st.integers(1, 50))
    def look(self, keys: list[str | None], times: int) -> None:
        for _ in range(times):
            self.played.look(*keys)

    @rule(key=st.sampled_from(["x", "y"]), seconds=st.floats(-1, 1e6))
    def odd(self, key: str, seconds: float) -> None:
        self.played.governor.handle(Ran("a", key, seconds, self.played.now - 1, self.played.now))

    @invariant()
    def within(self) -> None:
        assert self.played.mhz in CLOCKS
        assert self.played.mhz >= POLICY.least * TOP
        last = float("-inf")
        for at, before, after in self.played.switches:
            assert at - last >= (POLICY.up_after if after > before else POLICY.down_after)
            assert after != before
            last = at


TestGovernor = GovernorMachine.TestCase
