"""The fair queue for a host's GPUs, without IO: who is next, what each waits for, and for how long about.

Guarantees: the order is that of `order`: nobody waits for ever. Whoever is first and does not fit keeps that place
among its like and has devices kept free for it: who comes later passes it only on other devices (backfilling that does
not delay the head). So its wait is bounded by the cells already running there. What a reservation keeps is left to its
members.

Events come in (`Arrive`, `Leave`, `Ended`, `Gave`, `Room`), instructions go out (`Admit`, `Refuse`, and those of
`loans`). An `Admit` has its grant reserved in the ledger; the caller must hand it out or send `Ended`. A grant whose
TPCs are on loan is reserved, and admitted when they are back (it is `coming`). What those who wait are to be told,
`news` says: apart from the decisions, so that a bid is not kept waiting by the telling of others. Times are seconds of
one monotonic clock; `wall` is what makes Unix time of them, for reservations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gpu_daemon.book import Holder
from gpu_daemon.borrowing import Borrowing
from gpu_daemon.estimates import Durations, Waiter, play
from gpu_daemon.ledger import NOBODY, Busy, Fit, Impossible, Kept, Ledger, Request, Shortage
from gpu_daemon.loans import Late, Loans, Ready, firm
from gpu_daemon.order import Order, Policy, Waiting
from gpu_daemon.owed import both
from gpu_daemon.queueevents import Admit, Arrive, Brings, Ended, Event, Gave, Instruction, Leave, Refuse, Room, Tell
from gpu_daemon.reservations import Calendar, Reservation
from gpu_daemon.seats import Seats
from gpu_daemon.shares import Holdings
from gpu_daemon.waitreasons import coming_back, owed_to_others, passed_by, reserved
from nbos_cluster.records import GrantRecord

__all__ = [
    "Admit",
    "Arrive",
    "Brings",
    "Ended",
    "Event",
    "FairQueue",
    "Gave",
    "Instruction",
    "Leave",
    "Refuse",
    "Room",
    "Tell",
]


@dataclass
class _Running:
    """record: what it keeps."""

    record: GrantRecord
    since: float
    weight: float


class FairQueue:
    """The queue of one host over its ledger. Belongs to the daemon's event loop."""

    def __init__(self, ledger: Ledger, policy: Policy | None = None, wall: float = 0.0) -> None:
        self.ledger, self.policy, self.wall = ledger, policy or Policy(), wall
        self.durations = Durations(self.policy.unknown_run)
        self.holdings = Holdings()
        self._calendar = Calendar(self.policy.reservations)
        self._seats = Seats(ledger, self._calendar, self.holdings)
        self.loans = Loans(ledger, (), self.policy.give_back)
        self._borrowing = Borrowing(ledger, self.loans, self.policy, self.holdings)
        self._coming: dict[str, Waiting] = {}
        """Grants that are reserved, and wait for what borrowers are to give back."""
        self._order = Order(self.policy, ledger, self.holdings, self._seats)
        self._waiting: dict[str, Waiting] = {}
        self._running: dict[str, _Running] = {}
        self._arrivals = 0
        self._head = ""
        self._drain: tuple[str, tuple[str, ...], frozenset[str]] = ("", (), frozenset())
        """For which head, beside which reservations, which devices are kept free."""
        self._told: dict[str, Tell] = {}
        self._story: deque[Event] = deque(maxlen=50)
        self.stale = False
        """Places or reasons may have changed since the latest `news`."""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._coming)

    def handle(self, event: Event) -> list[Instruction]:
        """One step. Instructions come in the order in which they must be carried out."""
        self._story.append(event)
        out: list[Instruction] = []
        match event:
            case Arrive():
                out = self._arrive(event)
            case Leave():
                out = self._drop(event.grant, event.now)
            case Ended():
                out = self._ended(event)
            case Brings(grant, away, now):
                if (waiting := self._waiting.get(grant)) is not None:
                    waiting.request = replace(waiting.request, away=away)
                out = self._pump(now)
            case Gave():
                self.loans.gave(event.grant, event.version, event.now)
            case Room():
                self._changed()
                out = self._pump(event.now)
        return [*out, *self._settled(event.now)]

    def lend_on(self, uuids: Iterable[str], now: float) -> list[Instruction]:
        """The devices whose slices can change while a cell runs; on others no new loans are made."""
        self.loans.lendable = frozenset(uuids) if self.policy.lend else frozenset()
        self._changed()
        return [*self._pump(now), *self._settled(now)]

    @property
    def grants(self) -> dict[str, GrantRecord]:
        """The grants whose cells run, with what is lent to them."""
        return {n: self.loans.record(n, r.record) for n, r in self._running.items() if n not in self._coming}

    def order(self, now: float) -> list[str]:
        """Grant names in the order in which they are served."""
        return self._order.sort(self._waiting, self._head, now, now + self.wall)

    def restore(self, record: GrantRecord, now: float) -> str:
        """A grant of before the daemon's restart counts as running since now. Returns why it cannot be, or ''."""
        if self.ledger.holds(record.grant):
            return ""
        kept = firm(record)
        refused = self.ledger.restore(kept)
        if refused is not None:
            return refused.reason
        wrong = self.loans.restore(record, kept, self._order.standing_of(record).priority)
        if wrong:
            self.ledger.release(record.grant)
            return wrong
        self._enter(kept, now)
        self._reweigh(record, now)
        return ""

    def remember_use(self, owner: str, device_seconds: float, at: float, now: float) -> None:
        """What the accounts of before the daemon's restart say; each owner's oldest first. at: of the same clock."""
        self._order.use(owner, now).add(device_seconds, at)

    def used(self, owner: str, now: float) -> float:
        """Device-seconds of the last day."""
        return self._order.used(owner, now)

    def validate_state(self) -> None:
        """Raises AssertionError (with the latest events) when the queue contradicts itself or its ledger."""
        self.ledger.validate_state()
        self.loans.validate_state()
        grants = self.ledger.grants
        held = Holdings()
        for run in self._running.values():
            held.add(run.record)
        wrong = [
            *(f"{n} waits and runs" for n in self._waiting if n in grants),
            *(f"{n} runs without a grant" for n in self._running if n not in grants),
            *(f"{n} is coming, and not reserved" for n in self._coming if n not in self._running),
            *(f"{n} waits for no GPU" for n, w in self._waiting.items() if not w.request.resources.wants_gpu),
        ]
        if self._head and self._head not in self._waiting:
            wrong.append(f"head {self._head} does not wait")
        if held != self.holdings:
            wrong.append("what owners hold was counted wrong")
        if wrong:
            raise AssertionError(f"{wrong}; latest events: {list(self._story)}")

    # -- events -------------------------------------------------------------------------------------------------------

    def _arrive(self, event: Arrive) -> list[Instruction]:
        request, now = event.request, event.now
        if request.grant in self._waiting:
            raise ValueError(f"{request.grant} waits already; latest events: {list(self._story)}")
        if not request.resources.wants_gpu:
            raise ValueError("a CPU request never queues")
        impossible = self.ledger.possible(request.resources)
        if impossible:
            return [Refuse(request.grant, "impossible", impossible.reason)]
        self._arrivals += 1
        waiting = Waiting(request, now, self._arrivals, self.ledger.memory_of(request.resources))
        first = self._is_first(waiting, now)
        result = self._try(waiting, frozenset() if first else self._closed, now)
        if isinstance(result, GrantRecord):
            if request.grant in self._coming and not event.wait and not self.loans.at_once(result):
                self._give_up(request.grant, now)
                return [Refuse(request.grant, "busy", coming_back(self.ledger.host, self.policy.give_back))]
            return self._admitted(result)
        if not event.wait:
            return [Refuse(request.grant, "busy", self._why(waiting, now))]
        self._waiting[request.grant] = waiting
        self.stale = True
        # Whoever is first now has devices kept; those kept for the one who was first are free for others.
        return self._pump(now) if first else []

    def _is_first(self, waiting: Waiting, now: float) -> bool:
        head = self._waiting.get(self._head)
        if head is None:
            return True
        wall = now + self.wall
        return self._order.rank(waiting, now, wall, False) < self._order.rank(head, now, wall, True)

    def _drop(self, grant: str, now: float) -> list[Instruction]:
        if grant in self._coming:
            self._give_up(grant, now)
            return self._pump(now)
        if self._waiting.pop(grant, None) is None:
            return []
        self._forget(grant)
        return self._pump(now)

    def _ended(self, event: Ended) -> list[Instruction]:
        run = self._give_up(event.grant, event.now, event.used)
        if run is not None and event.used:
            self.durations.add(run.record.owner, run.record.kernel, max(0.0, event.now - run.since))
        return self._pump(event.now)

    def _give_up(self, grant: str, now: float, used: bool = False) -> _Running | None:
        """The grant is over, or nothing ever ran on it."""
        self.ledger.release(grant, used)
        self.loans.leave(grant, now)
        if self._coming.pop(grant, None) is not None:
            self._forget(grant)
        run = self._running.pop(grant, None)
        if run is not None:
            self.holdings.add(run.record, -1)
            self._order.ended(run.record, run.weight, now)
        self._changed()
        return run

    def _changed(self) -> None:
        self._seats.changed()
        self._borrowing.changed()

    def _forget(self, grant: str) -> None:
        """It left the queue."""
        self.stale = True
        self._told.pop(grant, None)
        if self._head == grant:
            self._head = ""

    # -- decisions ----------------------------------------------------------------------------------------------------

    @property
    def _closed(self) -> frozenset[str]:
        return self._drain[2] if self._drain[0] == self._head else frozenset()

    def _pump(self, now: float) -> list[Instruction]:
        """Admit everybody who may go."""
        out: list[Instruction] = []
        while self._waiting and (step := self._next(now)) is not None:
            out += self._admitted(step) if isinstance(step, GrantRecord) else [step]
        return out

    def _admitted(self, record: GrantRecord) -> list[Instruction]:
        return [Admit(record)] if record.grant not in self._coming else []

    def _next(self, now: float) -> GrantRecord | Refuse | None:
        """The first request, in order, that goes in (or never can any more); the first blocked one is the head."""
        hopeless: set[tuple[object, ...]] = set()
        for place, name in enumerate(self.order(now)):
            waiting = self._waiting[name]
            keeping = self._in_the_way(waiting, now)
            key = (waiting.request.resources, keeping, *self._particular(waiting.request))
            if place and key in hopeless:
                continue
            result = self._try(waiting, self._closed if place else frozenset(), now)
            if isinstance(result, Busy):
                if place == 0:
                    self._hold(waiting, keeping, now)
                else:
                    hopeless.add(key)
                continue
            self._waiting.pop(name, None)
            self._forget(name)
            return result if isinstance(result, GrantRecord) else Refuse(name, "impossible", result.reason)
        return None

    def _particular(self, request: Request) -> tuple[Holder, int]:
        """What makes it fit where another of its shape does not: memory that its own process has, or brings."""
        return (request.holder if self.ledger.particular(request.holder) else NOBODY), request.away

    def _try(self, waiting: Waiting, closed: frozenset[str], now: float) -> GrantRecord | Busy | Impossible:
        """Reserve what the request gets now; it is `coming` where borrowers are on it."""
        request, kept = waiting.request, self._kept(waiting, now)
        priority = self._order.standing(request).priority
        result = self.ledger.reserve(request, closed, kept)
        if isinstance(result, Busy) and self._lends_to(waiting, now):
            result = self._borrowing.reserve(request, priority, closed, kept or {}) or result
        if isinstance(result, GrantRecord):
            if not self.loans.enter(result, self._borrowing.wants(request), priority, now):
                self._coming[request.grant] = waiting
                self.stale = True
            self._enter(result, now)
        return result

    def _enter(self, record: GrantRecord, now: float) -> None:
        self._running[record.grant] = _Running(record, now, self.ledger.weight(record))
        self.holdings.add(record)
        self._order.granted(record, now)
        self._changed()

    def _settled(self, now: float) -> list[Instruction]:
        """What became of loans, and of those who wait for them."""
        out: list[Instruction] = []
        for step in self.loans.settle(self._borrowing.aside(), now):
            if isinstance(step, Late):
                out.append(step)
                continue
            self._reweigh(step.grant, now)
            if isinstance(step, Ready):
                self._running[step.grant.grant].since = now
                self._coming.pop(step.grant.grant)
                self._forget(step.grant.grant)
            out.append(Admit(step.grant) if isinstance(step, Ready) else step)
        return out

    def _reweigh(self, record: GrantRecord, now: float) -> None:
        run, weight = self._running[record.grant], self.ledger.weight(record)
        self._order.resized(record.owner, weight - run.weight, now)
        run.weight = weight

    def _hold(self, waiting: Waiting, keeping: tuple[str, ...], now: float) -> None:
        """It is first and does not fit: keep devices for it, the same ones for as long as they can serve it."""
        request, ledger = waiting.request, self.ledger
        name, shape, who = request.grant, request.resources, (request.holder, request.away)
        self.stale = self.stale or self._head != name
        self._head = name
        if keeping and isinstance(ledger.fit(shape, (), None, *who), Fit):
            # Only a reservation, or what is owed to quotas, is in its way: who ends before that takes nothing from it.
            self._drain = (name, keeping, frozenset())
        elif self._drain[:2] != (name, keeping) or not ledger.serves(shape, self._drain[2], *who):
            self._drain = (name, keeping, ledger.drain_targets(shape, self._kept(waiting, now), *who))

    def shortage(self, now: float) -> tuple[Request, Shortage] | None:
        """The first request, in order, that would go in if other processes gave back what they left on a device."""
        if not self.ledger.anything_left:
            return None
        for place, name in enumerate(self.order(now)):
            waiting = self._waiting[name]
            request, kept = waiting.request, self._kept(waiting, now)
            # For the head the devices that are kept free for it, where one of those will do.
            others = frozenset(d.uuid for d in self.ledger.devices) - self._closed if not place else self._closed
            found = self.ledger.shortage(request, others, kept)
            if found is None and not place:
                found = self.ledger.shortage(request, (), kept)
            if found is not None:
                return request, found
        return None

    def _keeping(self, waiting: Waiting, now: float) -> tuple[Reservation, ...]:
        """The reservations that keep room from this request: those that are on, or begin before it most likely ends.
        Once it is overdue only those that are on, so that a cell longer than any gap between courses gets its turn."""
        if not self._calendar:
            return ()
        request, wall = waiting.request, now + self.wall
        late = self._order.overdue(waiting, now)
        until = wall if late else wall + self.durations.bound(request.owner, request.kernel)
        return tuple(
            r
            for r in self._calendar.between(wall, until)
            if not self._seats.covers(r, request.owner, request.groups, request.resources)
        )

    def _kept(self, waiting: Waiting, now: float) -> Kept | None:
        keeping = self._keeping(waiting, now)
        kept = self._seats.kept(keeping) if keeping else None
        return both(kept, self._borrowing.owed(waiting.request)) if self._lends_to(waiting, now) else kept

    def _lends_to(self, waiting: Waiting, now: float) -> bool:
        """Whether the request gets of others' quotas what is lent, and no more. Who waits for very long, and who is
        within a quota, is not held to that."""
        if not self._borrowing.concerns(waiting.request) or self._order.overdue(waiting, now):
            return False
        return self._order.guarantee(waiting, now + self.wall) is None

    def _in_the_way(self, waiting: Waiting, now: float) -> tuple[str, ...]:
        """What keeps room from the request: two of the same shape with the same in their way fare alike."""
        keeping = tuple(r.name for r in self._keeping(waiting, now))
        request = waiting.request
        mine = ("\0quotas", request.owner, *request.groups, request.kernel, str(request.borrow))
        return (*keeping, *mine) if self._lends_to(waiting, now) else keeping

    # -- what those who wait are told ---------------------------------------------------------------------------------

    def news(self, now: float) -> list[Tell]:
        """What changed for those who wait, besides the estimate, since it was told last."""
        self.stale = False
        changed = []
        for tell in self.tell_all(now):
            old = self._told.get(tell.grant)
            if old is None or (old.position, old.of, old.reason) != (tell.position, tell.of, tell.reason):
                changed.append(tell)
            self._told[tell.grant] = tell
        return changed

    def tell_all(self, now: float) -> list[Tell]:
        """What each waiting request may be told now (for the regular repeat)."""
        within = self.policy.give_back
        tells = [Tell(n, 1, len(self), coming_back(self.ledger.host, within), within) for n in self._coming]
        if not self._waiting:
            return tells
        order = self.order(now)
        estimates = self._estimates(order, now)
        whys: dict[tuple[object, ...], str] = {}
        latest = self._waiting[order[0]]
        for place, name in enumerate(order):
            waiting = self._waiting[name]
            key = (waiting.request.resources, self._in_the_way(waiting, now), *self._particular(waiting.request))
            if key not in whys:
                whys[key] = self._why(waiting, now)
            latest = max(latest, waiting, key=lambda w: w.number)
            reason = whys[key] + (self._passed_by(waiting, latest, now) if latest is not waiting else "")
            tells.append(Tell(name, place + 1 + len(self._coming), len(self), reason, estimates.get(name)))
        return tells

    def _why(self, waiting: Waiting, now: float) -> str:
        request, host = waiting.request, self.ledger.host
        resources, who = request.resources, (request.holder, request.away)
        fit = self.ledger.fit(resources, (), None, *who)
        if isinstance(fit, Busy | Impossible):
            return fit.reason
        keeping = self._keeping(waiting, now)
        if keeping and isinstance(self.ledger.fit(resources, (), self._seats.kept(keeping), *who), Busy):
            return reserved(host, keeping, self.durations.bound(request.owner, request.kernel))
        if self._lends_to(waiting, now) and isinstance(
            self.ledger.fit(resources, (), self._kept(waiting, now), *who), Busy
        ):
            return owed_to_others(host, waiting.request.borrow)
        return f"the room on host {host} is kept for a larger request that waits longer"

    def _passed_by(self, waiting: Waiting, passing: Waiting, now: float) -> str:
        """Why `passing`, who came later, goes first."""
        wall = now + self.wall
        rank = self._order.rank(passing, now, wall, passing.request.grant == self._head)
        own = self._order.rank(waiting, now, wall, False)
        return passed_by(rank, own, self.used(waiting.request.owner, now))

    def expected(self, owner: str, kernel: str) -> float | None:
        """Seconds that a cell of this kernel holds its grant, from what was seen; None when nothing was."""
        return self.durations.expected(owner, kernel)

    def _estimates(self, order: list[str], now: float) -> dict[str, float]:
        ends = [(end, name) for name, run in self._running.items() if (end := self._ends(run, now)) is not None]
        waiting = [Waiter(self._waiting[n].request, self._not_before(self._waiting[n], now)) for n in order]
        return play(self.ledger.copy(), ends, waiting, self.durations, now)

    def _not_before(self, waiting: Waiting, now: float) -> float:
        """When the reservations end that alone are in the way of the request; 0 where something else is."""
        keeping, request = self._keeping(waiting, now), waiting.request
        if not keeping or not isinstance(
            self.ledger.fit(request.resources, (), None, request.holder, request.away), Fit
        ):
            return 0.0
        windows = [self._calendar.window(r, now + self.wall) for r in keeping]
        return max(w[1] for w in windows if w is not None) - self.wall

    def _ends(self, run: _Running, now: float) -> float | None:
        """When a running cell is expected to end; one that is over its mean, in half of what it took until now."""
        mean = self.durations.expected(run.record.owner, run.record.kernel)
        if mean is None:
            return None
        elapsed = now - run.since
        return now + (mean - elapsed if elapsed < mean else elapsed / 2)
