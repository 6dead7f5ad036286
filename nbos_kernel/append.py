"""Writing an execution into the log: blobs first, then the entry, then the word to the router.

Guarantees: memory that a next cell could change is either on the daemon's disk, or copied, before this gives the
main thread back; a value whose blob cannot be stored becomes a lost name instead of failing the entry; an append
that the daemon cannot carry out now is repeated until it can; a fenced one ends this process, because its state
is no longer the kernel's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nbos_cluster import bulk, wire

from . import addressing, oversize
from .blobchannel import BlobChannel
from .capture.buffers import Chunk
from .capture.changes import Changes, Packed
from .effects import names_of
from .entries import Layout
from .fitting import Wanted, fitting, key, why
from .link import Link, Reply, Request
from .replica import Replica
from .reports.reporter import Reporter

Message = dict[str, Any]
Put = tuple[Packed, Chunk, concurrent.futures.Future[Message]]

BLOB_WAIT = 10.0
"""Seconds to wait for the answer which blobs are in the store."""

FEW = 4
"""Blobs that are sent without asking whether they are in the store."""

MOST_ASKED = 4096

KNOWN_BLOBS = 65536
"""Hashes remembered as stored, so that unchanged buffers are not sent again."""


TOO_LARGE = ("too_large", "malformed")
"""Answers that repeating cannot change: the entry has to become smaller or simpler."""


@dataclass
class Entry:
    """What execution n did, before it is encoded."""

    n: int
    kind: str
    status: str
    execution_count: int
    source: str
    changes: Changes
    effects: Message


class Appender:
    """At most one append is under way; `settled()` waits for it."""

    def __init__(self, link: Link, replica: Replica, channel: Any, blobs: BlobChannel, reporter: Reporter) -> None:
        self._link, self._replica, self._channel, self._blobs = link, replica, channel, blobs
        self._reporter = reporter
        self._task: asyncio.Task[None] | None = None
        self._stored: OrderedDict[str, None] = OrderedDict()
        self.trouble = ""
        self._reported: tuple[float, dict[str, str]] | None = None
        """What was lost when the daemon was told last, and on which connection (by the end of the one before)."""

    @property
    def pending(self) -> bool:
        return self._task is not None and not self._task.done()

    async def settled(self) -> None:
        if self._task is not None:
            await asyncio.shield(self._task)

    def tell_user(self, text: str) -> None:
        """One line in the cell's output area."""
        print(text, file=sys.stderr)

    def applied(self, n: int, lost: dict[str, str]) -> None:
        self._reported = (self._link.away_since, lost)
        lacks = self._replica.lacking.here(lost)
        more = {"lacks": lacks} if lacks else {}
        self._link.tell({"type": "applied", "n": n, "lost": oversize.summary(lost), **more, **self._imported()})

    def _imported(self) -> Message:
        news = self._replica.imports.news()
        return {"imported": news} if news else {}

    def start(self, entry: Entry, running: Any, finished: Callable[[Any], None]) -> None:
        """Put the blobs, safe from later changes, and append behind."""
        layout = Layout(entry.changes.components)
        for digest in _lacked(layout.blobs(entry.changes.components)):
            self._stored.pop(digest, None)
        puts = self._put(layout, entry.changes.components)
        request = self._append(entry, layout, running) if not puts else None
        self._task = asyncio.get_running_loop().create_task(
            self._finish(entry, layout, running, puts, request, finished)
        )

    def _put(self, layout: Layout, components: list[Packed]) -> list[Put]:
        """Give the blobs that are not known to be stored to the daemon; their memory may change afterwards."""
        every = list(layout.blobs(components))
        addressing.make(addressing.repeated(every) if self._blobs.addresses else addressing.pending(every))
        wanted = [each for each in every if each[1].address not in self._stored]
        refused: list[Put] = []
        if len(wanted) > FEW:
            wanted, refused = self._missing(wanted)
        chunks = {key(chunk): (chunk, data) for _, chunk, data in wanted}
        if chunks:
            self._reporter.sends(data.nbytes for _, data in chunks.values())
        puts: dict[str | int, concurrent.futures.Future[Message]] = {}
        for each, (chunk, data) in chunks.items():
            puts[each] = self._blobs.put(chunk.address, data, chunk.mark)
            self._reporter.follow(puts[each], data.nbytes)
        return refused + [(component, chunk, puts[key(chunk)]) for component, chunk, _ in wanted]

    def _missing(self, wanted: list[Wanted]) -> tuple[list[Wanted], list[Put]]:
        """What the store has not, and has room for; and a refusal for each component that finds none."""
        addressing.make(addressing.samples(wanted))
        there, room = self._ask_for(_addresses(wanted))
        if more := addressing.make(addressing.likely(wanted, there)):
            found, room = self._ask_for(sorted(more))
            there |= found
        if not _fit(wanted, there, room) and (more := addressing.make(addressing.pending(wanted))):
            found, room = self._ask_for(sorted(more))  # it is short of room: what it has already needs none
            there |= found
        self._stored.update(dict.fromkeys(there - _lacked(wanted)))
        return _that_fit([each for each in wanted if each[1].address not in self._stored], there, room)

    def _ask_for(self, digests: list[str]) -> tuple[set[str], Message]:
        """Which of them are in the store already, by another variable or an earlier replica; and the last answer, for
        the room that is left."""
        there: set[str] = set()
        reply: Message = {}
        for at in range(0, len(digests), MOST_ASKED):
            try:
                reply = self._blobs.have(digests[at : at + MOST_ASKED]).result(timeout=BLOB_WAIT)
            except (TimeoutError, ConnectionError):
                return there, {}  # then the others are sent
            there.update(reply.get("have") or ())
        return there, reply

    def _append(self, entry: Entry, layout: Layout, running: Any) -> Request:
        components, payload = layout.encode(entry.changes.components)
        message = {
            "n": entry.n,
            "kind": entry.kind,
            "status": entry.status,
            "execution_count": entry.execution_count,
            "source": entry.source,
            "components": components,
            "deleted": entry.changes.deleted,
            "lost": entry.changes.lost,
            "effects": entry.effects,
        }
        message, payload = bulk.pack(message, payload)
        append = {"type": "append", "entry": message, "token": running.token, **self._imported()}
        return self._link.request(append, payload)

    async def _finish(
        self,
        entry: Entry,
        layout: Layout,
        running: Any,
        puts: list[Put],
        request: Request | None,
        finished: Callable[[Any], None],
    ) -> None:
        if puts:
            await self._stored_all(entry, puts)
        self._reporter.logging()
        delay, everything = 0.05, False
        while True:
            reply, _ = await _answer(request or self._append(entry, layout, running))
            request = None
            error = reply.get("error", "")
            if reply.get("ok"):
                break
            if error == "fenced":
                reason = reply.get("reason") or "another replica holds this execution's claim"
                self._channel.reply("nbos_failed", {"n": entry.n, "reason": reason}, running.parent, running.ident)
                self._channel.die(reason)
                self._reporter.over(entry.n, committed=False)
                return
            if error == "blobs_missing":
                for digest in reply.get("missing") or ():
                    self._stored.pop(digest, None)
                await self._stored_all(entry, self._put(layout, entry.changes.components))
                continue
            if error in TOO_LARGE and not everything:
                everything, layout = True, Layout(entry.changes.components, inline_limit=0)
                await self._stored_all(entry, self._put(layout, entry.changes.components))
                continue
            if error in TOO_LARGE:
                layout = await self._shorten(entry)
            self.trouble = str(reply.get("reason") or error)
            self._reporter.trouble(self.trouble)
            await asyncio.sleep(delay)
            delay = min(1.0, delay * 2)
        self._replica.own(entry.n)
        self._reporter.over(entry.n)
        self.trouble = ""
        finished(running)
        told = {"n": entry.n, **({"reply": "follows"} if running.reply_follows else {})}
        self._channel.reply("nbos_committed", told, running.parent, running.ident)
        if self._reported != (self._link.away_since, self._replica.lost):
            self.applied(entry.n, self._replica.lost)  # the daemon knows n already, and what was lost before

    async def _stored_all(self, entry: Entry, puts: list[Put]) -> None:
        """Wait for the blobs. What could not be stored is lost, with the daemon's reason, and the user is told."""
        for component, chunk, future in puts:
            try:
                reply = await asyncio.wrap_future(future)
            except wire.WireError as err:
                reply = {"ok": False, "reason": str(err)}
            if reply.get("ok"):
                chunk.address = chunk.address or reply["hash"]
                self._stored[chunk.address] = None
                if len(self._stored) > KNOWN_BLOBS:
                    self._stored.popitem(last=False)
                continue
            reason = f"its data could not be stored: {reply.get('reason') or reply.get('error', 'refused')}"
            self._lose(entry, component, reason)

    async def _shorten(self, entry: Entry) -> Layout:
        """The daemon does not take the entry even without its values: the names go on, as lost ones."""
        before = dict(self._replica.capture.lost)
        given = dict(entry.changes.lost)
        oversize.give_up(entry.changes)
        around = dict.fromkeys(names_of(entry.effects), oversize.NO_ROOM)
        entry.changes.lost.update(around)
        entry.source, entry.effects = "", {}
        new = {name: reason for name, reason in entry.changes.lost.items() if name not in given}
        self._replica.capture.lose({name: reason for name, reason in new.items() if name not in around})
        self._replica.capture.note(around)
        for line in oversize.told(new):
            self.tell_user(line)
        entry.changes = oversize.listed(entry.changes, self._replica.capture, before)
        layout = Layout(entry.changes.components, inline_limit=0)
        await self._stored_all(entry, self._put(layout, entry.changes.components))
        return layout

    def _lose(self, entry: Entry, component: Packed, reason: str) -> None:
        if component in entry.changes.components:
            entry.changes.components.remove(component)
            if component.known:
                return  # the log has it, and whoever has loaded it from there keeps it; the next entry tries again
            lost = dict.fromkeys(component.names, reason)
            entry.changes.lost.update(lost)
            self._replica.capture.lose(lost)
            for name in component.names:
                self.tell_user(f"NBOS: {name!r} is not replicated and would be gone after a failover: {reason}")


