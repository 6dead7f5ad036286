"""What is about to cost much, and the line that says so before it does. No IO.

Guarantees: nothing is said twice about the same variables; every line names the variable, the number and a way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .capture import hidden
from .progress import listing, size

LARGE = 1 << 30
"""Bytes that one cell made or changed, from which the user is told that replicating them takes its time."""

OFTEN = 256 << 20
"""Bytes of one component rewritten by a cell that count as costly, and …"""

IN_A_ROW = 3
"""… so many cells in a row that do it."""

ASK_FROM = 256 << 20
"""Bytes to be written from which the daemon is asked whether there is room: an answer costs less than a millisecond."""


@dataclass(frozen=True)
class Cost:
    """A component that a cell made or changed. `fresh`: bytes of it that are new; `grown`: how much larger it is."""

    names: tuple[str, ...]
    fresh: int
    grown: int


class Costs:
    def __init__(self) -> None:
        self._told_large: set[str] = set()
        self._told_often: set[str] = set()
        self._row: dict[str, tuple[int, int]] = {}

    def captured(self, costs: Iterable[Cost]) -> list[str]:
        """What to say after this cell, before its changes are written."""
        found = [Cost(_variables(cost.names), cost.fresh, cost.grown) for cost in costs]
        return [*self._large(found), *self._often(found)]

    def _large(self, costs: Sequence[Cost]) -> list[str]:
        fresh = sum(cost.fresh for cost in costs)
        if fresh < LARGE:
            return []
        largest = max(costs, key=lambda cost: cost.fresh)
        if self._told_large.issuperset(largest.names):
            return []
        self._told_large.update(largest.names)
        return [
            f"NBOS: replicating {size(fresh)} that this cell made or changed, most of it in {listing(largest.names)}; "
            "`%nbos state` shows what is large"
        ]

    def _often(self, costs: Sequence[Cost]) -> list[str]:
        """Components that have been rewritten by each of the last cells."""
        costly = {name: cost for cost in costs if cost.fresh >= OFTEN for name in cost.names}
        before, self._row = self._row, {}
        for name, cost in costly.items():
            count, total = before.get(name, (0, 0))
            self._row[name] = count + 1, total + cost.fresh
        lines = []
        for cost in {id(cost): cost for cost in costly.values()}.values():
            count, total = max(self._row[name] for name in cost.names)
            if count < IN_A_ROW or self._told_often.issuperset(cost.names):
                continue
            self._told_often.update(cost.names)
            lines.append(
                f"NBOS: each of the last {count} cells has rewritten {listing(cost.names)}, {size(total)} in all, and "
                "each time all of it is replicated anew. A value that is changed in place costs only the parts that "
                "change; one that its own cell deletes (`del`) costs nothing"
            )
        return lines


def room(costs: Iterable[Cost], written: int, told: Mapping[str, Any]) -> list[str]:
    """What to say when the daemon's answer to `room` shows that what is about to be written does not fit.

    written: bytes that go into the store.
    """
    grown = sum(max(0, cost.grown) for cost in costs)
    lines = []
    store = told.get("store") or {}
    free = store.get("free")
    if isinstance(free, int) and free < written:
        lines.append(
            f"NBOS: {store.get('where') or 'the blob store'} has {size(free)} left, and this cell's changes need "
            f"{size(written)}: what finds no room is not replicated, and will be named. Free space there, or `del` "
            "what is large and not needed"
        )
    hosts: dict[str, list[Mapping[str, Any]]] = {}
    for standby in told.get("standbys") or ():
        hosts.setdefault(str(standby.get("host", "")), []).append(standby)
    for host, standbys in sorted(hosts.items()):
        memory = min((each["free"] for each in standbys if isinstance(each.get("free"), int)), default=None)
        if memory is not None and memory < grown * len(standbys):
            lines.append(
                f"NBOS: host {host} has {size(memory)} of memory left, and the standby there needs {size(grown)} more "
                "for what this cell made: it may end for it. Choose the option `lazy` for the kernel, which leaves "
                "large values in the blob store until they are used, or `del` what is large and not needed"
            )
    return lines


def _variables(names: Iterable[str]) -> tuple[str, ...]:
    every = tuple(names)
    return tuple(name for name in every if not hidden.is_pseudo(name)) or every
