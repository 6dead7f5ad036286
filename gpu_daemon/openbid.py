"""A bid that is being decided, and the yield that may be its answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from gpu_daemon.replica import LocalReplica
from gpu_daemon.requests import BidRequest
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
