"""One numbered execution on this replica: bid, run when it leads, capture, append.

Order within an execution: wait for the previous append; apply what has arrived; bid; `nbos_lead` (or
`nbos_yield`, and nothing else); run; reply; give the grant back; capture; idle; append; `nbos_committed`. With
`durable` the append comes before the reply. The next message is taken from the queue only after the capture, so
a next cell never sees or makes a torn state; the append itself, once it is on the socket, does not hold up
completion or inspection.

Everything here runs on the main thread. SIGINT: while bidding it leaves the queue, while the cell runs it is the
user's, afterwards it is ignored.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from nbos_cluster import wire

from . import binding, oversize, resources
from .append import Appender, Entry
from .blobchannel import BlobChannel
from .borrowed import Loans
from .departure import Departure
from .foresight import NOTHING, Foresight, Needs
from .gpu import leftovers
from .link import DaemonAway, Link
from .looking import Looking
from .pace import pace
from .precedence import Precedence
from .replica import Replica
from .reports.reporter import Reporter
from .touching import Touching

Message = dict[str, Any]

FAST = 0.004
"""Seconds the main thread itself waits for a bid's answer before it goes back to its loop: the loop costs 0.1 ms
more."""

GREETING = 0.1
"""Seconds a bid waits for the daemon's connection: less than the router's patience with a silent replica (0.15 s)."""

PATIENCE = 2.0
"""Seconds a bid outlives its connection to the daemon before it is answered `unavailable`."""


class Channel(Protocol):
    """What an execution needs of the kernel: the shell channel, the outputs' fence, and running the cell itself."""

    def reply(self, kind: str, content: Message, parent: Message, ident: Any) -> None: ...

    def fence(self, token: int) -> None: ...

    async def run_cell(self, stream: Any, ident: Any, parent: Message) -> None: ...

    async def run_again(self, code: str) -> BaseException | None: ...

    def touch(self, content: Message) -> None: ...

    def die(self, reason: str) -> None: ...

    @property
    def departure(self) -> Departure: ...


@dataclass
class Running:
    """The execution this replica leads now."""

    n: int
    token: int
    kind: str
    parent: Message
    ident: Any
    needs: Message = field(default_factory=dict)
    status: str = "ok"
    granted: bool = False
    touched: bool = False
    committed: bool = False
    reply_follows: bool = False


