"""Those who wait in this host's queue are told why and at which place: at once, at each change, and every two seconds.

Their tickets in etcd, which others read, say the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

from gpu_daemon import queue
from gpu_daemon.openbid import OpenBid
from gpu_daemon.publishing import Publisher
from gpu_daemon.site import Site
from nbos_cluster import keys
from nbos_cluster.records import QueueTicket
from nbos_cluster.wire import Message

REPEAT = 2.0
"""Seconds after which a waiting bid is told again how things stand."""

NEWS_AFTER = 0.1
"""Seconds in which changes of the queue gather before those who wait are told: whoever gets a grant goes first."""
NEWS_EACH = 0.002
"""And longer by so many for each who waits: telling a long queue takes milliseconds, which bids would wait for."""


class WaitingRoom:
    """queued: the bids in the queue, by the names of their future grants. look: has the queue look again for room."""

    def __init__(
        self, site: Site, publisher: Publisher, queued: Mapping[str, OpenBid], look: Callable[[], None]
    ) -> None:
        self._site, self._publisher, self._queued, self._look = site, publisher, queued, look
        self._repeater: asyncio.Task[None] | None = None
        self._news: asyncio.TimerHandle | None = None
        self.told: dict[str, tuple[OpenBid, queue.Tell, float]] = {}
        """What each waiting bid was told last, by the name of its future grant, and since when it waits (Unix time)."""

    def changed(self) -> None:
        """The queue decided something: who is concerned is told soon."""
        if self._site.queue.stale and self._news is None:
            self._news = asyncio.get_running_loop().call_later(
                NEWS_AFTER + NEWS_EACH * len(self._site.queue), self._tell_news
            )

    def left(self, grant: str) -> None:
        """A bid waits no longer."""
        if self.told.pop(grant, None) is not None:
            self._publisher.remove(keys.ticket(self._site.host, grant))

    def of(self, kernel: str) -> list[Message]:
        """For `status`: who of this kernel waits here."""
        return [
            {"n": bid.request.n, "host": self._site.host, "since": since, **_said(tell)}
            for bid, tell, since in self.told.values()
            if bid.replica.id.kernel == kernel
        ]

    def _tell_news(self) -> None:
        self._news = None
        self._tell_them(self._site.queue.news(self._site.now()))

    def _tell_them(self, tells: Iterable[queue.Tell]) -> None:
        for tell in tells:
            bid = self._queued.get(tell.grant)
            if bid is not None:
                self._tell(bid, tell)

    def _tell(self, bid: OpenBid, tell: queue.Tell) -> None:
        since = self.told[tell.grant][2] if tell.grant in self.told else time.time()
        self.told[tell.grant] = (bid, tell, since)
        bid.replica.push({"type": "waiting", "n": bid.request.n, **_said(tell)})
        self._publisher.put(keys.ticket(self._site.host, tell.grant), self._ticket(bid, tell, since), urgent=False)
        if self._repeater is None or self._repeater.done():
            self._repeater = self._site.spawn(self._repeat(), "telling those who wait")

    def _ticket(self, bid: OpenBid, tell: queue.Tell, since: float) -> QueueTicket:
        view = self._site.view(bid.replica.id.kernel)
        return QueueTicket(
            ticket=tell.grant,
            host=self._site.host,
            owner=view.spec.owner if view is not None and view.spec is not None else "",
            kernel=bid.replica.id.kernel,
            n=bid.request.n,
            resources=bid.request.resources,
            position=tell.position,
            reason=tell.reason,
            since=since,
            estimate=tell.estimate if tell.estimate is not None else -1.0,
        )

    async def _repeat(self) -> None:
        """Runs only while somebody waits, so an idle daemon sleeps."""
        while len(self._site.queue):
            await asyncio.sleep(REPEAT)
            # Time alone may change who is next: a course ends, somebody has waited for very long.
            self._look()
            self._tell_them(self._site.queue.tell_all(self._site.now()))


def _said(tell: queue.Tell) -> Message:
    return {"reason": tell.reason, "position": tell.position, "of": tell.of, "estimate": tell.estimate}
