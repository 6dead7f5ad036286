"""How long cells take, from what was seen, and when those who wait may expect their turn. No IO."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from gpu_daemon.ledger import Busy, Impossible, Ledger, Request

KERNELS = 4000
"""Kernels and owners whose durations are remembered."""

LOOK_AHEAD = 100
"""Places in the queue that get an estimate: further down it would say nothing."""


@dataclass
class _Seen:
    """mean: follows what changes (the newest counts a quarter). long: nearly the longest, forgotten slowly."""

    mean: float = 0.0
    long: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.mean += (seconds - self.mean) / min(self.count, 4)
        self.long = max(seconds, self.long * 0.9)


@dataclass
class Durations:
    """unknown: seconds that a cell counts for when nothing was ever seen of its kernel or owner."""

    unknown: float = 3600.0
    _seen: dict[tuple[str, str], _Seen] = field(default_factory=dict)

    def add(self, owner: str, kernel: str, seconds: float) -> None:
        for key in ((owner, kernel), (owner, ""), ("", "")):
            # The latest stand last, so that the oldest are forgotten.
            seen = self._seen.pop(key, None) or _Seen()
            seen.add(seconds)
            self._seen[key] = seen
        while len(self._seen) > KERNELS:
            self._seen.pop(next(iter(self._seen)))

    def expected(self, owner: str, kernel: str) -> float | None:
        """Seconds that a cell of this kernel holds its grant; None when nothing was seen yet."""
        for key in ((owner, kernel), (owner, ""), ("", "")):
            if key in self._seen:
                return self._seen[key].mean
        return None

    def bound(self, owner: str, kernel: str) -> float:
        """Seconds within which a cell of this kernel most likely ends: for promises to third parties."""
        for key in ((owner, kernel), (owner, "")):
            if key in self._seen:
                return self._seen[key].long
        return self.unknown


@dataclass(frozen=True)
class Waiter:
    """Somebody in the queue. not_before: a time before which a reservation keeps the room."""

    request: Request
    not_before: float = 0.0


def play(
    ledger: Ledger, ends: Iterable[tuple[float, str]], waiting: Iterable[Waiter], durations: Durations, now: float
) -> dict[str, float]:
    """Seconds until each gets its grant, by the name of that: what runs ends when `ends` says, in order of places.

    `ledger` is a copy, and is changed. Who is not reached has no estimate: nothing is known of those before.
    """
    heap = list(ends)
    queue = list(waiting)[:LOOK_AHEAD]
    heap += [(w.not_before, "") for w in queue if w.not_before > now]
    heapq.heapify(heap)
    found: dict[str, float] = {}
    while heap and queue:
        end, name = heapq.heappop(heap)
        if name:
            ledger.release(name)
        for waiter in list(queue):
            if waiter.not_before > end:
                continue
            request = waiter.request
            if isinstance(ledger.reserve(request), Busy | Impossible):
                break
            found[request.grant] = round(max(0.0, end - now), 1)
            queue.remove(waiter)
            length = durations.expected(request.owner, request.kernel)
            if length is not None:
                heapq.heappush(heap, (end + length, request.grant))
    return found
