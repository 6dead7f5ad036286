"""Any sequence of launches, copies, moves, allocations and faults: a job ends once, no TPC or byte is there twice."""

from __future__ import annotations

import math
import os
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nbos_cluster.simdevice import Device, DeviceFault, Done, EqualShares, Kernel, OutOfMemory, Slices, TimeSlices

STEPS = int(os.environ.get("NBOS_MACHINE_STEPS", "2400"))
TPCS, MEMORY = 8, 1000
CLIENTS = st.sampled_from("abc")
SOME_TPCS = st.frozensets(st.integers(0, TPCS - 1), min_size=1)
KERNELS = st.builds(Kernel, m=st.floats(0.001, 5), b=st.floats(0, 1), width=st.integers(0, TPCS))


class Played(RuleBasedStateMachine):
    @initialize(way=st.sampled_from([Slices, EqualShares, TimeSlices]))
    def start(self, way: type[Slices] | type[EqualShares] | type[TimeSlices]) -> None:
        sharing = TimeSlices(turn=0.3, switch=0.02) if way is TimeSlices else way()
        self.device = Device(TPCS, MEMORY, sharing, bandwidth=100.0)
        self.names = 0
        self.open: dict[int, tuple[str, float]] = {}
        """Jobs that have not ended: client, and the time they need at least."""
        self.launched: dict[int, float] = {}
        self.ended: Counter[object] = Counter()
        self.allocated = Counter[str]()
        for client in "abc":
            self.device.open(client, memory=600)

    def take(self, to: float) -> None:
        before = self.device.now
        for outcome in self.device.advance(to):
            assert before <= outcome.at <= to
            before = outcome.at
            assert isinstance(outcome.tag, int)
            client, least = self.open.pop(outcome.tag)
            assert outcome.client == client
            self.ended[outcome.tag] += 1
            if isinstance(outcome, Done):
                assert outcome.at - self.launched[outcome.tag] >= least * (1 - 1e-9) - 1e-12

    @rule(kernels=st.lists(KERNELS, min_size=3, max_size=3), later=st.floats(0.1, 2))
    def crowd(self, kernels: list[Kernel], later: float) -> None:
        """Everybody has a kernel, and some time passes: what ends makes room for those that overlap with it."""
        for client, kernel in zip("abc", kernels, strict=True):
            self.launch(client, kernel)
        self.take(self.device.now + later)

    @rule(client=CLIENTS, kernel=KERNELS)
    def launch(self, client: str, kernel: Kernel) -> None:
        try:
            self.device.launch(client, kernel, self.names)
        except DeviceFault:
            return
        self.open[self.names], self.launched[self.names] = (client, kernel.seconds(TPCS)), self.device.now
        self.names += 1

    @rule(client=CLIENTS, size=st.integers(1, 500))
    def copy(self, client: str, size: int) -> None:
        try:
            self.device.copy(client, size, self.names)
        except DeviceFault:
            return
        self.open[self.names], self.launched[self.names] = (client, size / 100.0), self.device.now
        self.names += 1

    @rule(client=CLIENTS, tpcs=SOME_TPCS)
    def confine(self, client: str, tpcs: frozenset[int]) -> None:
        self.device.confine(client, tpcs)

    @rule(client=CLIENTS, size=st.integers(1, 700))
    def allocate(self, client: str, size: int) -> None:
        try:
            self.device.allocate(client, size)
        except (OutOfMemory, DeviceFault):
            return
        self.allocated[client] += size

    @rule(client=CLIENTS)
    def free(self, client: str) -> None:
        if self.allocated[client]:
            self.device.free(client, self.allocated.pop(client))

    @rule(seconds=st.floats(0, 3))
    def pass_time(self, seconds: float) -> None:
        self.take(self.device.now + seconds)

    @rule(client=CLIENTS)
    def fault(self, client: str) -> None:
        self.device.fault("an illegal access", client)
        self.allocated.pop(client, None)

    @rule(client=CLIENTS)
    def restart(self, client: str) -> None:
        self.device.close(client)
        self.device.open(client, memory=600)
        self.allocated.pop(client, None)

    @invariant()
    def nothing_is_there_twice(self) -> None:
        if not hasattr(self, "device"):
            return
        held = [t for client in "abc" for t in self.device.holds(client)]
        assert len(held) == len(set(held))
        used = {client: self.device.used(client) for client in "abc"}
        assert used == {client: self.allocated[client] for client in "abc"}
        assert sum(used.values()) <= MEMORY
        assert max(used.values()) <= 600

    def teardown(self) -> None:
        """Whatever happened, everything ends in finite time, once."""
        if not hasattr(self, "device"):
            return
        for _ in range(100_000):
            if (at := self.device.next_at()) == math.inf:
                break
            self.take(at)
        assert self.open == {}
        assert set(self.ended.values()) <= {1}
        for client in "abc":
            busy, work = self.device.use(client)
            assert work <= busy * (1 + 1e-9) + 1e-12
            assert busy <= TPCS * self.device.now * (1 + 1e-9) + 1e-12


TestPlayed = Played.TestCase
TestPlayed.settings = settings(max_examples=STEPS // 40, stateful_step_count=40, deadline=None)
