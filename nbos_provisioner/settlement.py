"""What became of an execution whose executor was lost: asked of another replica's daemon until it is decided.

Guarantees: every settlement ends in exactly one verdict; the user's cell is run again only when the log says that
nobody holds it, once, and never when reruns are switched off. No IO, no clock.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

PATIENCE = 3.0
"""Seconds to wait for an outcome reply (the daemon holds it for 1 s while the execution is claimed)."""

AGAIN = 0.2


class Verdict(Enum):
    WAIT = "wait"
    ASK_AGAIN = "ask again"
    COMMITTED = "committed"
    ABANDONED = "abandoned"
    RERUN = "run again"
    RESUME = "resume"


@dataclass(slots=True)
class Settlement:
    """`abandon`: when nobody holds the execution any more, it is to be given up rather than run again.

    `session` is that of the lost process: every kernel process has its own, so a replica that was started again in
    its place is not taken for it.
    """

    n: int
    lost: int
    reason: str
    abandon: bool
    session: str = ""
    asked: str = ""
    asked_at: float = 0.0
    asked_of: int | None = None
    due: float = 0.0
    told: bool = False
    tried: set[int] = field(default_factory=set)

    def whom(self, up: Collection[int], now: float) -> int | None:
        """The replica to ask now, if it is time to ask one."""
        if self.asked and (now < self.asked_at + PATIENCE and self.asked_of in up):
            return None
        if now < self.due or not up:
            return None
        self.tried &= set(up)
        if self.tried >= set(up):
            self.tried.clear()
        fresh = [index for index in up if index not in self.tried]
        return min(fresh, key=lambda index: (index != self.lost, index))

    def asking(self, replica: int, msg_id: str, now: float) -> None:
        self.asked, self.asked_of, self.asked_at = msg_id, replica, now
        self.tried.add(replica)

    def wake(self, up: Collection[int]) -> float | None:
        if self.asked:
            return self.asked_at + PATIENCE
        return self.due if up else None

    def answer(self, content: dict[str, Any], replica: int, session: str, now: float) -> Verdict:
        """What the daemon's `outcome`, passed on by `replica`, comes to."""
        self.asked = ""
        state = content.get("state")
        if state == "committed":
            return Verdict.COMMITTED
        if state == "abandoned":
            return Verdict.ABANDONED
        if state == "free" and not self.abandon:
            return Verdict.RERUN
        self.due = now + AGAIN
        if state == "claimed":
            self.tried.discard(replica)
            if content.get("replica") == self.lost == replica and session == self.session:
                return Verdict.RESUME
            return Verdict.WAIT
        return Verdict.ASK_AGAIN
