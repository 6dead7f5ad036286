"""Which modules are imported ahead: bounds whatever happens, only what passed, and what the first notebook teaches."""

from __future__ import annotations

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_daemon.preloading import (
    KERNELS,
    PER_OWNER,
    Build,
    Built,
    Event,
    Gone,
    Imported,
    Instruction,
    Judged,
    Look,
    NotBuilt,
    Policy,
    Preloading,
    TrialOver,
    Try,
)

MIB, GIB = 1 << 20, 1 << 30
MODULES = [f"m{number}" for number in range(8)]


class World(RuleBasedStateMachine):
    """A host whose kernels import what they like, whose trials and builds end in any way, and whose packages change."""

    @initialize(most=st.integers(1, 6), memory=st.integers(0, 500), calm=st.floats(0, 60))
    def begin(self, most: int, memory: int, calm: float) -> None:
        self.policy = Policy(most=most, memory=memory * MIB, reserve=GIB, calm=calm, settle=calm / 3)
        self.machine = Preloading(self.policy, frozenset({"m0"}))
        self.now, self.available, self.environment, self.idle = 0.0, 64 * GIB, "1", 1.0
        self.trying: list[str] = []
        self.void = False
        self.building: tuple[str, ...] | None = None
        self.passed: dict[str, int] = {}
        self.look()

    def tell(self, event: Event) -> list[Instruction]:
        steps = self.machine.handle(event)
        for step in steps:
            if isinstance(step, Try):
                assert not self.trying, "two trials at once"
                self.trying = list(step.modules)
            else:
                assert self.building is None, "two builds at once"
                self.check(step.modules)
                self.building = step.modules
        return steps

    def check(self, modules: tuple[str, ...]) -> None:
        assert set(modules) <= self.passed.keys(), "built from what did not pass in this environment"
        assert len(modules) <= self.policy.most
        assert sum(self.passed[m] for m in modules) <= self.policy.memory
        assert "m0" not in modules, "what is imported anyway"
        assert self.available >= self.policy.reserve or not modules, "memory is short"

    @rule(kernel=st.integers(0, 60), owner=st.sampled_from("ab"), modules=st.lists(st.sampled_from(MODULES)))
    def imports(self, kernel: int, owner: str, modules: list[str]) -> None:
        self.tell(Imported(f"{owner}{kernel}", owner, tuple(modules), self.now))

    @precondition(lambda self: self.trying)
    @rule(reason=st.sampled_from(["", "", "it prints"]), seconds=st.floats(0, 3), size=st.integers(0, 300))
    def judged(self, reason: str, seconds: float, size: int) -> None:
        module = self.trying.pop(0)
        self.passed.pop(module, None)
        if not reason and not self.void:
            self.passed[module] = size * MIB
        self.tell(Judged(module, reason, seconds, size * MIB, self.now))
        if reason or not self.trying:
            self.over("")

    @precondition(lambda self: self.trying)
    @rule(trouble=st.sampled_from(["", "no process"]))
    def over(self, trouble: str) -> None:
        self.trying, self.void = [], False
        self.tell(TrialOver(self.now, trouble))

    @precondition(lambda self: self.building is not None)
    @rule(data=st.data())
    def built(self, data: st.DataObject) -> None:
        modules, self.building = self.building or (), None
        failed = data.draw(st.sets(st.sampled_from(modules))) if modules else set()
        for module in failed:
            self.passed.pop(module, None)
        self.tell(Built(modules, dict.fromkeys(failed, "no"), self.now))

    @precondition(lambda self: self.building)
    @rule(data=st.data())
    def not_built(self, data: st.DataObject) -> None:
        culprit = data.draw(st.sampled_from(["", *(self.building or ())]))
        self.building = None
        self.passed.pop(culprit, None)
        steps = self.tell(NotBuilt("threads", culprit, self.now))
        assert not any(isinstance(step, Build) for step in steps), "again at once"

    @rule()
    def parent_dies(self) -> None:
        self.tell(Gone(self.now))

    @rule()
    def packages_change(self) -> None:
        self.environment += "1"
        self.passed.clear()
        self.void = bool(self.trying)
        self.look()

    @rule(mib=st.integers(0, 4000), seconds=st.floats(0, 400), idle=st.floats(0, 2))
    def time_passes(self, mib: int, seconds: float, idle: float) -> None:
        self.available, self.now, self.idle = mib * MIB, self.now + seconds, idle
        self.look()

    def look(self) -> None:
        self.tell(Look(self.available, self.environment, self.now, self.idle))

    @rule()
    def quiet(self) -> None:
        """Everything passes and works, and nothing happens: it comes to rest, with nothing left undone."""
        self.available = 64 * GIB
        for _ in range(40):
            self.now += 700
            self.look()
            while self.trying:
                self.judged("", 1.0, 1)
            if self.building is not None:
                modules, self.building = self.building, None
                self.tell(Built(modules, {}, self.now))
        self.now += 700
        assert not self.tell(Look(self.available, self.environment, self.now))

    @invariant()
    def refusals_have_reasons(self) -> None:
        if hasattr(self, "machine"):
            assert all(self.machine.refused().values())


