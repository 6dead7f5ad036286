"""How much of the host's GPUs an owner used in the last day, in device-seconds. No IO.

A sliding window of whole hours: what was used a day ago is forgotten hour by hour. What runs counts as it runs, by its
rate (devices' worth of TPCs held now), so that looking costs nothing however many cells run.
"""

from __future__ import annotations

from collections import deque

HOUR = 3600.0
DAY = 24 * HOUR


class Use:
    """Of one owner. Times are seconds of any steady clock. window: seconds that are looked back."""

    __slots__ = ("_at", "_hours", "_settled", "_window", "rate")

    def __init__(self, now: float, window: float = DAY) -> None:
        self.rate = 0.0
        self._window = window
        self._at = now
        self._hours: deque[tuple[int, float]] = deque()
        self._settled = 0.0

    def value(self, now: float) -> float:
        """Device-seconds in the window that ends now."""
        self._forget(now)
        return self._settled + self.rate * min(self._window, max(0.0, now - self._at))

    def change_rate(self, by: float, now: float) -> None:
        """A grant was given (by > 0) or came back."""
        self._settle(now)
        self.rate = max(0.0, self.rate + by)
        if self.rate < 1e-9:  # what sums of floats leave
            self.rate = 0.0

    def add(self, amount: float, at: float) -> None:
        """What is known from before: `amount` device-seconds within the hour of `at`. Oldest first."""
        hour = int(at // HOUR)
        if self._hours and self._hours[-1][0] >= hour:
            last, known = self._hours[-1]
            self._hours[-1] = (last, known + amount)
        else:
            self._hours.append((hour, amount))
        self._settled += amount

    def _settle(self, now: float) -> None:
        begin = max(self._at, now - self._window)
        while self.rate and begin < now:
            end = min(now, (begin // HOUR + 1) * HOUR)
            self.add(self.rate * (end - begin), begin)
            begin = end
        self._at = max(self._at, now)

    def _forget(self, now: float) -> None:
        oldest = (now - self._window) // HOUR
        while self._hours and self._hours[0][0] < oldest:
            self._settled -= self._hours.popleft()[1]
        if not self._hours:
            self._settled = 0.0
