"""Which TPCs the cells are on, beside what the ledger lets them keep: loans of idle TPCs, and their way back. No IO.

The ledger says what a grant keeps until its cell ends. What nobody keeps may be lent; each device with a loan has a
`Lending`, in which every grant is the owner of what it keeps. Guarantees, spelt out in `validate_state`:
- No TPC has two holders: what a new grant is to keep is given to it when the borrower said that it is off it, or is
  gone. Until then the grant is not complete, and its cell does not begin.
- A borrower is never asked for what it keeps.
- What a borrower says of an older version of its slice gives back only what was recalled by then.

Devices without a loan cost nothing here. Times are seconds of the caller's clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from gpu_daemon import lending
from gpu_daemon.book import bits_of
from gpu_daemon.ledger import Ledger
from gpu_daemon.lending import Lending, Owner
from nbos_cluster.records import GrantRecord

WITHIN = 2.0
"""Seconds that a borrower has to give back, before it is late."""


@dataclass(frozen=True)
class Ready:
    """The grant has all that it keeps: its cell may begin."""

    grant: GrantRecord


@dataclass(frozen=True)
class Reslice:
    """What the grant holds changed (`grant`, as it is to be recorded), or what its cell is to be on (`stays`).

    told: the cell must be told. recalled: TPCs that it is to leave, and to say so.
    """

    grant: GrantRecord
    stays: frozenset[int]
    told: bool
    recalled: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Late:
    """The borrower did not give back in time."""

    grant: str


Step = Ready | Reslice | Late


@dataclass
class _Cell:
    """record: what it keeps, as the ledger has it. asked: since when each recalled TPC is recalled (version)."""

    record: GrantRecord
    wants: int
    priority: int
    version: int = 0
    begun: bool = False
    asked: dict[int, int] = field(default_factory=dict)
    shown: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    """What it held and was to be on when a step last said so."""


class Loans:
    """Told of every grant of `ledger` after it was entered there, and of its end. lendable: devices whose slices can
    change while a cell runs. within: seconds until a borrower is late."""

    def __init__(self, ledger: Ledger, lendable: Iterable[str] = (), within: float = WITHIN) -> None:
        self._ledger, self._within = ledger, within
        self.lendable = frozenset(lendable)
        self._cells: dict[str, _Cell] = {}
        """Grants on devices with a loan, and none else."""
        self._lendings: dict[str, Lending] = {}
        self._counts: Mapping[str, int] = {}
        """TPCs of each device that are lent to nobody."""
        self._out: list[lending.Instruction] = []
        self._due: set[str] = set()
        """Grants that gave back, or began, since the last `settle`."""

    # -- questions ----------------------------------------------------------------------------------------------------

    def record(self, name: str, firm: GrantRecord) -> GrantRecord:
        """The grant as it stands: what it keeps and what is lent to it."""
        cell = self._cells.get(name)
        return firm if cell is None else self._as_held(cell)

    def stays(self, name: str) -> frozenset[int] | None:
        """The TPCs that the grant's cell is to be on; None where nothing of it is on loan or wanted."""
        cell = self._cells.get(name)
        share = cell.record.shares[0] if cell is not None and len(cell.record.shares) == 1 else None
        return self._lendings[share.uuid].stays(name) if share is not None else None

    def obtainable(self, uuid: str, priority: int) -> int:
        """TPCs of the device that a borrower of this priority could be on, besides what it keeps."""
        if uuid in self._lendings:
            return self._lendings[uuid].obtainable(priority)
        return self._ledger.book(uuid).free_tpcs - self._counts.get(uuid, 0)

    def next_at(self) -> float:
        return min((one.next_at() for one in self._lendings.values()), default=math.inf)

    @property
    def lent(self) -> dict[str, int]:
        """TPCs on loan, by device."""
        return {
            uuid: sum(len(held - one.owned(name)) for name, held in one.held.items())
            for uuid, one in self._lendings.items()
        }

    def complete(self, name: str) -> bool:
        """Whether the grant has what it keeps, and anything at all."""
        cell = self._cells.get(name)
        return cell is None or all(self._has(name, share.uuid) for share in cell.record.shares)

    def _has(self, name: str, uuid: str) -> bool:
        one = self._lendings.get(uuid)
        return one is None or (bool(one.held[name]) and one.owned(name) <= one.stays(name))

    # -- steps --------------------------------------------------------------------------------------------------------

    def enter(self, record: GrantRecord, wants: int, priority: int, now: float) -> bool:
        """A grant was made; whether it is complete, else `settle` says so in time (`Ready`). wants: TPCs of its one
        device that its cell can use; what it does not keep of them is lent to it."""
        uuids = [share.uuid for share in record.shares]
        keeps = sum(len(share.tpcs) for share in record.shares)
        borrows = len(uuids) == 1 and uuids[0] in self.lendable and wants > keeps
        if borrows and uuids[0] not in self._lendings:
            self._open(uuids[0], record.grant)
        if not any(uuid in self._lendings for uuid in uuids):
            return True
        self._cells[record.grant] = _Cell(record, wants if borrows else 0, priority)
        self._due.add(record.grant)
        for share in record.shares:
            one = self._lendings.get(share.uuid)
            if one is not None:
                one.own(Owner(record.grant, frozenset(share.tpcs), priority))
                most = wants if borrows else len(share.tpcs)
                self._out += one.note(lending.Ask(record.grant, record.grant, max(most, 1), now))
        return False

    def at_once(self, record: GrantRecord) -> bool:
        """Whether a grant that was just entered will be complete without waiting for anybody."""
        if record.grant not in self._cells:
            return True
        found = [(s, self._lendings[s.uuid]) for s in record.shares if s.uuid in self._lendings]
        return all(set(s.tpcs) <= one.free and (s.tpcs or one.free & one.ownerless - one.aside) for s, one in found)

    def restore(self, record: GrantRecord, firm: GrantRecord, priority: int) -> str:
        """A grant of before the daemon's restart, which holds what its record says. Returns what is wrong, or ''."""
        share = record.shares[0] if len(record.shares) == 1 else None
        if share is not None and (share.lent or record.wants) and share.uuid not in self._lendings:
            self._open(share.uuid, record.grant)
        if not any(s.uuid in self._lendings for s in record.shares):
            return ""
        version = record.version + bool(record.wants)  # the cell may have been told what is forgotten: it is told anew
        cell = _Cell(firm, record.wants, priority, version, begun=True)
        for held, kept in zip(record.shares, firm.shares, strict=True):
            one = self._lendings.get(held.uuid)
            if one is None:
                continue
            try:
                one.own(Owner(record.grant, frozenset(kept.tpcs), priority))
                one.place(record.grant, record.grant, record.wants, frozenset(held.tpcs))
            except ValueError as err:
                return str(err)
        self._cells[record.grant] = cell
        self._note(cell)
        return ""

    def leave(self, name: str, now: float) -> None:
        """The grant ended, and nothing of its cell runs any more."""
        cell = self._cells.pop(name, None)
        for share in cell.record.shares if cell is not None else ():
            one = self._lendings.get(share.uuid)
            if one is not None:
                self._out += one.note(lending.End(name, now))
                one.disown(name)

    def gave(self, name: str, version: int, now: float) -> None:
        """The cell is on the slice of that version, and everything that it launched elsewhere is over."""
        cell = self._cells.get(name)
        tpcs = frozenset(t for t, since in cell.asked.items() if since <= version) if cell is not None else frozenset()
        if cell is not None and tpcs:
            for tpc in tpcs:
                del cell.asked[tpc]
            self._out += self._lendings[cell.record.shares[0].uuid].note(lending.Gave(name, tpcs, now))
            self._due.add(name)

    def settle(self, aside: Mapping[str, int], now: float) -> list[Step]:
        """What the steps until now come to. aside: so many TPCs of each device are lent to nobody."""
        self._counts = aside
        out, self._out = self._out, []
        for uuid, one in self._lendings.items():
            chosen = _aside(one, aside.get(uuid, 0))
            if chosen != one.aside:
                out += one.note(lending.SetAside(chosen, now))
            out += one.note(lending.Tick(now)) if one.next_at() <= now else []
            out += one.deal(now)
        steps = self._steps(out, now)
        self._close_idle()
        return steps

    # -- inside -------------------------------------------------------------------------------------------------------

    def _open(self, uuid: str, beside: str) -> None:
        """The device's first borrower comes: whoever is there holds what it keeps."""
        one = self._lendings[uuid] = Lending(self._ledger.book(uuid).device.tpcs, (), self._within)
        for name, record in self._ledger.grants.items():
            kept = [frozenset(s.tpcs) for s in record.shares if s.uuid == uuid]
            if kept and name != beside:
                if name not in self._cells:
                    self._cells[name] = _Cell(record, 0, 0, begun=True)
                one.own(Owner(name, kept[0]))
                one.place(name, name, len(kept[0]), kept[0])
                self._note(self._cells[name])

    def _close_idle(self) -> None:
        for uuid in [uuid for uuid, one in self._lendings.items() if not one.lends]:
            del self._lendings[uuid]
            self._ledger.book(uuid).lent = 0
        if not self._lendings:
            self._cells.clear()
            return
        for name, cell in list(self._cells.items()):
            if not any(share.uuid in self._lendings for share in cell.record.shares):
                del self._cells[name]

    def _steps(self, out: Sequence[lending.Instruction], now: float) -> list[Step]:
        """Who gave comes before who gets, so that no record ever names a TPC that another one names still."""
        out = [*out, *self._not_begun(now)]
        told, self._due = dict.fromkeys(sorted(self._due)), set()
        for step in out:
            if isinstance(step, lending.Hold | lending.Recall | lending.Resume):
                told[step.cell] = None
        steps: list[Step] = []
        for name in told:
            if name in self._cells:
                steps += self._step(self._cells[name])
        steps += [Late(step.cell) for step in out if isinstance(step, lending.Pause)]
        for uuid, one in self._lendings.items():
            held = [t for name, tpcs in one.held.items() for t in tpcs - one.owned(name)]
            self._ledger.book(uuid).lent = bits_of(sorted(held))
        return steps

    def _not_begun(self, now: float) -> list[lending.Instruction]:
        """Nothing runs yet on what a grant has that is not complete: it gives back at once."""
        out: list[lending.Instruction] = []
        for name, cell in self._cells.items():
            if not cell.begun and len(cell.record.shares) == 1:
                one = self._lendings[cell.record.shares[0].uuid]
                recalled = one.held[name] - one.stays(name)
                if recalled:
                    out += one.handle(lending.Gave(name, recalled, now))
        return out

    def _step(self, cell: _Cell) -> list[Step]:
        name = cell.record.grant
        if not cell.begun:
            if not self.complete(name):
                return []
            cell.begun = True
            self._note(cell)
            return [Ready(self._as_held(cell))]
        (held, stays), (was_held, was_on) = self._now(cell), cell.shown
        if (held, stays) == (was_held, was_on):
            return []
        if stays != was_on:
            cell.version += 1
            cell.asked.update({t: cell.version for t in held - stays if t not in cell.asked})
        self._note(cell)
        return [Reslice(self._as_held(cell), stays, stays != was_on, held - stays)]

    def _now(self, cell: _Cell) -> tuple[frozenset[int], frozenset[int]]:
        """Of a grant on one device. A grant of several never borrows, and is never asked for anything."""
        one = self._lendings.get(cell.record.shares[0].uuid)
        name = cell.record.grant
        if one is None or len(cell.record.shares) != 1:
            return frozenset(), frozenset()
        return one.held[name], one.stays(name)

    def _note(self, cell: _Cell) -> None:
        cell.shown = self._now(cell)

    def _as_held(self, cell: _Cell) -> GrantRecord:
        share = cell.record.shares[0]
        one = self._lendings.get(share.uuid)
        if one is None or len(cell.record.shares) != 1:
            return cell.record
        held, kept = one.held[cell.record.grant], frozenset(share.tpcs)
        share = replace(share, tpcs=tuple(sorted(held)), lent=tuple(sorted(held - kept)))
        return replace(cell.record, shares=(share,), wants=cell.wants, version=cell.version)

    def validate_state(self) -> None:
        """Raises AssertionError."""
        grants = self._ledger.grants
        for uuid, one in self._lendings.items():
            one.validate_state()
            there = {name: s for name, g in grants.items() for s in g.shares if s.uuid == uuid}
            assert there.keys() == one.held.keys(), f"grants on {uuid} {there.keys()}, cells {one.held.keys()}"
            for name, share in there.items():
                cell, kept = self._cells[name], frozenset(share.tpcs)
                assert one.owned(name) == kept, f"{name} keeps {sorted(kept)} of {uuid}, not {one.owned(name)}"
                if cell.begun:
                    assert kept <= one.stays(name), (
                        f"{name} runs and lacks {sorted(kept - one.stays(name))} that it keeps"
                    )
                if len(grants[name].shares) == 1:
                    recalled = one.held[name] - one.stays(name)
                    assert not cell.begun or cell.asked.keys() == recalled, f"{name} was asked for {cell.asked.keys()}"
            lent = bits_of(sorted(t for name, held in one.held.items() for t in held - one.owned(name)))
            assert self._ledger.book(uuid).lent == lent, f"what is lent of {uuid} was counted wrong"


def _aside(one: Lending, count: int) -> frozenset[int]:
    """Which TPCs of no owner: those that are free first, and the same as before."""
    if not count:
        return frozenset()
    free, before = one.free, one.aside
    return frozenset(sorted(one.ownerless, key=lambda t: (t not in free, t not in before, -t))[:count])


def firm(record: GrantRecord) -> GrantRecord:
    """What the grant keeps until its cell ends."""
    if not any(share.lent for share in record.shares):
        return record
    shares = tuple(replace(s, tpcs=tuple(sorted({*s.tpcs} - {*s.lent})), lent=()) for s in record.shares)
    return replace(record, shares=shares)
