"""Who is asked to give device memory back, and what the ledger counts meanwhile: cases, and any sequence of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_daemon.book import Holder
from gpu_daemon.ledger import Busy, Ledger, Request
from gpu_daemon.queue import Admit, Arrive, Brings, Ended, FairQueue, Leave, Room
from gpu_daemon.simulated import simulated
from gpu_daemon.tiers import Ask, Died, Froze, Gave, GivingBack, Measured, Policy, Told, Woke
from nbos_cluster.records import GrantRecord, Resources

DEVICES = simulated("h", 2, "H200", tpcs=4, memory=100)
ONE = DEVICES[:1]
FIRST = DEVICES[0].uuid


class Host:
    """A queue with its ledger and what gives back."""

    def __init__(self, devices: tuple[object, ...] = ONE, **policy: object) -> None:
        self.queue = FairQueue(Ledger("h", devices))  # type: ignore[arg-type]
        self.ledger = self.queue.ledger
        self.giving = GivingBack(self.ledger, Policy(**policy))  # type: ignore[arg-type]
        self.now = 0.0

    def cell(self, kernel: str, left: int, owner: str = "", **resources: int) -> None:
        """A cell of this kernel has run, and left so much."""
        self.now += 1.0
        request = Request(kernel, owner or kernel, kernel, 0, 1, Resources(**resources))  # type: ignore[arg-type]
        (step,) = self.queue.handle(Arrive(request, self.now))
        assert isinstance(step, Admit), step
        uuid = step.grant.shares[0].uuid
        self.giving.handle(Told((kernel, 0), owner or kernel, self.now, {uuid: left}))
        self.queue.handle(Ended(kernel, self.now))
        self.ledger.validate_state()

    def wait(self, kernel: str, owner: str = "", **resources: int) -> list[Ask]:
        """A cell waits; who is asked."""
        self.now += 1.0
        request = Request(kernel, owner or kernel, kernel, 0, 2, Resources(**resources))  # type: ignore[arg-type]
        assert self.queue.handle(Arrive(request, self.now)) == []
        return self.decide()

    def decide(self) -> list[Ask]:
        return self.giving.decide(self.queue.shortage(self.now), self.now)

    def gave(self, kernel: str, left: int = 0, stays: str = "", **more: object) -> list[str]:
        """It answered; who is admitted by that."""
        event = Gave((kernel, 0), "offload", self.now, {FIRST: left} if left else {}, stays)
        self.giving.handle(event)
        self.ledger.validate_state()
        return [step.grant.grant for step in self.queue.handle(Room(self.now)) if isinstance(step, Admit)]

    def why(self) -> str:
        return self.queue.tell_all(self.now)[0].reason


def who(asks: list[Ask]) -> list[tuple[str, str]]:
    return [(ask.holder[0], ask.tier) for ask in asks]


def test_what_a_cell_left_is_granted_to_nobody_else() -> None:
    host = Host()
    host.cell("a", left=60, tpcs=2, memory=60)
    assert isinstance(host.ledger.fit(Resources(tpcs=2, memory=41)), Busy)
    assert not isinstance(host.ledger.fit(Resources(tpcs=2, memory=40)), Busy)
    assert isinstance(host.ledger.fit(Resources(gpus=1)), Busy), "a whole device is a whole device"


def test_its_own_kernel_has_it_within_the_next_grant() -> None:
    host = Host()
    host.cell("a", left=60, tpcs=2, memory=60)
    host.cell("a", left=60, gpus=1)
    host.cell("a", left=70, tpcs=1, memory=10)  # it asks for less than it has there
    assert isinstance(host.ledger.fit(Resources(tpcs=2, memory=31)), Busy)


def test_nobody_is_asked_while_there_is_room() -> None:
    host = Host()
    host.cell("a", left=60, tpcs=2, memory=60)
    host.cell("b", left=30, tpcs=2, memory=40)
    assert host.decide() == []


def test_whoever_waits_reads_what_for_and_gets_it_once_it_is_given_back() -> None:
    host = Host()
    host.cell("a", left=60, tpcs=2, memory=60)
    asks = host.wait("b", tpcs=2, memory=50)
    assert who(asks) == [("a", "offload")]
    assert "waits for 0.0 GiB of GPU 0 that an idle notebook left there and may give back" in host.why()
    assert host.decide() == [], "it is asked once"
    assert host.gave("a") == ["b"]


def test_only_as_many_are_asked_as_it_takes_and_whoever_is_idle_longest_first() -> None:
    host = Host()
    for kernel, left in (("a", 20), ("b", 30), ("c", 20), ("d", 20)):
        host.cell(kernel, left=left, tpcs=1, memory=left)
    assert who(host.wait("w", tpcs=1, memory=30)) == [("a", "offload")], "10 are free"


def test_one_that_suffices_alone_spares_those_that_do_not() -> None:
    host = Host()
    for kernel, left in (("a", 10), ("b", 80)):
        host.cell(kernel, left=left, tpcs=1, memory=left)
    assert who(host.wait("w", tpcs=1, memory=85)) == [("b", "offload")]


def test_ones_own_other_notebooks_go_before_those_of_others() -> None:
    host = Host()
    host.cell("a", left=40, tpcs=1, memory=40, owner="ann")
    host.cell("b", left=40, tpcs=1, memory=40, owner="bob")
    assert who(host.wait("b2", tpcs=1, memory=50, owner="bob")) == [("b", "offload")]


def test_of_two_devices_the_one_that_costs_others_least() -> None:
    host = Host(DEVICES)
    host.cell("a", left=90, gpus=1)
    host.cell("b", left=20, gpus=1)
    assert [len(host.ledger.left((kernel, 0))) for kernel in "ab"] == [1, 1]
    assert who(host.wait("w", gpus=1)) == [("b", "offload")]


def test_a_running_cell_is_never_asked() -> None:
    host = Host()
    host.cell("a", left=60, tpcs=2, memory=60)
    request = Request("a2", "a", "a", 0, 2, Resources(tpcs=1, memory=60))
    (step,) = host.queue.handle(Arrive(request, host.now))
    assert isinstance(step, Admit)
    assert host.wait("b", tpcs=2, memory=50) == []


def test_a_process_that_does_not_answer_is_passed_over_until_its_next_cell() -> None:
    host = Host(at_most="offload", within=10.0, again=1000.0)
    host.cell("a", left=30, tpcs=2, memory=30)
    host.cell("b", left=30, tpcs=2, memory=30)
    assert who(host.wait("w", tpcs=2, memory=70)) == [("a", "offload")]
    host.now += 11
    assert who(host.decide()) == [("b", "offload")]
    assert host.gave("b") == ["w"]
    assert [row.stays for row in host.giving.rows()] == ["it did not answer within 10 s"]
    host.queue.handle(Ended("w", host.now))
    host.cell("a", left=30, tpcs=2, memory=30)
    assert who(host.wait("w2", gpus=1)) == [("a", "offload")]


def test_what_stays_after_an_offload_is_checkpointed_where_that_is_possible() -> None:
    for possible in (True, False):
        host = Host()
        host.giving.checkpoints = "" if possible else "MIG"
        host.cell("a", left=60, gpus=1)
        host.wait("b", gpus=1)
        assert host.gave("a", left=50, stays="a CUDA graph was captured") == []
        assert who(host.decide()) == ([("a", "checkpoint")] if possible else [])
        assert ("may give back" in host.why()) == possible
        if possible:
            host.giving.handle(Gave(("a", 0), "checkpoint", host.now, {}, away=50))
            assert [type(step) for step in host.queue.handle(Room(host.now))] == [Admit]
            assert host.giving.away(("a", 0)) == 50


def test_the_head_of_the_queue_is_not_kept_on_a_device_that_is_not_given_back() -> None:
    host = Host(DEVICES, at_most="offload")
    host.cell("stuck", left=90, gpus=1)
    (step,) = host.queue.handle(Arrive(Request("r", "r", "r", 0, 1, Resources(gpus=1)), host.now))
    assert isinstance(step, Admit)
    host.wait("w", gpus=1)
    host.gave("stuck", left=90, stays="cupy is loaded")
    assert isinstance(host.queue.handle(Arrive(Request("s", "s", "s", 0, 1, Resources(tpcs=1, memory=5)), 9))[0], Admit)
    (step,) = host.queue.handle(Ended("r", host.now))
    assert isinstance(step, Admit)
    assert step.grant.grant == "w"


def test_what_comes_back_is_reserved_with_the_grant_that_it_comes_back_under() -> None:
    host = Host()
    host.cell("b", left=50, tpcs=1, memory=50)
    request = Request("a", "a", "a", 0, 1, Resources(tpcs=1, memory=10), away=60)
    assert host.queue.handle(Arrive(request, host.now)) == [], "10 would do, but 60 come back"
    assert host.gave("b") == ["a"]
    assert isinstance(host.ledger.fit(Resources(tpcs=1, memory=41)), Busy)
    host.queue.handle(Ended("a", host.now, used=False))
    assert not isinstance(host.ledger.fit(Resources(gpus=1)), Busy), "its claim was lost: nothing came"


def test_what_stayed_and_what_comes_back_both_count() -> None:
    host = Host()
    host.cell("a", left=40, tpcs=1, memory=40)
    request = Request("a", "a", "a", 0, 1, Resources(tpcs=1, memory=10), away=30)
    (step,) = host.queue.handle(Arrive(request, host.now))
    assert isinstance(step, Admit)
    assert isinstance(host.ledger.fit(Resources(tpcs=1, memory=31)), Busy)
    assert not isinstance(host.ledger.fit(Resources(tpcs=1, memory=30)), Busy)


def test_what_another_library_holds_is_known_from_nvml() -> None:
    host = Host()
    request = Request("a", "a", "a", 0, 1, Resources(gpus=1))
    host.queue.handle(Arrive(request, host.now))
    host.giving.handle(Measured(("a", 0), {FIRST: 70}))
    host.giving.handle(Told(("a", 0), "a", host.now, {FIRST: 10}, peak={FIRST: 20}))
    host.queue.handle(Ended("a", host.now))
    assert host.ledger.left(("a", 0)) == {FIRST: 60}, "10 of torch, and 50 that torch never had"
    host.giving.handle(Measured(("a", 0), {FIRST: 30}))
    assert host.ledger.left(("a", 0)) == {FIRST: 30}


@dataclass
class Process:
    """The truth about one replica: bytes on devices, those of them that torch does not know, bytes in host memory, and
    those that the driver holds, its running grant; what the daemon has on its disk of what it has on devices."""

    on: dict[str, int] = field(default_factory=dict)
    library: dict[str, int] = field(default_factory=dict)
    parked: int = 0
    frozen: int = 0
    grant: GrantRecord | None = None
    asked: list[Ask] = field(default_factory=list)
    disk: dict[str, int] = field(default_factory=dict)
    noted: bool = False
    """The disk says that it is being frozen, or is frozen."""
    wants: Resources | None = None
    """What its cell asks for, while room for what the driver holds is asked for first."""


KERNELS = ["a", "b", "c", "d", "e"]
OWNER = {"a": "ann", "b": "ann", "c": "cid", "d": "dan", "e": "eve"}
SIZES = st.integers(0, 100)


class Tiers(RuleBasedStateMachine):
    """Promise 3 with warm leftovers: what processes really have, and what others were granted, fits on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.start()
        self.now, self.names = 0.0, 0
        self.processes = {kernel: Process() for kernel in KERNELS}
        self.waiting: dict[str, str] = {}

    # -- the daemon's side --------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.queue = FairQueue(Ledger("h", DEVICES))
        self.giving = GivingBack(self.queue.ledger, Policy(within=10.0, again=30.0))
        self.giving.checkpoints = ""

    def save(self, kernel: str) -> None:
        self.processes[kernel].disk = dict(self.queue.ledger.left(self.holder(kernel)))

    def do(self, event: Arrive | Leave | Ended | Brings | Room) -> None:
        for step in self.queue.handle(event):
            assert isinstance(step, Admit), step
            kernel = step.grant.kernel
            del self.waiting[kernel]
            if self.processes[kernel].frozen:
                self.thaw(kernel, step.grant)
            else:
                self.begin(self.processes[kernel], step.grant)
        self.ask()

    def thaw(self, kernel: str, room: GrantRecord) -> None:
        """What the driver held is on the device for which room was found; then its cell asks for what it wants."""
        process, first = self.processes[kernel], room.shares[0].uuid
        assert first in self.queue.ledger.homes[self.holder(kernel)], "it cannot be restored there"
        process.disk = {first: process.frozen}
        process.on, process.frozen, process.noted = {first: process.frozen}, 0, False
        self.giving.handle(Woke(self.holder(kernel), first))
        self.queue.ledger.homes[self.holder(kernel)] = frozenset([first])
        self.save(kernel)
        wanted, process.wants = process.wants, None
        self.do(Ended(room.grant, self.now))
        if wanted is not None:
            self.arrive(kernel, wanted)

    def arrive(self, kernel: str, resources: Resources) -> None:
        process = self.processes[kernel]
        self.names += 1
        name = self.waiting[kernel] = f"g{self.names}"
        if process.frozen:
            process.wants, resources = resources, Resources(tpcs=1, memory=1)
        away = max(process.parked, process.frozen)
        self.do(Arrive(Request(name, OWNER[kernel], kernel, 0, 1, resources, away=away), self.now))

    def ask(self) -> None:
        for ask in self.giving.decide(self.queue.shortage(self.now), self.now):
            process = self.processes[ask.holder[0]]
            assert process.grant is None, "a running cell was asked"
            assert self.waiting, "nobody waits"
            assert sum(process.on.values()), "it has nothing"
            assert ask.tier not in [a.tier for a in process.asked] or self.now >= 10
            process.asked.append(ask)

    def begin(self, process: Process, grant: GrantRecord) -> None:
        """What waits in host memory is on the granted device before the first line."""
        process.grant, first = grant, grant.shares[0].uuid
        process.on[first] = process.on.get(first, 0) + process.parked
        process.parked = 0

    def holder(self, kernel: str) -> Holder:
        return (kernel, 0)

    # -- what happens -------------------------------------------------------------------------------------------------

    @rule(kernel=st.sampled_from(KERNELS), tpcs=st.integers(0, 4), memory=SIZES, two=st.booleans())
    def bids(self, kernel: str, tpcs: int, memory: int, two: bool) -> None:
        process = self.processes[kernel]
        checkpointing = any(ask.tier == "checkpoint" for ask in process.asked)
        if process.grant is not None or kernel in self.waiting or checkpointing:
            return
        if max(process.on.values(), default=0) + process.parked > 100:
            self.it_dies(kernel)  # its user is told to restart it: no device has room for what comes back
        self.arrive(kernel, Resources(tpcs=tpcs, memory=memory) if tpcs else Resources(gpus=1 + two))

    @rule(kernel=st.sampled_from(KERNELS), part=st.floats(0, 1), library=st.booleans())
    def a_cell_ends(self, kernel: str, part: float, library: bool) -> None:
        """It leaves up to what it was granted. library: half of it is not torch's, and only NVML knows."""
        process = self.processes[kernel]
        if process.grant is None:
            return
        grant = process.grant
        for share in grant.shares:
            process.on[share.uuid] = int(part * max(share.memory, process.on.get(share.uuid, 0)))
        process.library = {uuid: size // 2 for uuid, size in process.on.items()} if library else {}
        if library:
            self.giving.handle(Measured(self.holder(kernel), dict(process.on)))
        told = {uuid: size - process.library.get(uuid, 0) for uuid, size in process.on.items()}
        process.grant, process.asked = None, []
        self.giving.handle(Told(self.holder(kernel), OWNER[kernel], self.now, told, peak=told))
        self.save(kernel)
        self.do(Ended(grant.grant, self.now))

    @rule(kernel=st.sampled_from(KERNELS), stays=st.floats(0, 1))
    def it_answers(self, kernel: str, stays: float) -> None:
        process = self.processes[kernel]
        if not process.asked or process.grant is not None:
            return
        ask = process.asked.pop(0)
        if ask.tier == "offload":
            known = {uuid: size - process.library.get(uuid, 0) for uuid, size in process.on.items()}
            left = {uuid: int(size * stays) for uuid, size in known.items()}
            process.on = {uuid: size - known[uuid] + left[uuid] for uuid, size in process.on.items()}
            process.parked += sum(known.values()) - sum(left.values())
            if kernel in self.waiting and max(process.on.values(), default=0) + process.parked <= 100:
                self.queue.handle(Brings(self.waiting[kernel], process.parked, self.now))
            elif kernel in self.waiting:
                self.do(Leave(self.waiting.pop(kernel), self.now))
            reason = "something holds it" if any(process.on.values()) else ""
            self.gave(Gave(self.holder(kernel), "offload", self.now, left, reason))
        elif stays < 0.5 and kernel not in self.waiting and len([s for s in process.on.values() if s]) == 1:
            self.freeze(process, kernel, remaps=stays < 0.25)
            self.gave(Gave(self.holder(kernel), "checkpoint", self.now, {}, away=process.frozen))
        else:
            self.gave(Gave(self.holder(kernel), "checkpoint", self.now, None, "the driver refuses"))

    @precondition(lambda self: not self.waiting)
    @rule(kernel=st.sampled_from(KERNELS), freezes=st.floats(0, 1))
    def somebody_wants_all_that_is_left(self, kernel: str, freezes: float) -> None:
        """Steps that are rare by themselves: what offload leaves is asked of the driver."""
        for other in KERNELS:
            self.a_cell_ends(other, 1.0, False)
        self.bids(kernel, 0, 0, True)
        for stays in (1.0, freezes):
            for other, process in list(self.processes.items()):
                if process.asked:
                    self.it_answers(other, stays)

    def freeze(self, process: Process, kernel: str, remaps: bool) -> None:
        home = next(uuid for uuid, size in process.on.items() if size)
        process.frozen, process.on, process.library, process.noted = process.on[home], {}, {}, True
        homes = [device.uuid for device in DEVICES] if remaps else [home]
        self.queue.ledger.homes[self.holder(kernel)] = frozenset(homes)

    def gave(self, event: Gave) -> None:
        self.giving.handle(event)
        self.save(event.holder[0])
        self.do(Room(self.now))

    @rule(kernel=st.sampled_from(KERNELS), got=st.sampled_from(["noted", "frozen"]))
    def the_daemon_is_killed(self, kernel: str, got: str) -> None:
        """Perhaps while it froze this process. The next one finds who lives, and what the disk says of them."""
        process = self.processes[kernel]
        if (
            process.asked
            and process.asked[0].tier == "checkpoint"
            and process.grant is None
            and any(process.on.values())
        ):
            process.noted = True
            if got == "frozen" and len([size for size in process.on.values() if size]) == 1:
                self.freeze(process, kernel, remaps=False)
        homes = dict(self.queue.ledger.homes)
        self.start()
        self.waiting.clear()
        for name, one in self.processes.items():
            whose, one.asked, one.wants = self.holder(name), [], None
            self.giving.handle(Told(whose, OWNER[name], self.now, one.disk))
            if one.noted:
                self.giving.handle(Froze(whose, one.frozen or sum(one.on.values())))
            elif one.grant is None:  # it says hello, and NVML is looked at, before anything is decided
                told = {uuid: size - one.library.get(uuid, 0) for uuid, size in one.on.items()}
                self.giving.handle(Told(whose, OWNER[name], self.now, told, peak=told))
                self.giving.handle(Measured(whose, dict(one.on)))
            if whose in homes:
                self.queue.ledger.homes[whose] = homes[whose]
            if one.grant is not None:
                assert self.queue.restore(one.grant, self.now) == ""
        self.ask()

    @rule(kernel=st.sampled_from(KERNELS))
    def it_is_looked_at_again(self, kernel: str) -> None:
        """The driver says how a process stands that an earlier daemon was freezing; or it is ended."""
        process = self.processes[kernel]
        if not process.noted or kernel in self.waiting:
            return
        if process.frozen:
            self.giving.handle(Froze(self.holder(kernel), process.frozen, certain=True))
            self.save(kernel)
            self.do(Room(self.now))
        else:
            self.it_dies(kernel)

    @rule(kernel=st.sampled_from(KERNELS))
    def it_dies(self, kernel: str) -> None:
        process, self.processes[kernel] = self.processes[kernel], Process()
        self.giving.handle(Died(self.holder(kernel)))
        self.queue.ledger.homes.pop(self.holder(kernel), None)
        if kernel in self.waiting:
            self.do(Leave(self.waiting.pop(kernel), self.now))
        if process.grant is not None:
            self.do(Ended(process.grant.grant, self.now))
        self.do(Room(self.now))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def it_is_interrupted(self, data: st.DataObject) -> None:
        kernel = data.draw(st.sampled_from(sorted(self.waiting)))
        self.do(Leave(self.waiting.pop(kernel), self.now))

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do(Room(self.now))

    # -- what holds ---------------------------------------------------------------------------------------------------

    @invariant()
    def no_byte_twice(self) -> None:
        self.queue.validate_state()
        for device in DEVICES:
            taken = 0
            for process in self.processes.values():
                shares = process.grant.shares if process.grant is not None else ()
                granted = sum(share.memory for share in shares if share.uuid == device.uuid)
                taken += max(granted, process.on.get(device.uuid, 0))
            assert taken <= device.memory, f"{taken} of {device.memory} bytes"

    @invariant()
    def the_ledger_never_counts_less_than_there_is(self) -> None:
        for kernel, process in self.processes.items():
            known = self.queue.ledger.left(self.holder(kernel))
            granted = {s.uuid: s.memory for s in process.grant.shares} if process.grant is not None else {}
            for uuid, size in process.on.items():
                assert size <= max(known.get(uuid, 0), granted.get(uuid, 0)), (kernel, uuid)

    def teardown(self) -> None:
        """When every cell ends and every process gives back (or is ended, where it cannot), all who wait get in."""
        for _ in range(60):
            for kernel in KERNELS:
                self.it_is_looked_at_again(kernel)
                process = self.processes[kernel]
                if sum(map(bool, process.library.values())) > 1 and process.grant is None:
                    self.it_dies(kernel)
                process = self.processes[kernel]
                if process.grant is not None:
                    self.a_cell_ends(kernel, 1.0, False)
                while process.asked and process.grant is None:
                    self.it_answers(kernel, 0.0)
            self.now += 31.0
            self.do(Room(self.now))
        assert not self.waiting, self.queue.tell_all(self.now)


Tiers.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestTiers = Tiers.TestCase
