"""How far one replication is, and when a user is to see it. No IO and no clock: times are given, in seconds.

Guarantees: a replication that is over within SHOW_AFTER is never shown, nor one that will be over in a moment; what is
shown changes at most once in EVERY; the estimate comes from the last WINDOW seconds, and there is none while nothing
moves: then the text says for how long.

`sending`, `stored` and `trouble` may come from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .capture import hidden

SHOW_AFTER = 1.0
"""Seconds after the end of its cell from which a replication is shown."""

MOMENT = 0.5
"""Seconds left at which it is not worth while to begin showing it."""

EVERY = 0.5
"""Seconds between two looks at it."""

WINDOW = 3.0
"""Seconds back over which the speed is measured."""

STILL = 3.0
"""Seconds without any progress after which the text says so."""

NAMED = 3
"""Variables that the text names; the others are counted."""


SMALL = 20
"""A component with less than this part of the new bytes is not named."""


def size(count: float) -> str:
    """Bytes for people: 3.4 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def listing(names: Sequence[str], most: int = NAMED) -> str:
    """`a, b, c and 4 others`."""
    shown = [name if len(name) <= 30 else name[:29] + "…" for name in names[:most]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} other{'s' if rest > 1 else ''}" if rest else "")


@dataclass(frozen=True)
class Look:
    """What is to be seen now. `left`: seconds, None when nobody can say."""

    what: str
    text: str
    done: int
    total: int
    left: float | None
    seconds: float

    def wire(self, n: int) -> dict[str, Any]:
        """The content of `nbos_progress` (docs/protocol.md)."""
        fields = {name: getattr(self, name) for name in ("what", "text", "done", "total")}
        left = None if self.left is None else round(self.left, 1)
        return {"n": n, **fields, "left": left, "seconds": round(self.seconds, 2)}


class Progress:
    """One replication: captured, its blobs stored, its entry written. `began`: when its cell ended."""

    def __init__(self, n: int, began: float) -> None:
        self.n, self.began = n, began
        self._components: list[tuple[Sequence[str], int]] = []
        self.captured_at: float | None = None
        self.stored_at: float | None = None
        self.over_at: float | None = None
        self.trouble = ""
        self.shown = False
        self._lock = threading.Lock()
        self._total = self._done = 0
        self._moved = began
        self._samples: deque[tuple[float, int]] = deque([(began, 0)])

    # -- what happens

    def captured(self, components: Iterable[tuple[Sequence[str], int]], now: float) -> None:
        """What the cell changed: the variables of each component, and how many bytes of it are new."""
        self._components = list(components)
        self.captured_at = now
        self._restart(now)

    def sending(self, count: int) -> None:
        """So many bytes go into the store (more of them, when some have to be sent again)."""
        with self._lock:
            self._total += count
            self.stored_at = None

    def stored(self, count: int) -> None:
        with self._lock:
            self._done = min(self._total, self._done + count)

    def logging(self, now: float) -> None:
        """All bytes are safe; what is left is the entry."""
        self.stored_at = now

    def over(self, now: float) -> None:
        self.over_at = now

    # -- what is seen

    @property
    def names(self) -> tuple[str, ...]:
        """The variables under way, those with the most new bytes first."""
        return self._at_least(0)

    @property
    def what(self) -> str:
        """The bytes, and the variables that make most of them."""
        total = sum(fresh for _, fresh in self._components)
        names = self._at_least(total // SMALL)
        return f"{size(total)} of {listing(names)}" if names else size(total)

    def _at_least(self, count: int) -> tuple[str, ...]:
        largest = sorted(self._components, key=lambda each: -each[1])
        some = [name for names, fresh in largest if fresh >= count for name in names]
        return tuple(name for name in some if not hidden.is_pseudo(name))

    def look(self, now: float, away: str = "") -> Look | None:
        """What to show now; None: nothing (yet, or any more). To be called every EVERY seconds while it lasts.

        away: why the daemon cannot be asked.
        """
        if self.over_at is not None:
            return None
        self._sample(now)
        left = self._left(now)
        if now - self.began < SHOW_AFTER or (not self.shown and left is not None and left < MOMENT):
            return None
        self.shown = True
        return Look(self.what, self._text(now, left, away), self._done, self._total, left, now - self.began)

    def text(self, now: float) -> str:
        """One line on where it is, whether it is shown or not."""
        self._sample(now)
        return self._text(now, self._left(now))

    def _text(self, now: float, left: float | None, away: str = "") -> str:
        if self.captured_at is None:
            return f"looking for what the cell changed, for {now - self.began:.0f} s so far"
        text = f"replicating {self.what}"
        if self.stored_at is not None or not self._total:
            text += ": its log entry is being written"
        else:
            text += f": {100 * self._done // self._total} %"
        if left is not None:
            text += f", {left:.1f} s left"
        elif away or self.trouble:
            text += f"; {away or self.trouble}"
        elif now - self._moved >= STILL:
            text += f"; nothing has moved for {now - self._moved:.0f} s"
        return text

    def _restart(self, now: float) -> None:
        self._moved = now
        self._samples.clear()
        self._samples.append((now, self._done))

    def _sample(self, now: float) -> None:
        if self._done != self._samples[-1][1]:
            self._moved = now
        self._samples.append((now, self._done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW:
            self._samples.popleft()

    def _left(self, now: float) -> float | None:
        """By the speed of the last WINDOW seconds; nobody knows how long an entry takes that etcd does not accept."""
        first, count = self._samples[0]
        if self.stored_at is not None or not self._total or self._done == count or now <= first:
            return None
        return (self._total - self._done) * (now - first) / (self._done - count)