World.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None, phases=[Phase.generate])
TestWorld = World.TestCase


def host(**policy: float) -> Preloading:
    machine = Preloading(Policy(settle=0.0, **policy))  # type: ignore[arg-type]
    machine.handle(Look(64 * GIB, "1", 0.0))
    return machine


def ran(machine: Preloading, kernel: int, *modules: str, owner: str = "a") -> set[str]:
    """What would be tried, and once everything passed is built, after this kernel."""
    now = 100.0 * (kernel + 1)
    steps = machine.handle(Imported(str(kernel), owner, modules, now))
    steps += machine.handle(Look(64 * GIB, "1", now + 50)) if not steps else []
    while steps:
        step = steps.pop(0)
        if isinstance(step, Build):
            steps += machine.handle(Built(step.modules, {}, now))
            continue
        for module in step.modules:
            machine.handle(Judged(module, "", 1.0, MIB, now))
        steps += machine.handle(TrialOver(now))
    return set(machine.built)


def test_the_first_notebook_teaches_and_what_only_it_used_goes_when_others_do_without() -> None:
    machine = host()
    assert ran(machine, 0, "numpy", "odd") == {"numpy", "odd"}
    later = [ran(machine, number, "numpy") for number in range(1, 12)]
    assert later[1] == {"numpy", "odd"}
    assert later[-1] == {"numpy"}


def test_one_of_many_kernels_with_an_odd_import_changes_nothing() -> None:
    machine = host()
    for number in range(10):
        ran(machine, number, "numpy")
    assert ran(machine, 10, "numpy", "odd") == {"numpy"}
    assert [ran(machine, number, "numpy", "odd") for number in range(11, 17)][-1] == {"numpy", "odd"}


def test_one_owner_with_many_kernels_leaves_room_for_what_others_import() -> None:
    machine = host()
    for number in range(PER_OWNER):
        ran(machine, number, "mine", owner="b")
    for number in range(100, 100 + KERNELS):
        ran(machine, number, "other", owner="a")
    assert set(machine.built) == {"mine", "other"}


def test_a_kernel_counts_once_however_often_it_imports() -> None:
    machine = host()
    for number in range(6):
        ran(machine, number, "numpy")
    for _ in range(50):
        machine.handle(Imported("0", "a", ("odd",), 1000.0))
    assert machine.shares()["odd"] < 0.3


def test_what_saves_most_comes_first_where_there_is_not_room_for_all() -> None:
    machine = host(memory=100 * MIB)
    (step,) = machine.handle(Imported("k", "a", ("large", "quick", "slow"), 1.0))
    assert step == Try(("large", "quick", "slow"))
    for module, seconds, size in (("large", 9.0, 200), ("quick", 0.1, 60), ("slow", 2.0, 60)):
        machine.handle(Judged(module, "", seconds, size * MIB, 1.0))
    assert machine.handle(TrialOver(1.0)) == [Build(("slow",))]


