"""Lending: idle quota is used by others, its owner has it back within the bound, who is more important never pays."""

from __future__ import annotations

import math
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_daemon.lending import Ask, End, Gave, Hold, Instruction, Lending, Owner, Pause, Recall, Resume, Tick

TPCS = 12
IMPORTANT = Owner("important", frozenset(range(0, 6)), priority=2)
MIDDLE = Owner("middle", frozenset(range(6, 8)), priority=1)
STEADY = Owner("steady", frozenset(range(8, 10)), priority=0)
OTHER = Owner("other", frozenset({10}), priority=0)
OWNERS = (IMPORTANT, MIDDLE, STEADY, OTHER)
EVERY = frozenset(range(TPCS))


def lending(bound: float = 1.0, strict: bool = False) -> Lending:
    return Lending(TPCS, OWNERS, bound, strict)


def test_a_cell_alone_gets_everything_that_is_idle() -> None:
    assert lending().handle(Ask("s", "steady", TPCS, 0.0)) == [Hold("s", EVERY)]


def test_an_owners_cell_gets_its_quota_back_and_the_borrower_the_rest_of_the_bound() -> None:
    one = lending()
    one.handle(Ask("s", "steady", TPCS, 0.0))
    (recall,) = one.handle(Ask("i", "important", 6, 5.0))
    assert recall == Recall("s", IMPORTANT.tpcs, 6.0)
    assert one.next_at() == 6.0
    out = one.handle(Gave("s", IMPORTANT.tpcs, 5.5))
    assert out == [Hold("i", IMPORTANT.tpcs)]
    assert one.next_at() == math.inf
    assert one.held["s"] == EVERY - IMPORTANT.tpcs


def test_who_does_not_give_back_in_time_is_paused_until_it_has() -> None:
    one = lending()
    one.handle(Ask("s", "steady", TPCS, 0.0))
    one.handle(Ask("i", "important", 6, 5.0))
    assert one.handle(Tick(5.9)) == []
    assert one.handle(Tick(6.0)) == [Pause("s")]
    assert one.handle(Tick(7.0)) == []
    out = one.handle(Gave("s", IMPORTANT.tpcs, 7.5))
    assert out == [Resume("s", EVERY - IMPORTANT.tpcs), Hold("i", IMPORTANT.tpcs)]


def test_a_paused_cell_is_given_nothing_until_it_gave_back() -> None:
    one = lending()
    one.handle(Ask("first", "steady", 2, 0.0))
    one.handle(Ask("s", "steady", 6, 0.0))
    one.handle(Ask("i", "important", 6, 1.0))
    assert one.handle(Tick(2.0)) == [Pause("s")]
    assert one.handle(End("first", 2.5)) == []
    owed = one.held["s"] & IMPORTANT.tpcs
    resume, *holds = one.handle(Gave("s", owed, 3.0))
    assert isinstance(resume, Resume)
    assert {hold.cell for hold in holds if isinstance(hold, Hold)} == {"i", "s"}
    assert one.held["s"] >= STEADY.tpcs


def test_what_an_owner_does_not_use_is_lent_again_when_its_cell_is_over_and_not_before() -> None:
    one = lending()
    one.handle(Ask("i", "important", 3, 0.0))
    assert one.handle(Ask("s", "steady", TPCS, 1.0)) == [Hold("s", EVERY - IMPORTANT.tpcs)]
    assert one.handle(End("i", 2.0)) == [Hold("s", EVERY)]


def test_a_loan_goes_to_the_higher_priority_also_when_a_lower_one_has_it_already() -> None:
    one = lending()
    one.handle(Ask("s", "steady", TPCS, 0.0))
    (recall,) = one.handle(Ask("m", "middle", 10, 1.0))
    assert isinstance(recall, Recall)
    assert recall.tpcs >= MIDDLE.tpcs
    assert len(recall.tpcs) == 10
    assert one.handle(Gave("s", recall.tpcs, 1.5)) == [Hold("m", recall.tpcs)]
    assert one.held["s"] == STEADY.tpcs


def test_equal_priority_takes_nothing_away() -> None:
    one = lending()
    one.handle(Ask("s", "steady", TPCS, 0.0))
    (recall,) = one.handle(Ask("o", "other", TPCS, 1.0))
    assert recall == Recall("s", OTHER.tpcs, 2.0)


def test_strict_owners_lend_to_nobody_below_them() -> None:
    one = lending(strict=True)
    assert one.handle(Ask("s", "steady", TPCS, 0.0)) == [Hold("s", frozenset({8, 9, 10, 11}))]
    assert one.handle(Ask("i", "important", TPCS, 0.0))[-1] == Hold("i", frozenset({*range(8)}))


def test_what_cannot_be_is_refused_with_the_story() -> None:
    one = lending()
    with pytest.raises(ValueError, match="nobody"):
        one.handle(Ask("x", "nobody", 1, 0.0))
    one.handle(Ask("s", "steady", TPCS, 0.0))
    with pytest.raises(ValueError, match="latest"):
        one.handle(Gave("s", frozenset({0}), 0.0))
    with pytest.raises(ValueError, match="latest"):
        one.handle(End("t", 0.0))
    with pytest.raises(ValueError, match=r"TPC 0 of b's quota is a's, too"):
        Lending(4, (Owner("a", frozenset({0})), Owner("b", frozenset({0}))))
    with pytest.raises(ValueError, match="not on a device of 4"):
        Lending(4, (Owner("a", frozenset({4})),))


