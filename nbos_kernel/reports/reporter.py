"""What users hear of replications while they last: their progress, and what is about to cost much.

Guarantees: a cell whose changes are replicated quickly costs a few microseconds after its reply, and nothing before it.
The looks are taken by a thread of its own, since the main thread is what captures and stores; it sleeps while the
kernel does nothing.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from nbos_cluster import wire

from ..capture.changes import Packed
from ..link import Link
from . import costs
from .costs import Cost, Costs
from .progress import EVERY, Progress
from .written import Ledger

Message = dict[str, Any]
Publish = Callable[[Message, Message], None]

DROWSY = 10.0
"""Seconds without an execution after which the thread sleeps until the next one."""

ANSWER = 0.25
"""Seconds to wait for the daemon's word on how much room there is."""


class Reporter:
    """`publish(content, parent)` sends `nbos_progress` to the router, from any thread."""

    def __init__(self, link: Link, ledger: Ledger, publish: Publish, log: logging.Logger) -> None:
        self._link, self.ledger, self._publish, self._log = link, ledger, publish, log
        self.lazy = 0
        """Bytes of a component from which standbys leave it in the store; 0: they do not."""
        self._costs = Costs()
        self._now: tuple[Progress, Message] | None = None
        self._active = 0.0
        self._asleep = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def progress(self) -> Progress | None:
        """The replication under way."""
        now = self._now
        return None if now is None or now[0].over_at is not None else now[0]

    # -- what happens: on the main thread ---------------------------------------------------------------------------

    def began(self, n: int, parent: Message) -> None:
        """The cell of execution n has ended; its changes are looked for next."""
        now = self._active = time.monotonic()
        self._now = Progress(n, now), parent
        self.ledger.began(n, now)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="NBOS progress", daemon=True)
            # debugpy suspends every thread at a breakpoint except those marked like this.
            self._thread.pydev_do_not_trace = True  # type: ignore[attr-defined]
            self._thread.is_pydev_daemon_thread = True  # type: ignore[attr-defined]
            self._thread.start()
        elif self._asleep:
            self._wake.set()

    def captured(self, n: int, components: Sequence[Packed], deleted: Iterable[str]) -> list[str]:
        """What execution n changed is known and nothing of it written: what the user should hear before it is."""
        now = time.monotonic()
        found = [(packed.names, packed.size, packed.fresh) for packed in components]
        told = self._costs.captured(
            Cost(names, fresh, total - self.ledger.size_of(names) if fresh >= costs.OFTEN else 0)
            for names, total, fresh in found
        )
        if sum(fresh for _, _, fresh in found) >= costs.ASK_FROM:
            grown = [
                Cost(names, fresh, 0 if 0 < self.lazy <= total else total - self.ledger.size_of(names))
                for names, total, fresh in found
            ]
            told += costs.room(grown, _bytes_of(components), self.room())
        self.ledger.captured(n, [((names, total), fresh) for names, total, fresh in found], deleted, now)
        if self._now is not None:
            self._now[0].captured([(names, fresh) for names, _, fresh in found], now)
        return told

    def sends(self, sizes: Iterable[int]) -> None:
        """Blobs of these sizes are about to be put."""
        counts = list(sizes)
        if self.ledger.last is not None:
            self.ledger.last.chunks += len(counts)
        if self._now is not None:
            self._now[0].sending(sum(counts))

    def follow(self, put: Future[Any], count: int) -> None:
        """One of them is under way; it counts as stored when it is answered, whatever the answer."""
        if self._now is not None:
            progress = self._now[0]
            put.add_done_callback(lambda _: progress.stored(count))

    def logging(self) -> None:
        """The blobs are safe; the entry is next."""
        if self._now is not None:
            self._now[0].logging(time.monotonic())

    def trouble(self, reason: str) -> None:
        if self._now is not None:
            self._now[0].trouble = reason

    def over(self, n: int, committed: bool = True) -> None:
        now = time.monotonic()
        if self._now is not None:
            self._now[0].over(now)
        if committed:
            self.ledger.committed(n, now)

    # -- any thread -------------------------------------------------------------------------------------------------

    def members(self, members: Iterable[Message]) -> None:
        """How far the standbys are, as the daemons tell."""
        now = time.monotonic()
        for member in members:
            if isinstance(member.get("index"), int) and isinstance(member.get("applied"), int):
                self.ledger.standby(member["index"], member["applied"], now)

    def room(self) -> Message:
        """How much room the store and the standbys' hosts have; nothing when nobody can say at once."""
        if not self._link.connected:
            return {}
        request = self._link.request({"type": "room"})
        try:
            reply, _ = request.future.result(timeout=ANSWER)
        except (concurrent.futures.TimeoutError, ConnectionError, wire.WireError) as err:
            self._link.withdraw(request, "not answered in time")
            self._log.debug("NBOS: no word on how much room there is: %s", err)
            return {}
        return reply if reply.get("ok") else {}

    # -- the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            if time.monotonic() - self._active > DROWSY and self.progress is None:
                self._asleep = True
                if time.monotonic() - self._active > DROWSY:  # else one began just now and may not have seen us asleep
                    self._wake.wait()
                self._wake.clear()
                self._asleep = False
            time.sleep(EVERY)
            try:
                self._look()
            except Exception:  # noqa: BLE001 - the thread must live; what it tells is not worth a replication
                self._log.exception("NBOS: the progress of a replication could not be told")

    def _look(self) -> None:
        now = self._now
        if now is None:
            return
        away = "" if self._link.connected else self._link.since()
        look = now[0].look(time.monotonic(), away)
        if look is not None:
            self._publish(look.wire(now[0].n), now[1])


def _bytes_of(components: Iterable[Packed]) -> int:
    """What has to be stored for them, equal content once."""
    fresh = sum(packed.fresh for packed in components)
    chunks = {
        chunk.mark: size for packed in components for frame in packed.frames for size, chunk in frame.marks.sized()
    }
    return min(fresh, sum(chunks.values()))
