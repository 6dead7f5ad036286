"""Idle quota is lent, and goes back: who holds which TPCs of one device, without IO or clock.

Every owner has TPCs of its own (its quota) and a priority; a cell gets TPCs of its owner first, then what others do not
use. Guarantees, spelt out in `validate_state`:
- No TPC has two holders, also while it changes hands: it is given on only when its holder said that it is off it.
- Never from an owner with a running cell: as soon as its cell asks, every TPC of its own that is on loan is recalled.
- Never upward in priority: no loan stands in the way of somebody of higher priority than the borrower. Who has the
  higher priority is lent to first, and what a lower one has on loan is recalled for it. With `strict`, an owner's
  TPCs also go to nobody of lower priority than the owner's, however idle they are.
- Back within a bound: a borrower may finish its step, for `bound` seconds; then it is paused, and what it had launched
  until then is all that is still waited for.

Events come in (`Ask`, `End`, `Gave`, `Tick`, `SetAside`), instructions go out (`Hold`, `Recall`, `Pause`, `Resume`).
The caller comes back with a `Tick` at `next_at()`. The accounts of who owns what are the ledger's; this decides between
its grants. In the daemon each grant is an owner of its own (`own`, `disown`): what it keeps until its cell ends is its
quota (`loans`). Times are seconds of one clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

BOUND = 0.0005
"""Seconds that a borrower has to come to the end of its step before it is paused (LithOS' longest atom)."""


@dataclass(frozen=True)
class Owner:
    """tpcs: its quota, by number. priority: larger goes first, as in the queue."""

    name: str
    tpcs: frozenset[int]
    priority: int = 0


@dataclass(frozen=True)
class Ask:
    """A cell of `owner` begins, and can use up to `wants` TPCs."""

    cell: str
    owner: str
    wants: int
    now: float


@dataclass(frozen=True)
class End:
    """The cell is over, nothing of it runs on the device any more."""

    cell: str
    now: float


@dataclass(frozen=True)
class Gave:
    """The cell launches nothing more on these TPCs, and what it had launched there is over."""

    cell: str
    tpcs: frozenset[int]
    now: float


@dataclass(frozen=True)
class Tick:
    now: float


@dataclass(frozen=True)
class SetAside:
    """These TPCs, of no owner here, go to nobody, and come back from whoever has them: an owner that has cells running
    elsewhere may ask for them at any moment."""

    tpcs: frozenset[int]
    now: float


Event = Ask | End | Gave | Tick | SetAside

ASIDE = "\0aside"
"""Whose those are."""


@dataclass(frozen=True)
class Hold:
    """From now on the cell may launch on exactly these TPCs; there are more of them than before."""

    cell: str
    tpcs: frozenset[int]


@dataclass(frozen=True)
class Recall:
    """The cell is to leave these TPCs at the end of its step, by `deadline`, and to say `Gave`."""

    cell: str
    tpcs: frozenset[int]
    deadline: float


@dataclass(frozen=True)
class Pause:
    """The deadline passed: the cell launches nothing more until `Resume`; it still has to say `Gave`."""

    cell: str


@dataclass(frozen=True)
class Resume:
    """The cell gave back what was recalled and goes on, on these TPCs; with none it waits for a `Hold`."""

    cell: str
    tpcs: frozenset[int]


Instruction = Hold | Recall | Pause | Resume


@dataclass
class _Cell:
    name: str
    owner: Owner
    wants: int
    number: int
    held: set[int] = field(default_factory=set)
    recalled: dict[int, float] = field(default_factory=dict)
    """TPCs that it is to leave, and by when."""
    paused: bool = False
    had: set[int] = field(default_factory=set)
    """TPCs that it gave back: where it has a choice it gets the same again."""

    @property
    def stays(self) -> set[int]:
        """TPCs that it has and nobody asked back."""
        return self.held - self.recalled.keys()

    @property
    def lacks(self) -> int:
        return max(0, self.wants - len(self.stays))


class Lending:
    """One device's TPCs. Those of no owner are everybody's to borrow."""

    def __init__(self, tpcs: int, owners: Iterable[Owner], bound: float = BOUND, strict: bool = False) -> None:
        self.tpcs, self.bound, self.strict = tpcs, bound, strict
        self._owners = {owner.name: owner for owner in owners}
        self._home: dict[int, Owner] = {}
        for owner in self._owners.values():
            self._settle(owner)
        self._aside: frozenset[int] = frozenset()
        self._cells: dict[str, _Cell] = {}
        self._free = set(range(tpcs))
        self._count = 0
        self._story: deque[Event] = deque(maxlen=50)

    # -- owners that come and go --------------------------------------------------------------------------------------

    def own(self, owner: Owner) -> None:
        """One more owner; its TPCs may be on loan until its cell asks."""
        if owner.name in self._owners:
            raise ValueError(f"{owner.name} owns TPCs already; latest events: {list(self._story)}")
        self._settle(owner)
        self._owners[owner.name] = owner
        self._aside -= owner.tpcs

    def disown(self, name: str) -> None:
        """The owner is gone, after its cells: what it owned is everybody's to borrow."""
        owner = self._owners.pop(name)
        for tpc in owner.tpcs:
            del self._home[tpc]

    def place(self, cell: str, owner: str, wants: int, tpcs: frozenset[int]) -> None:
        """A cell that is on these TPCs already (the daemon was started again). Raises ValueError where one is taken."""
        if not tpcs <= self._free:
            raise ValueError(f"{sorted(tpcs - self._free)} of {cell} are not free; latest: {list(self._story)}")
        self._ask(Ask(cell, owner, max(wants, len(tpcs), 1), 0.0))
        self._cells[cell].held = set(tpcs)
        self._free -= tpcs

    def _settle(self, owner: Owner) -> None:
        for tpc in owner.tpcs:
            if tpc in self._home or not 0 <= tpc < self.tpcs:
                raise ValueError(
                    f"TPC {tpc} of {owner.name}'s quota is {self._home[tpc].name}'s, too"
                    if tpc in self._home
                    else f"TPC {tpc} of {owner.name}'s quota is not on a device of {self.tpcs}"
                )
        self._home.update(dict.fromkeys(owner.tpcs, owner))

    # -- questions ----------------------------------------------------------------------------------------------------

    @property
    def held(self) -> Mapping[str, frozenset[int]]:
        """TPCs that each cell is on, those included that it is to leave."""
        return {name: frozenset(cell.held) for name, cell in self._cells.items()}

    def on_loan(self, cell: str) -> frozenset[int]:
        """Of what the cell holds, what is not its owner's."""
        return frozenset(self._cells[cell].held - self._cells[cell].owner.tpcs)

    def stays(self, cell: str) -> frozenset[int]:
        """TPCs that the cell has and is not asked to leave."""
        return frozenset(self._cells[cell].stays)

    def owned(self, cell: str) -> frozenset[int]:
        return self._cells[cell].owner.tpcs

    @property
    def ownerless(self) -> frozenset[int]:
        return frozenset(range(self.tpcs)) - self._home.keys()

    @property
    def free(self) -> frozenset[int]:
        return frozenset(self._free)

    @property
    def aside(self) -> frozenset[int]:
        return self._aside

    @property
    def lends(self) -> bool:
        """Whether anything is on loan, wanted on loan, or on its way back."""
        return any(c.wants > len(c.owner.tpcs) or c.recalled or c.held - c.owner.tpcs for c in self._cells.values())

    def obtainable(self, priority: int) -> int:
        """TPCs of no owner that a borrower of this priority could have: what is free, and loans of lower ones."""
        kept = {t for c in self._cells.values() if c.owner.priority >= priority for t in c.held - c.owner.tpcs}
        return len(self.ownerless - self._aside - kept)

    def next_at(self) -> float:
        """When a deadline passes; infinite where none is set."""
        return min(
            (min(c.recalled.values()) for c in self._cells.values() if c.recalled and not c.paused), default=math.inf
        )

    # -- steps --------------------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Instruction]:
        """One step. Raises ValueError for a cell that is not (or already) known, or an owner without an entry."""
        return self.note(event) + self.deal(event.now)

    def note(self, event: Event) -> list[Instruction]:
        """The step without what it means for others: `deal` comes when more such events have been told."""
        self._story.append(event)
        out: list[Instruction] = []
        match event:
            case Ask():
                self._ask(event)
            case End():
                self._free |= self._known(event.cell).held
                del self._cells[event.cell]
            case Gave():
                out += self._gave(event)
            case Tick():
                out += self._late(event.now)
            case SetAside():
                if not event.tpcs <= self.ownerless:
                    raise ValueError(f"{event} names an owner's TPCs; latest events: {list(self._story)}")
                self._aside = event.tpcs
        return out

    def _ask(self, event: Ask) -> None:
        if event.cell in self._cells or event.owner not in self._owners or event.wants < 1:
            raise ValueError(f"{event} cannot be; latest events: {list(self._story)}")
        self._count += 1
        self._cells[event.cell] = _Cell(event.cell, self._owners[event.owner], event.wants, self._count)

    def _gave(self, event: Gave) -> list[Instruction]:
        cell = self._known(event.cell)
        if not event.tpcs <= set(cell.recalled):
            raise ValueError(f"{event}, but it was asked for {sorted(cell.recalled)}; latest: {list(self._story)}")
        for tpc in event.tpcs:
            del cell.recalled[tpc]
        cell.had |= event.tpcs
        cell.held -= event.tpcs
        self._free |= event.tpcs
        if cell.recalled or not cell.paused:
            return []
        cell.paused = False
        return [Resume(cell.name, frozenset(cell.held))]

    def _late(self, now: float) -> list[Instruction]:
        late = [c for c in self._cells.values() if c.recalled and not c.paused and min(c.recalled.values()) <= now]
        for cell in late:
            cell.paused = True
        return [Pause(cell.name) for cell in late]

    # -- decisions ----------------------------------------------------------------------------------------------------

    def deal(self, now: float) -> list[Instruction]:
        """Give out what is free, call back what is owed."""
        order = self._order()
        active = {cell.owner.name for cell in order}
        grown: dict[str, None] = {}
        called: dict[str, set[int]] = {}
        for cell in order:
            self._give(cell, self._free & cell.owner.tpcs, cell.lacks, grown)
        for cell in order:
            loans = cell.stays - cell.owner.tpcs
            self._recall(cell, {t for t in loans if self._active(t, active)}, now, called)
        for cell, lacking in self._short(order, active):
            self._give(cell, {t for t in self._free if self._lendable(t, cell, active)}, lacking, grown)
        for cell, lacking in self._short(order, active, promised=True):
            self._recall_for(cell, lacking, order, active, now, called)
        recalls = [Recall(name, frozenset(tpcs), now + self.bound) for name, tpcs in called.items()]
        return [*recalls, *(Hold(name, frozenset(self._cells[name].stays)) for name in grown)]

    def _order(self) -> list[_Cell]:
        return sorted(self._cells.values(), key=lambda cell: (-cell.owner.priority, cell.number))

    def _give(self, cell: _Cell, tpcs: set[int], most: int, grown: dict[str, None]) -> None:
        """A paused cell is given nothing: it is to get off what it has first."""
        new = sorted(tpcs, key=lambda t: (t not in cell.had, t))[:most] if not cell.paused else []
        if new:
            cell.held.update(new)
            self._free.difference_update(new)
            grown[cell.name] = None

    def _lendable(self, tpc: int, cell: _Cell, active: set[str]) -> bool:
        """Whether this free TPC, which is not the cell's owner's, may go to the cell."""
        home = self._home.get(tpc)
        if home is None:
            return tpc not in self._aside
        return home.name not in active and not (self.strict and home.priority > cell.owner.priority)

    def _recall_for(
        self, cell: _Cell, lacking: int, order: list[_Cell], active: set[str], now: float, called: dict[str, set[int]]
    ) -> None:
        """Loans of lower priorities that `cell` could use, the least important borrower's first."""
        for borrower in reversed(order):
            if lacking <= 0 or borrower.owner.priority >= cell.owner.priority:
                return
            loans = borrower.stays - borrower.owner.tpcs
            taken = sorted(t for t in loans if self._lendable(t, cell, active))[:lacking]
            self._recall(borrower, set(taken), now, called)
            lacking -= len(taken)

    def _short(self, order: list[_Cell], active: set[str], promised: bool = False) -> list[tuple[_Cell, int]]:
        """What each cell lacks when its owner's TPCs are back that are under recall; `promised`: and everybody's.

        A paused cell lacks nothing: it is to get off what it has first.
        """
        coming = [self._whose(t) for cell in order for t in cell.recalled]
        anybodys = sum(name not in active and name != ASIDE for name in coming) if promised else 0
        own = {name: coming.count(name) for name in active}
        short = []
        for cell in order:
            lacks = 0 if cell.paused else cell.lacks
            home = min(lacks, own[cell.owner.name])
            own[cell.owner.name] -= home
            lent = min(lacks - home, anybodys)
            anybodys -= lent
            short.append((cell, lacks - home - lent))
        return short

    def _recall(self, cell: _Cell, tpcs: set[int], now: float, called: dict[str, set[int]]) -> None:
        if tpcs:
            cell.recalled.update(dict.fromkeys(tpcs, now + self.bound))
            called.setdefault(cell.name, set()).update(tpcs)

    def _active(self, tpc: int, active: set[str]) -> bool:
        """Whether the TPC's owner has a running cell."""
        return tpc in self._aside or (tpc in self._home and self._home[tpc].name in active)

    def _whose(self, tpc: int) -> str:
        """The TPC's owner, '' for nobody."""
        home = self._home.get(tpc)
        return home.name if home is not None else ASIDE if tpc in self._aside else ""

    def _known(self, name: str) -> _Cell:
        if name not in self._cells:
            raise ValueError(f"cell {name!r} is not here; latest events: {list(self._story)}")
        return self._cells[name]

    def validate_state(self) -> None:
        """The guarantees that can be seen in a state. Raises AssertionError with the latest events."""
        wrong: list[str] = []
        seen = list(self._free)
        order = self._order()
        active = {cell.owner.name for cell in order}
        short = self._short(order, active, promised=True)
        for cell in order:
            seen += cell.held
            loans = cell.stays - cell.owner.tpcs
            owed = {t for t in loans if self._active(t, active)}
            if owed:
                wrong.append(f"{cell.name} keeps {sorted(owed)} of owners whose cells run")
            if self.strict and any(t in self._home and self._home[t].priority > cell.owner.priority for t in loans):
                wrong.append(f"{cell.name} borrows from a higher priority")
            for other, lacking in short:
                usable = {t for t in loans if self._lendable(t, other, active)}
                if usable and lacking and other.owner.priority > cell.owner.priority:
                    wrong.append(f"{cell.name} keeps {sorted(usable)} on loan, which {other.name} lacks")
            if not set(cell.recalled) <= cell.held or (cell.paused and not cell.recalled):
                wrong.append(f"{cell.name} is to give back {sorted(cell.recalled)} of {sorted(cell.held)}")
        if sorted(seen) != list(range(self.tpcs)):
            wrong.append(f"TPCs are held twice, or by nobody: {sorted(seen)}")
        if wrong:
            raise AssertionError(f"{wrong}; latest events: {list(self._story)}")