def test_a_module_that_does_not_pass_is_left_out_alone_and_said() -> None:
    machine = host()
    machine.handle(Imported("k", "a", ("bad", "good"), 1.0))
    machine.handle(Judged("bad", "it prints", 1.0, 0, 1.0))
    assert machine.handle(TrialOver(1.0)) == [Try(("good",))]
    machine.handle(Judged("good", "", 1.0, 0, 1.0))
    assert machine.handle(TrialOver(1.0)) == [Build(("good",))]
    assert machine.refused() == {"bad": "it prints"}


def test_a_module_that_spoils_the_parent_is_left_out_of_the_next() -> None:
    machine = host()
    ran(machine, 0, "good", "bad")
    assert machine.handle(Gone(500.0)) == [Build(("bad", "good"))]
    machine.handle(NotBuilt("starts a thread", "bad", 501.0))
    assert machine.handle(Look(64 * GIB, "1", 502.0)) == []
    assert machine.handle(Look(64 * GIB, "1", 510.0)) == [Build(("good",))]


def test_after_an_installation_everything_is_tried_anew_before_it_is_built() -> None:
    machine = host()
    ran(machine, 0, "numpy")
    assert machine.handle(Look(64 * GIB, "2", 500.0)) == []
    assert machine.handle(Look(64 * GIB, "2", 510.0)) == [Try(("numpy",))]
    machine.handle(Judged("numpy", "", 1.0, 0, 511.0))
    assert machine.handle(TrialOver(511.0)) == [Build(("numpy",))]


def test_short_of_memory_the_parent_is_built_without_and_later_with_them_again() -> None:
    machine = host()
    ran(machine, 0, "numpy")
    assert machine.handle(Look(GIB - 1, "1", 500.0)) == [Build(())]
    machine.handle(Built((), {}, 501.0))
    assert machine.handle(Look(8 * GIB, "1", 530.0)) == []
    assert machine.handle(Look(8 * GIB, "1", 570.0)) == [Build(("numpy",))]


def test_what_was_learnt_is_taken_up_again_but_not_what_was_found_out_about_modules() -> None:
    machine = host()
    ran(machine, 0, "numpy")
    later = Preloading(Policy(settle=0.0))
    later.load(machine.dump())
    assert later.shares() == machine.shares()
    assert later.handle(Look(64 * GIB, "1", 0.0)) == [Try(("numpy",))]


def test_cells_that_follow_each_other_are_tried_together() -> None:
    machine = Preloading(Policy(settle=5.0))
    machine.handle(Look(64 * GIB, "1", 0.0))
    assert machine.handle(Imported("k", "a", ("numpy",), 10.0)) == []
    assert machine.handle(Imported("k", "a", ("pandas",), 14.0)) == []
    assert machine.handle(Look(64 * GIB, "1", 18.0)) == []
    assert machine.handle(Look(64 * GIB, "1", 19.0)) == [Try(("numpy", "pandas"))]


def test_on_a_busy_host_cells_go_first_but_not_for_ever() -> None:
    machine = Preloading(Policy(settle=0.0))
    machine.handle(Look(64 * GIB, "1", 0.0, idle=0.1))
    assert machine.handle(Imported("k", "a", ("numpy",), 10.0)) == []
    assert machine.handle(Look(64 * GIB, "1", 200.0, idle=0.2)) == []
    assert machine.handle(Look(64 * GIB, "1", 311.0, idle=0.2)) == [Try(("numpy",))]
    machine.handle(Judged("numpy", "", 1.0, 0, 312.0))
    assert machine.handle(TrialOver(312.0)) == []
    assert machine.handle(Look(64 * GIB, "1", 320.0, idle=1.2)) == [Build(("numpy",))]


def test_nothing_is_learnt_where_that_is_off() -> None:
    machine = host(learn=False)
    assert machine.handle(Imported("k", "a", ("numpy",), 1.0)) == []
    assert not machine.dump()