class Execution:
    """`greeting`: the daemon's latest answer to hello (default resources, durable)."""

    def __init__(
        self, shell: Any, link: Link, replica: Replica, channel: Channel, blobs: BlobChannel, reporter: Reporter
    ) -> None:
        self._shell, self._link, self._replica, self._channel = shell, link, replica, channel
        self.greeting: Message = {}
        self.running: Running | None = None
        self.latest: Message = {}
        """The request of the execution that was led last."""
        self._bidding: tuple[int, Message, Any] | None = None
        self.rests = False
        """The driver holds, or is about to hold, what this process has on the GPU: a CUDA call would stand still."""
        self._collects = False
        """The garbage collector is to be switched on again after a rest."""
        self.queues = False
        """A bid waits for its answer, and the main thread for nothing else."""
        self._cancelled: set[str] = set()  # msg_ids
        self._left = asyncio.Event()
        self._loop = asyncio.get_event_loop()
        self._precedence = Precedence(self._loop)
        self._looking = Looking(replica.capture, self._loop)
        self._appender = Appender(link, replica, channel, blobs, reporter)
        self._reporter = reporter
        self.loans = Loans(lambda n, version: link.tell({"type": "sliced", "n": n, "version": version}))
        self._foresight = Foresight(shell, replica)
        self.touching = Touching(link, channel.touch, self._appender.tell_user, self.loans.begin)

    # Called from other threads ---------------------------------------------------------------------------------

    def state(self) -> Message | None:
        """`running` of the hello message."""
        running = self.running
        return None if running is None else {"n": running.n, "token": running.token}

    def cell_runs(self) -> bool:
        """Whether a numbered cell runs, so that SIGINT hits that and no bid. Afterwards SIGINT is ignored."""
        return self.running is not None and self.running.kind == "cell"

    def cancel(self, n: int, msg_id: str = "") -> None:
        """Leave the queue; a request that has not come off the channel yet is known by its msg_id."""
        if msg_id:
            if len(self._cancelled) > 1000:
                self._cancelled.clear()  # of requests that never came, or had been answered already
            self._cancelled.add(msg_id)
        self._loop.call_soon_threadsafe(self._left.set)
        self._link.tell({"type": "cancel", "n": n})

    # The main thread ---------------------------------------------------------------------------------------------

    async def cell(self, stream: Any, ident: Any, parent: Message) -> None:
        """Handle an execute_request that carries `metadata.nbos_execution`."""
        asked = parent["metadata"]["nbos_execution"]
        try:
            needs = self._foresight.needs(parent, self.greeting)
        except resources.BadResources as err:
            # Every replica would say so, and the router answers the cell with it.
            content = {**_yield("impossible", str(err)), "n": asked["n"], "next": None, "everywhere": True}
            self._channel.reply("nbos_yield", content, parent, ident)
            return
        running = await self._claim(asked, "cell", needs, ident, parent)
        if running is None:
            return
        try:
            await self._channel.run_cell(stream, ident, parent)
        finally:
            self.ended()
        if not running.committed:
            self._channel.departure.gone()  # before the capture takes the interpreter
            await self._commit(running)

    async def sync(self, ident: Any, parent: Message) -> None:
        """Handle an nbos_sync_request: replicate what changed between cells, if anything did."""
        asked = parent["metadata"]["nbos_execution"]
        await self._appender.settled()
        self._looking.disturb()
        if not self._replica.changes():
            self._channel.reply("nbos_committed", {"n": asked["n"], "nothing": True}, parent, ident)
            return
        running = await self._claim(asked, "sync", NOTHING, ident, parent)
        if running is not None:
            self.ended()
            await self._commit(running)

    async def takes_over(self) -> None:
        """The cell's code is about to run, under its claim and grant: make what only a replay can make here."""
        running = self.running
        self._looking.before_code()
        if running is not None:
            replica = self._replica
            await replica.rerun.before_cell(running.needs, self._channel.run_again, self._appender.tell_user)
            replica.records.begin(str(running.parent["content"].get("code", "")))
            if running.granted:
                pace.begin()

    def ended(self) -> None:
        """The cell's code is over: the grant goes back, and an interrupt has nothing to hit any more."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        running, late = self.running, self.touching.end()
        if running is not None and running.granted:
            running.granted = False
            borrower = self.loans.borrower
            borrower.end()
            peak, notice = binding.peak(), binding.unbind()
            self._replica.uses.end(time.monotonic(), peak, self._replica.history.last(), borrower)
            if notice:
                self._appender.tell_user(notice)
            told = binding.left()
            took = self._took(running)
            self._link.tell({"type": "release", "n": running.n, "took": took, "left": told.left, "peak": told.peak})
        elif running is not None and late:
            self._link.tell({"type": "release", "n": running.n, "took": None})

    def _took(self, running: Running) -> Message | None:
        took = pace.took(running.status == "ok")
        # On TPCs that changed the cell was neither as fast as on the ones nor as on the others; and of a cell that was
        # granted a GPU on its way, the whole of it says nothing about the GPU.
        nothing = self.loans.borrower.changed or (running.touched and took is not None and took["unit"] == "cell")
        return None if nothing else took

    async def replied(self, status: str) -> None:
        """The reply is ready and not sent: the place for a durable append."""
        running = self.running
        if running is None:
            return
        running.status = "ok" if status == "ok" else "error"
        # The grant goes back after the reply, unless that has to wait: a write to the daemon costs the reply 0.15 ms.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.greeting.get("durable"):
            self.ended()
            running.reply_follows = True
            await self._commit(running)
            await self._appender.settled()
        self._channel.departure.ready()

    def used(self, msg_id: str) -> Message:
        """For the reply to a cell: what it used of the GPUs; {} where it was granted none."""
        running = self.running
        if running is None or running.parent["header"]["msg_id"] != msg_id:
            return {}
        peak = binding.peak() if running.granted else 0
        return self._replica.uses.of(running.n, time.monotonic(), peak, self.loans.borrower)

    async def settled(self) -> None:
        """Wait for the append that is under way."""
        await self._appender.settled()

    async def catch_up(self) -> None:
        """Apply what the daemon pushed; never while an append of our own is under way."""
        self._looking.disturb()
        far, behind = self._replica.far_behind, self._replica.behind
        if far:
            self._precedence.first()  # who joins, or gets too little of a busy host, must be able to lead some time
        elif behind:
            self._precedence.last()
        await self._replica.catch_up(self._appender.applied)
        if far and self._bidding is None and self.running is None:
            self._precedence.last()
        self._looking.after_entry()

    def give_back(self, message: Message) -> None:
        """Somebody waits for what this process left on a device, and no cell runs."""
        self._looking.disturb()
        ask = message.get("ask")
        if ask == "checkpoint":
            self._rest()
            self._link.tell({"type": "gave_back", "ask": ask, "number": message.get("number")})
        elif not self.rests:
            self._link.tell({"type": "gave_back", "ask": ask, **binding.give_back()})

    @property
    def storing(self) -> bool:
        """An append is under way."""
        return self._appender.pending

    def _rest(self) -> None:
        """Until the daemon says `thawed` nothing runs that could call CUDA. Nor does the garbage collector: an event or
        a graph that it found on the link's thread would stand still there, and the daemon's word be heard no more."""
        self.rests = True
        if gc.isenabled():
            gc.collect()
            gc.disable()
            self._collects = True

    def thawed(self) -> None:
        """On the link's thread: what the driver held is back."""
        self.rests = False
        if self._collects:
            self._collects = False
            gc.enable()

    def waiting(self, message: Message) -> None:
        """The daemon pushed our place in the queue."""
        if self._bidding is not None and self._bidding[0] == message.get("n"):
            content = {key: value for key, value in message.items() if key != "type"}
            content.setdefault("host", self.greeting.get("host", ""))
            if self._appender.pending:
                self._appender.trouble = str(message.get("reason", ""))
                self._reporter.trouble(self._appender.trouble)
            self._channel.reply("nbos_waiting", content, self._bidding[1], self._bidding[2])

    def renewed(self, n: int, token: int) -> None:
        """The claim was renewed under a new token, while nobody else took n."""
        if self.running is not None and self.running.n == n:
            self.running.token = token
            self._channel.fence(token)

    async def _claim(self, asked: Message, kind: str, needs: Needs, ident: Any, parent: Message) -> Running | None:
        self._looking.disturb()
        self._precedence.first()
        n, msg_id = int(asked["n"]), parent["header"]["msg_id"]
        wait = bool(asked.get("wait"))
        bid = {"type": "bid", "n": n, "attempt": int(asked.get("attempt", 1)), "kind": kind, "resources": needs.now}
        bid |= {"wait": wait, "code": needs.code}
        if away := leftovers.away():
            bid["away"] = away
        if needs.later is not None:
            bid["touch"] = needs.later
        if needs.borrow is not None:
            bid["borrow"] = needs.borrow
        self._left.clear()
        with _interrupts(lambda: self.cancel(n)):
            self._bidding = (n, parent, ident)
            answer = await self._ready(wait)
            if msg_id in self._cancelled:
                answer = _yield("cancelled", "interrupted")
            if answer is None:
                answer = await self._bid({**bid, "applied": self._replica.applied})
            self._bidding = None
            self._cancelled.discard(msg_id)
        if answer.get("answer") != "lead":
            content = {"n": n, "code": answer.get("code", "unavailable"), "reason": answer.get("reason", "")}
            self._channel.reply("nbos_yield", {**content, "next": answer.get("next")}, parent, ident)
            return None
        return self._lead(Running(n, answer["token"], kind, parent, ident), needs, answer)

    async def _ready(self, wait: bool) -> Message | None:
        """Have the previous append and the entries of others behind us; a yield when that does not come about."""
        if not self._appender.pending:
            await self._catch_up_unless_it_rests()
            return None
        settled = asyncio.ensure_future(self._appender.settled())
        left = asyncio.ensure_future(self._left.wait())
        try:
            await asyncio.wait({settled, left}, timeout=None if wait else PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                return _yield("cancelled", "interrupted")
            if not settled.done():
                why = self._appender.trouble or "the changes of the cell before are not stored yet"
                return _yield("unavailable", why)
        finally:
            left.cancel()
            settled.cancel()
        await self._catch_up_unless_it_rests()
        return None

    async def _catch_up_unless_it_rests(self) -> None:
        """What has arrived could call CUDA: the daemon then says that this replica is behind, and the next attempt
        comes when it is thawed."""
        if not self.rests:
            await self._replica.catch_up(self._appender.applied)

    def _lead(self, running: Running, needs: Needs, answer: Message) -> Running:
        self.running, self.latest, n, later = running, running.parent, running.n, needs.later
        self.thawed()  # the daemon leads nobody whom the driver holds
        running.granted = answer.get("grant") is not None
        running.needs = later if later is not None and running.granted else needs.now
        self._channel.fence(running.token)
        content = {"n": n, "token": running.token, "grant": answer.get("grant"), "host": self.greeting.get("host", "")}
        self._channel.reply("nbos_lead", content, running.parent, running.ident)
        grant = binding.from_wire(answer.get("grant"))
        self._replica.uses.begin(grant, n, float(answer.get("waited") or 0.0), time.monotonic())
        try:
            notice = binding.bind(grant)
            self.loans.begin(grant)
        except Exception as err:  # noqa: BLE001 - a library's complaint about a device must not leave n without an end
            notice = f"NBOS: the grant could not be bound in this process: {err}"
        if notice:
            self._appender.tell_user(notice)
        if later is not None and isinstance(may := answer.get("touch"), dict):
            self.touching.begin(running, needs, may, lambda got, after: self._touched(running, later, got, after))
        return running

    def _touched(self, running: Running, needs: Message, grant: binding.Grant, waited: float) -> None:
        """The cell was granted a GPU on its way; on the thread that touched it."""
        running.touched, running.needs = True, needs
        self._replica.uses.begin(grant, running.n, waited, time.monotonic())
        self._foresight.touched.add(str(running.parent["content"].get("code", "")))
        pace.begin()

    async def _bid(self, bid: Message) -> Message:
        if not await self._greeted_soon():
            return _yield("unavailable", self._link.since())
        request = self._link.request(bid)
        try:
            message, _ = request.future.result(timeout=FAST)
        except concurrent.futures.TimeoutError:
            self.queues = True
            answer = asyncio.wrap_future(request.future)
            away = 0.0
            while not (await asyncio.wait({answer}, timeout=0.25))[0]:
                away = 0.0 if self._link.connected else away + 0.25
                if away >= PATIENCE:
                    self._link.withdraw(request, self._link.since())
            try:
                message, _ = answer.result()
            except (DaemonAway, wire.WireError) as err:
                return _yield("unavailable", str(err))
            finally:
                self.queues = False
        if not message.get("ok", False):
            return _yield("unavailable", str(message.get("error", "refused")))
        return message

    async def _greeted_soon(self) -> bool:
        """Whether the daemon is there; a connection that is just being made gets a moment to come about."""
        deadline = time.monotonic() + GREETING
        while not self._link.connected and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return bool(self._link.connected)

    async def _commit(self, running: Running) -> None:
        """Capture now, without a break; append behind."""
        running.committed = True
        request = running.parent["content"]
        code = request.get("code", "") if running.kind == "cell" else ""
        self._reporter.began(running.n, running.parent)
        taken = self._replica.take_changes(code, running.status == "ok", running.needs)
        costly = self._reporter.captured(running.n, taken.changes.components, taken.changes.deleted)
        for line in [*taken.notices, *costly]:
            self._appender.tell_user(line)
        kept = request.get("store_history", not request.get("silent", False)) and not request.get("silent", False)
        entry = Entry(
            n=running.n,
            kind=running.kind,
            status=running.status,
            execution_count=self._replica.history.last(),
            source=oversize.source(code) if kept else "",
            changes=taken.changes,
            effects=taken.effects,
        )
        self._appender.start(entry, running, self._finished)

    def _finished(self, running: Running) -> None:
        if self.running is running:
            self.running = None
        self._looking.after_cell()


def _yield(code: str, reason: str) -> Message:
    return {"answer": "yield", "code": code, "reason": reason}


@contextmanager
def _interrupts(then: Callable[[], Any]) -> Iterator[None]:
    """SIGINT calls `then` instead of raising KeyboardInterrupt somewhere in the event loop."""
    previous = signal.signal(signal.SIGINT, lambda *_: then())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
