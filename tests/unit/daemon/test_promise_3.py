"""Promise 3, attacked: any sequence of requests, ends, cancellations, broken devices and restarts of the daemon.

Invariants: no TPC, device or byte granted twice; who waits is not granted; once new requests stop coming and running
cells end, everybody who waits is served within as many ends as there are cells (bounded waiting).
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_daemon.ledger import Ledger, Request
from gpu_daemon.queue import Admit, Arrive, Ended, FairQueue, Instruction, Leave, Refuse, Room
from gpu_daemon.simulated import simulated
from nbos_cluster.records import GrantRecord, Resources

DEVICES = (*simulated("h", 2, "H200", tpcs=6, memory=600), *simulated("g", 1, "A100", tpcs=4, memory=400))
RESOURCES = st.one_of(
    st.builds(
        Resources, gpus=st.integers(1, 4), memory=st.sampled_from([0, 0, 300, 500]), model=st.sampled_from(["", "H"])
    ),
    st.builds(Resources, tpcs=st.integers(1, 7), memory=st.sampled_from([0, 0, 50, 300, 700])),
)


class PromiseThree(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(Ledger("h", DEVICES))
        self.now = 0.0
        self.names = 0
        self.running: dict[str, GrantRecord] = {}
        self.waiting: set[str] = set()

    def take(self, instructions: list[Instruction]) -> None:
        for step in instructions:
            if isinstance(step, Admit):
                self.waiting.discard(step.grant.grant)
                self.running[step.grant.grant] = step.grant
            elif isinstance(step, Refuse):
                self.waiting.discard(step.grant)

    @rule(resources=RESOURCES, owner=st.sampled_from("abc"), wait=st.booleans(), later=st.floats(0, 100))
    def arrive(self, resources: Resources, owner: str, wait: bool, later: float) -> None:
        self.now += later
        self.names += 1
        name = f"g{self.names}"
        self.waiting.add(name)
        request = Request(name, owner, "k" + owner, 0, self.names, resources)
        self.take(self.queue.handle(Arrive(request, self.now, wait)))
        if not wait:
            assert name not in self.waiting

    @precondition(lambda self: self.running)
    @rule(data=st.data(), used=st.booleans())
    def end(self, data: st.DataObject, used: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[name]
        self.now += 1
        self.take(self.queue.handle(Ended(name, self.now, used)))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        self.waiting.discard(name)
        self.take(self.queue.handle(Leave(name, self.now)))

    @rule(device=st.sampled_from(DEVICES), healthy=st.booleans())
    def health(self, device: object, healthy: bool) -> None:
        self.queue.ledger.set_health(device.uuid, healthy, "")  # type: ignore[attr-defined]
        self.take(self.queue.handle(Room(self.now)))

    @rule()
    def restart(self) -> None:
        """The daemon starts again: grants of living replicas are restored, those who waited bid again (later)."""
        ledger = Ledger("h", DEVICES)
        self.queue = FairQueue(ledger)
        for record in self.running.values():
            assert ledger.restore(record) is None
            self.queue.restored(record, self.now)
        self.waiting.clear()

    @invariant()
    def no_tpc_or_byte_twice(self) -> None:
        self.queue.validate_state()
        for device in DEVICES:
            shares = [s for r in self.running.values() for s in r.shares if s.uuid == device.uuid]
            tpcs = [t for s in shares for t in s.tpcs]
            assert len(tpcs) == len(set(tpcs))
            assert all(0 <= t < device.tpcs for t in tpcs)
            assert sum(s.memory for s in shares) <= device.memory
            assert len(shares) == 1 or not any(s.whole for s in shares)

    @invariant()
    def the_books_are_what_was_handed_out(self) -> None:
        assert self.queue.ledger.grants == self.running
        assert set(self.queue.order(self.now)) == self.waiting

    @invariant()
    def nobody_waits_for_ever(self) -> None:
        """Played on a copy: end the running cells one by one; everybody gets in, or can never."""
        if not self.waiting:
            return
        twin = _copy(self.queue, self.now)
        running, served = list(self.running), set()
        for _ in range(len(self.running) + len(self.waiting)):
            if not running:
                break
            for step in twin.handle(Ended(running.pop(0), self.now)):
                if isinstance(step, Admit):
                    served.add(step.grant.grant)
                    running.append(step.grant.grant)
                elif isinstance(step, Refuse):
                    served.add(step.grant)
        assert served >= self.waiting


def _copy(queue: FairQueue, now: float) -> FairQueue:
    twin = FairQueue(queue.ledger.copy())
    twin._waiting, twin._head = dict(queue._waiting), queue._head
    twin._running, twin._use = dict(queue._running), {}
    return twin


PromiseThree.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPromiseThree = PromiseThree.TestCase
