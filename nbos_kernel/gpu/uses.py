"""What this kernel's latest cells got of the GPUs: how much, where, how long they waited for it and held it.

Replicated like a variable called NAME, so that it is the kernel's and not a replica's. No clock: times are given, in
seconds. Guarantee: at most KEPT cells are kept, and replicated only when a cell with a grant has ended.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any, Protocol

from .borrowing import Moved
from .grants import Grant

NAME = "%gpu"
"""Stands for the rows among the variables of an entry."""

KEPT = 10


@dataclass(frozen=True)
class Use:
    """One cell's (input `count`). tpcs, memory: granted, over all devices; waited: in its host's queue; peak: bytes
    that torch had on them at most, 0 where torch did not use them; lent: the most TPCs that it had on loan."""

    n: int
    host: str
    model: str
    devices: int
    whole: bool
    tpcs: int
    memory: int
    waited: float
    held: float = 0.0
    peak: int = 0
    count: int = 0
    tpc_seconds: float = 0.0
    lent: int = 0


class Loaned(Protocol):
    """What became of the TPCs of the running cell: `borrowing.Borrower`."""

    moves: list[Moved]
    most_lent: int


def _tpc_seconds(tpcs: int, held: float, moves: Sequence[Moved]) -> float:
    """With the TPCs that the cell was on. (What it held, in the daemon's accounts, includes those it was leaving.)"""
    total, at = 0.0, 0.0
    for move in moves:
        total += tpcs * (move.seconds - at)
        tpcs, at = move.after, move.seconds
    return total + tpcs * max(0.0, held - at)


class Uses:
    def __init__(self) -> None:
        self._rows: deque[Use] = deque(maxlen=KEPT)
        self._open: Use | None = None
        self._began = 0.0
        self._text = ""

    @property
    def rows(self) -> list[Use]:
        """Oldest first, without the cell that runs."""
        return list(self._rows)

    def begin(self, grant: Grant | None, n: int, waited: float, now: float) -> None:
        """A cell leads; without a grant there is nothing to keep."""
        self._open, self._began = None, now
        if grant is None or not grant.shares:
            return
        first = grant.shares[0]
        self._open = Use(
            n=n,
            host=grant.host,
            model=first.model,
            devices=len(grant.shares),
            whole=grant.whole,
            tpcs=grant.tpcs,
            memory=grant.memory,
            waited=waited,
        )

    def running(self, now: float, peak: int = 0, loans: Loaned | None = None) -> Use | None:
        """What the running cell has used until now; None without a grant."""
        if self._open is None:
            return None
        held, lent = now - self._began, loans.most_lent if loans is not None else 0
        used = _tpc_seconds(self._open.tpcs, held, loans.moves if loans is not None else ())
        known = replace(self._open, held=round(held, 3), peak=max(peak, self._open.peak))
        return replace(known, tpc_seconds=round(used, 3), lent=lent)

    def end(self, now: float, peak: int, count: int, loans: Loaned | None = None) -> None:
        """The cell gives its grant back. count: its `In` number."""
        use = self.running(now, peak, loans)
        if use is not None:
            self._open = None
            self._rows.append(replace(use, count=count))
            self._text = json.dumps([astuple(row) for row in self._rows])

    def of(self, n: int, now: float, peak: int, loans: Loaned | None = None) -> dict[str, Any]:
        """For the reply to execution n, whether its grant was given back or not: {} without one."""
        use = self.running(now, peak, loans) or next((row for row in reversed(self._rows) if row.n == n), None)
        return asdict(use) if use is not None and use.n == n else {}

    # -- among the variables of an entry ------------------------------------------------------------------------------

    def variable(self) -> Iterator[tuple[str, Any]]:
        if self._rows:
            yield NAME, self._text

    def adopt(self, text: str | None, whole: bool) -> None:
        """An entry of another executor was applied. text: what it says of NAME; whole: it replaced everything."""
        if text is not None or whole:
            self._text = text or ""
            self._rows.clear()
            rows = json.loads(self._text or "[]")
            self._rows.extend(
                Use(*row) for row in rows if len(row) == len(Use.__match_args__)
            )  # else another version's
