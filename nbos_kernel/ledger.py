"""Which log entry wrote each variable last, and when that entry was safe where. For `%nbos state`; nothing rests on it.

Guarantees: it knows all that this replica wrote or applied since it came up; a name it does not know is older than
that. No IO and no clock. Standbys are heard of through the daemons' records, which are written once a second: the times
are upper bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .capture import hidden

Component = tuple[Sequence[str], int]
"""Its names and its size in bytes."""


@dataclass
class Written:
    """What one execution of this replica wrote. Seconds count from the end of its cell; None: not yet.

    `fresh`: bytes that were not in the log or the store as far as this replica knew; `total`: bytes of the components
    they are in; `chunks`: blobs that were sent. `components`: names and fresh bytes. `standbys`: seconds by the number
    of the replica.
    """

    n: int
    fresh: int = 0
    total: int = 0
    chunks: int = 0
    components: list[tuple[tuple[str, ...], int]] = field(default_factory=list)
    captured: float | None = None
    safe: float | None = None
    standbys: dict[int, float] = field(default_factory=dict)
    began: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Component:
    n: int
    size: int


_UNKNOWN = _Component(0, 0)


class Ledger:
    """`last`: the latest execution that this replica captured; `changed`: the latest that changed a variable."""

    def __init__(self) -> None:
        self.last: Written | None = None
        self.changed: Written | None = None
        self._of: dict[str, _Component] = {}

    def began(self, n: int, now: float) -> None:
        self.last = Written(n, began=now)

    def captured(self, n: int, components: Iterable[tuple[Component, int]], deleted: Iterable[str], now: float) -> None:
        """(component, fresh bytes) of what execution n changed."""
        last = self.last
        if last is None or last.n != n:
            return
        last.captured = now - last.began
        found = list(components)
        for (names, total), fresh in found:
            last.fresh += fresh
            last.total += total
            last.components.append((tuple(names), fresh))
        if any(not hidden.is_pseudo(name) for names, _ in last.components for name in names):
            self.changed = last
        self.wrote(n, [component for component, _ in found], deleted)

    def committed(self, n: int, now: float) -> None:
        if self.last is not None and self.last.n == n:
            self.last.safe = now - self.last.began

    def standby(self, replica: int, applied: int, now: float) -> None:
        """Heard that `replica` has applied the log up to `applied`."""
        for written in (self.last, self.changed):
            if written is not None and written.safe is not None and applied >= written.n:
                written.standbys.setdefault(replica, now - written.began)

    def wrote(self, n: int, components: Iterable[Component], gone: Iterable[str], whole: bool = False) -> None:
        """Entry n, of this replica or another one. whole: it replaced everything."""
        if whole:
            self._of.clear()
        for name in gone:
            self._of.pop(name, None)
        for names, count in components:
            self._of.update(dict.fromkeys(names, _Component(n, count)))

    def entry_of(self, name: str) -> int:
        """The entry that wrote it; 0: before all that is known."""
        return self._of.get(name, _UNKNOWN).n

    def size_of(self, names: Iterable[str]) -> int:
        """Bytes of the largest component that any of `names` stood in."""
        return max((self._of.get(name, _UNKNOWN).size for name in names), default=0)

    def components(self, names: Iterable[str]) -> list[tuple[list[str], int]]:
        """Those that these names were written in: (the names asked for, the component's size)."""
        found: dict[_Component, list[str]] = {}
        for name in names:
            found.setdefault(self._of.get(name, _UNKNOWN), []).append(name)
        return [(some, component.size) for component, some in found.items()]

    def others(self, known: Iterable[str]) -> list[tuple[tuple[str, ...], int]]:
        """The components of all further names, as they were written: (names, size)."""
        left = self._of.keys() - set(known)
        return [(tuple(some), count) for some, count in self.components(sorted(left))]


def components_of(entry: Mapping[str, Any]) -> list[Component]:
    """Those of an entry as the daemon's socket brings it (docs/protocol.md)."""
    return [
        (component["names"], sum(int(frame["size"]) for frame in component["frames"]))
        for component in entry.get("components") or ()
    ]
