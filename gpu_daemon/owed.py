"""What quotas are owed beside what their owners hold: the room that others get on loan only. No IO.

A quota that nobody uses is not given away for the length of a cell: whoever may borrow gets it on loan, and who may not
waits for other room. What is owed is counted, not numbered, on devices that have the room now, else on those that will;
in one piece where a device has room for it. Only on devices whose slices can change while a cell runs: on others
nothing could be called back, and idle quota is granted as if there were none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from gpu_daemon.book import Book
from gpu_daemon.ledger import Kept, Ledger, share_of
from gpu_daemon.shares import Entry, Holdings, Principal, Shares
from nbos_cluster.records import Resources


class Owed:
    """The quotas of `shares`, on those devices of `ledger` that `changed` was told last."""

    def __init__(self, ledger: Ledger, shares: Shares, holdings: Holdings) -> None:
        self._ledger, self._holdings = ledger, holdings
        tables: tuple[tuple[str, Iterable[tuple[str, Entry]]], ...] = (
            ("users", shares.users.items()),
            ("groups", shares.groups.items()),
            ("kernels", shares.kernels.items()),
        )
        self._quotas: list[tuple[Principal, Entry]] = [
            ((kind, name), entry)  # type: ignore[misc]
            for kind, entries in tables
            for name, entry in entries
            if entry.tpcs
        ]
        self._lendable: Collection[str] = ()
        self._known: dict[tuple[frozenset[Principal], bool], Kept] = {}

    def __bool__(self) -> bool:
        return bool(self._quotas and self._lendable)

    def changed(self, lendable: Collection[str]) -> None:
        """Something was granted, given back, or failed. lendable: devices on which loans can be made."""
        self._lendable = lendable
        self._known.clear()

    def to_others(self, than: Iterable[Principal]) -> Kept:
        """What everybody else's quotas are owed."""
        return self._kept(frozenset(than), active=False)

    def to_active(self) -> dict[str, int]:
        """TPCs that quotas are owed whose owners have a cell running: those are not lent either."""
        return {uuid: tpcs for uuid, (tpcs, _) in self._kept(frozenset(), active=True).items()}

    def _kept(self, without: frozenset[Principal], active: bool) -> Kept:
        without = without.intersection(principal for principal, _ in self._quotas)
        key = (without, active)
        if key not in self._known:
            kept: dict[str, tuple[int, int]] = {}
            for principal, quota in self._quotas:
                held = self._holdings.of(*principal)
                if principal not in without and (held.grants or not active):
                    memory = max(1, quota.memory - held.memory) if quota.memory else 0
                    self._keep(kept, max(0, quota.tpcs - held.tpcs), memory)
            self._known[key] = kept
        return self._known[key]

    def _keep(self, kept: dict[str, tuple[int, int]], tpcs: int, memory: int) -> None:
        """memory: of the whole quota, 0: each device's proportional share."""
        books = [b for b in self._ledger.books if b.uuid in self._lendable and b.device.healthy]
        for later in (False, True):
            for book in books:
                if 0 < tpcs <= _room(book, kept, later):
                    self._put(kept, book, tpcs, memory)
                    return
        for later in (False, True):
            for book in books:
                part = min(tpcs, _room(book, kept, later))
                if part > 0:
                    self._put(kept, book, part, memory * part // tpcs)
                    tpcs, memory = tpcs - part, memory - memory * part // tpcs

    def _put(self, kept: dict[str, tuple[int, int]], book: Book, tpcs: int, memory: int) -> None:
        known = kept.get(book.uuid, (0, 0))
        size = memory or share_of(book.device, Resources(tpcs=tpcs))
        kept[book.uuid] = (known[0] + tpcs, known[1] + size)


def _room(book: Book, kept: Kept, later: bool) -> int:
    """TPCs beside what is kept: now, or when what runs there has ended."""
    return (book.device.tpcs if later else book.free_tpcs) - kept.get(book.uuid, (0, 0))[0]


def both(one: Kept | None, other: Kept) -> Kept:
    """What two keep together."""
    if not one:
        return other
    found = dict(other)
    for uuid, (tpcs, memory) in one.items():
        known = found.get(uuid, (0, 0))
        found[uuid] = (known[0] + tpcs, known[1] + memory)
    return found
