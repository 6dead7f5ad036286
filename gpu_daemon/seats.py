"""The room that reservations keep on the devices for members who are not there yet. No IO.

A seat that nobody sits on is kept on a device that has room for it now; where none has, on one that will have when
others' cells end. What is kept is counted, not numbered: which TPCs a member gets is decided when the member comes.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpu_daemon.book import Book
from gpu_daemon.ledger import Kept, Ledger, share_of
from gpu_daemon.reservations import Calendar, Reservation
from gpu_daemon.shares import Holdings
from nbos_cluster.records import Resources

Wanted = tuple[int, Resources]
"""So many seats of that shape."""


class Seats:
    """What `calendar` keeps of `ledger`'s devices, given who holds what."""

    def __init__(self, ledger: Ledger, calendar: Calendar, holdings: Holdings) -> None:
        self._ledger, self._calendar, self._holdings = ledger, calendar, holdings
        self._known: dict[tuple[str, ...], Kept] = {}

    def changed(self) -> None:
        """Something was granted, given back, or failed."""
        self._known.clear()

    def seated(self, owner: str, groups: Sequence[str], asked: Resources, wall: float) -> Reservation | None:
        """The reservation that holds now and whose seat covers the request."""
        for reservation in self._calendar.between(wall, wall):
            if self.covers(reservation, owner, groups, asked):
                return reservation
        return None

    def covers(self, reservation: Reservation, owner: str, groups: Sequence[str], asked: Resources) -> bool:
        """Whether the owner has a seat, or could take one, on which the request has room."""
        seat, held = reservation.seat, self._holdings.of("users", owner)
        if not reservation.member(owner, groups):
            return False
        gpus = held.devices + asked.gpus if asked.gpus else 0
        tpcs = held.tpcs + asked.tpcs if asked.tpcs else 0
        if gpus > seat.gpus or tpcs > seat.tpcs or (seat.memory and asked.memory > seat.memory):
            return False
        return self._sits(reservation, owner) or self._taken(reservation) < reservation.seats

    def kept(self, reservations: Sequence[Reservation]) -> Kept:
        """What these keep: TPCs and bytes by device."""
        key = tuple(r.name for r in reservations)
        if key not in self._known:
            kept: dict[str, tuple[int, int]] = {}
            for reservation in reservations:
                for count, seat in self._wanted(reservation):
                    self._keep(kept, count, seat)
            self._known[key] = kept
        return self._known[key]

    def _sits(self, reservation: Reservation, owner: str) -> bool:
        held = self._holdings.of("users", owner)
        return bool(held.devices if reservation.seat.gpus else held.tpcs)

    def _members(self, reservation: Reservation) -> list[str]:
        """The members who hold something."""
        return [
            owner
            for owner, groups in self._holdings.owners().items()
            if reservation.member(owner, groups) and self._sits(reservation, owner)
        ]

    def _taken(self, reservation: Reservation) -> int:
        return len(self._members(reservation))

    def _wanted(self, reservation: Reservation) -> list[Wanted]:
        """The seats without anybody, and what is left of those with somebody."""
        seat, members = reservation.seat, self._members(reservation)
        wanted: list[Wanted] = []
        for owner in members[: reservation.seats]:
            held = self._holdings.of("users", owner)
            gpus, tpcs = max(0, seat.gpus - held.devices), max(0, seat.tpcs - held.tpcs)
            if gpus or tpcs:
                wanted.append((1, Resources(gpus=gpus, tpcs=tpcs, memory=max(0, seat.memory - held.memory))))
        empty = reservation.seats - len(members)
        return [*wanted, (empty, seat)] if empty > 0 else wanted

    def _keep(self, kept: dict[str, tuple[int, int]], count: int, seat: Resources) -> None:
        left = count * max(seat.gpus, 1)
        for later in (False, True):
            for book in self._ledger.books:
                if not left:
                    return
                if not book.device.healthy:
                    continue
                tpcs, memory = _size(book, seat)
                known = kept.get(book.uuid, (0, 0))
                fitting = min(left, _room(book, tpcs, memory, known, later))
                if fitting:
                    kept[book.uuid] = (known[0] + fitting * tpcs, known[1] + fitting * memory)
                    left -= fitting


def _size(book: Book, seat: Resources) -> tuple[int, int]:
    """What one seat takes of this device."""
    if seat.gpus:
        return book.device.tpcs, book.device.memory
    return seat.tpcs, share_of(book.device, seat)


def _room(book: Book, tpcs: int, memory: int, kept: tuple[int, int], later: bool) -> int:
    """How many seats fit beside what is kept: now, or later, when what runs there has ended."""
    free, left = (book.device.tpcs, book.device.memory) if later else (book.free_tpcs, book.free_memory)
    by_tpcs = (free - kept[0]) // tpcs
    return max(0, min(by_tpcs, (left - kept[1]) // memory) if memory else by_tpcs)
