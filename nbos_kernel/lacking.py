"""What the store has lost although this replica still holds the value: written again by its next entry. No IO.

Nobody's memory of what is in the store (`Appender`'s, the daemons') is proof that it still is: files disappear, bits
flip. It is found out by the replica that reads; that one says so (`applied`, field `lacks`), its daemon's record tells
everybody, and the executor, in its next entry of whatever kind, writes the components anew and puts every blob of
them, whether it takes it for stored or not.

Guarantees: a variable is due while a replica that has applied the entry which wrote it last says that it lacks it, and
not before: what a record says of older entries is over. So it is written once for each time that it was found
missing, and again when that did not help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

GONE = ("missing", "corrupt")
"""The daemon's answers that mean: the store has lost it."""

MOST, LONGEST = 200, 300
"""Names that are told at a time, and characters of one; the others follow when these are there again."""


class Lacking:
    """`entry_of` says which entry wrote a variable last, as far as this replica knows."""

    def __init__(self, entry_of: Callable[[str], int]) -> None:
        self._entry_of = entry_of
        self._here: dict[str, str] = {}
        self._told: dict[str, int] = {}

    # -- this replica

    def note(self, some: Iterable[str], reason: str, error: BaseException) -> None:
        """These cannot be loaded here, because of `error`."""
        if getattr(error.__cause__, "code", "") in GONE:
            self._here.update(dict.fromkeys(some, reason))

    def here(self, lost: Mapping[str, str]) -> list[str]:
        """What this replica lacks; `lost`: all that is lost now. One that was bound or written again is not."""
        self._here = {name: reason for name, reason in self._here.items() if lost.get(name) == reason}
        return [name for name in self._here if len(name) <= LONGEST][:MOST]

    # -- the others

    def heard(self, members: Iterable[Mapping[str, Any]]) -> None:
        """What the daemons' records say now. Any thread."""
        told: dict[str, int] = {}
        for member in members:
            for name in member.get("lacks") or ():
                told[name] = max(told.get(name, -1), member.get("applied", -1))
        self._told = told

    def due(self) -> set[str]:
        """Variables that the next entry should write again, where this replica has them."""
        return {name for name, applied in self._told.items() if applied >= self._entry_of(name)}