class Lent(RuleBasedStateMachine):
    """Cells come and go, give back in parts, late or never until they are paused. Beside it a book of its own."""

    @initialize(strict=st.booleans())
    def start(self, strict: bool) -> None:
        self.one = lending(strict=strict)
        self.now, self.names = 0.0, 0
        self.owner: dict[str, Owner] = {}
        self.uses: dict[str, set[int]] = {}
        """What each cell may be computing on."""
        self.owes: dict[str, dict[int, float]] = {}
        self.paused: set[str] = set()

    def take(self, instructions: list[Instruction]) -> None:
        for step in instructions:
            if isinstance(step, Hold):
                assert step.cell not in self.paused
                assert step.tpcs > self.uses[step.cell] - set(self.owes[step.cell])
                self.uses[step.cell] |= step.tpcs
            elif isinstance(step, Recall):
                assert step.deadline == self.now + 1.0
                assert not step.tpcs & self.owner[step.cell].tpcs, "what is its own is not taken"
                self.owes[step.cell].update(dict.fromkeys(step.tpcs, step.deadline))
            elif isinstance(step, Pause):
                assert min(self.owes[step.cell].values()) <= self.now
                self.paused.add(step.cell)
            else:
                assert step.tpcs == self.uses[step.cell]
                self.paused.remove(step.cell)

    @rule(owner=st.sampled_from(OWNERS), wants=st.integers(1, TPCS))
    def ask(self, owner: Owner, wants: int) -> None:
        self.names += 1
        name = f"{owner.name}{self.names}"
        self.owner[name], self.uses[name], self.owes[name] = owner, set(), {}
        self.take(self.one.handle(Ask(name, owner.name, wants, self.now)))

    @precondition(lambda self: self.owner)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.over(data.draw(st.sampled_from(sorted(self.owner))))

    def over(self, name: str) -> None:
        for book in (self.owner, self.uses, self.owes):
            del book[name]  # type: ignore[attr-defined]
        self.paused.discard(name)
        self.take(self.one.handle(End(name, self.now)))

    @precondition(lambda self: any(self.owes.values()))
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, owed in self.owes.items() if owed)))
        part = data.draw(st.sets(st.sampled_from(sorted(self.owes[name])), min_size=1))
        self.back(name, part)

    def back(self, name: str, part: set[int]) -> None:
        self.uses[name] -= part
        for tpc in part:
            del self.owes[name][tpc]
        self.take(self.one.handle(Gave(name, frozenset(part), self.now)))

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    def later(self, seconds: float) -> None:
        until = self.now + seconds
        while (at := self.one.next_at()) <= until:
            self.now = at
            self.take(self.one.handle(Tick(self.now)))
        self.now = until

    @invariant()
    def promises(self) -> None:
        if not hasattr(self, "one"):
            return
        self.one.validate_state()
        used = [tpc for uses in self.uses.values() for tpc in uses]
        assert len(used) == len(set(used)), "a TPC is used twice"
        assert {n: frozenset(u) for n, u in self.uses.items()} == dict(self.one.held)
        active = {owner.name for owner in self.owner.values()}
        for name, uses in self.uses.items():
            kept = uses - set(self.owes[name]) - self.owner[name].tpcs
            lenders = {home.name: home for home in OWNERS if home.tpcs & kept}
            assert not active & set(lenders), "never from an owner with a running cell"
            if self.one.strict:
                assert all(home.priority <= self.owner[name].priority for home in lenders.values())
            late = [t for t, deadline in self.owes[name].items() if deadline <= self.now]
            assert not late or name in self.paused or self.one.next_at() <= self.now, "never later than the bound"

    @invariant()
    def an_owners_cell_has_its_quota_once_everything_came_back(self) -> None:
        if not hasattr(self, "one") or any(self.owes.values()):
            return
        for home in OWNERS:
            own = [n for n, owner in self.owner.items() if owner is home]
            free = home.tpcs - {t for n in own for t in self.uses[n]}
            hungry = [n for n in own if self.one._cells[n].lacks]
            assert not (free and hungry)
        # Nobody lacks what lies idle, and no lower priority has on loan what a higher one lacks.
        idle = EVERY - {t for uses in self.uses.values() for t in uses}
        active = {owner.name for owner in self.owner.values()}
        spare = {t for t in idle if not any(t in o.tpcs and o.name in active for o in OWNERS)}
        for name, owner in self.owner.items():
            if not self.one._cells[name].lacks:
                continue
            assert not {t for t in spare if self.one._lendable(t, self.one._cells[name], active)}
            for other, uses in self.uses.items():
                if self.owner[other].priority < owner.priority:
                    loans = uses - self.owner[other].tpcs
                    assert not {t for t in loans if self.one._lendable(t, self.one._cells[name], active)}

    def teardown(self) -> None:
        if not hasattr(self, "one"):
            return
        for name in list(self.owes):
            if self.owes[name]:
                self.back(name, set(self.owes[name]))
        for name in list(self.owner):
            self.over(name)
        assert self.one.handle(Ask("last", "steady", TPCS, self.now))
        if not self.one.strict:
            assert self.one.held["last"] == EVERY


STEPS = int(os.environ.get("NBOS_MACHINE_STEPS", "2400"))
Lent.TestCase.settings = settings(max_examples=STEPS // 40, stateful_step_count=40, deadline=None)
TestLent = Lent.TestCase
