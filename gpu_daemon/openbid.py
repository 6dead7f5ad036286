"""A bid that is not answered yet, and the forms of its answers (docs/protocol.md, 1). No IO."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from gpu_daemon.replica import Held, LocalReplica
from gpu_daemon.requests import BidRequest
from gpu_daemon.site import plain
from nbos_cluster.records import GrantRecord
from nbos_cluster.wire import Message


class Yielded(Exception):
    """The bid's answer is a yield."""

    def __init__(self, code: str, reason: str, next: int | None = None) -> None:
        super().__init__(reason)
        self.answer: Message = {"answer": "yield", "code": code, "reason": reason, "next": next}


@dataclass
class OpenBid:
    """A bid that is not answered yet."""

    replica: LocalReplica
    request: BidRequest
    grant_name: str
    task: asyncio.Task[Message] | None = None
    grant: GrantRecord | None = None
    """Set once it is there, while the claim is being made."""
    granted: asyncio.Future[GrantRecord] | None = None
    """Set while it stands in the queue."""
    waited: float = 0.0
    """Seconds in the queue."""
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Its exception is the yield that ends the wait."""

    def end(self, code: str, reason: str, next: int | None = None) -> None:
        if not self.ended.done():
            self.ended.set_exception(Yielded(code, reason, next))
            self.ended.exception()  # Read here, so that nobody having to wait for it is no complaint.

    @property
    def over(self) -> bool:
        return self.ended.done()


Run = Callable[[OpenBid], Coroutine[Any, Any, Message]]
"""Carries a bid out."""


def waiting(n: int, reason: str) -> Message:
    """Why execution n cannot begin, where no queue is involved: there is no position."""
    return {"type": "waiting", "n": n, "reason": reason, "position": None, "of": None, "estimate": None}


def lead(held: Held, later: Message | None) -> Message:
    grant = plain(held.grant) if held.grant is not None else None
    lead: Message = {"answer": "lead", "token": held.token, "grant": grant, "waited": round(held.waited, 3)}
    return {**lead, "touch": later} if later is not None and grant is None else lead