def _lacked(wanted: Iterable[Wanted]) -> set[str]:
    """The blobs of components that the store has lost blobs of: nobody knows which others."""
    return {chunk.address for component, chunk, _ in wanted if component.anew}


def _addresses(wanted: Iterable[Wanted]) -> list[str]:
    return list(dict.fromkeys(chunk.address for _, chunk, _ in wanted if chunk.address))


def _fit(wanted: list[Wanted], there: set[str], room: Message) -> bool:
    return not _that_fit(wanted, there, room)[1]


def _that_fit(wanted: list[Wanted], there: set[str], room: Message) -> tuple[list[Wanted], list[Put]]:
    """What finds room in the store; and a refusal for each component that does not."""
    free = room.get("free")
    if not isinstance(free, int):
        return wanted, []
    kept, left = fitting(wanted, there, free)
    refused = []
    for (component, chunk, _), needs in left:
        answer: concurrent.futures.Future[Message] = concurrent.futures.Future()
        reason = why(str(room.get("where") or "the blob store"), needs, free)
        answer.set_result({"ok": False, "error": "full", "reason": reason})
        refused.append((component, chunk, answer))
    return kept, refused


async def _answer(request: Request) -> Reply:
    try:
        return await asyncio.wrap_future(request.future)
    except wire.WireError as err:
        return {"ok": False, "error": "too_large", "reason": str(err)}, b""
