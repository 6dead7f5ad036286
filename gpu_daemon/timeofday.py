"""The time of day, from a clock that somebody may set while we count. No IO but the two clocks it is given.

Guarantees: a clock that is set (by NTP, by hand) by more than TOLERANCE is noticed at the next look, with by how much,
so that no duration is ever the difference of two times of day; slewing is none of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable

TOLERANCE = 1.0
"""Seconds. Between two looks, so that a clock that is slewed (0.05% at most) never comes near."""


class TimeOfDay:
    """wall: Unix seconds. steady: never set."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._ahead = wall() - steady()

    def look(self) -> tuple[float, float]:
        """Now, and by how much the clock was set since the last look (0.0: it was not)."""
        now = self._wall()
        ahead = now - self._steady()
        step, self._ahead = ahead - self._ahead, ahead
        return now, step if abs(step) > TOLERANCE else 0.0
