"""The fair queue for a host's GPUs, without IO: who is next, what each waits for, and for how long about.

Guarantees: within an owner first come, first served; between owners the one who used fewer GPU-seconds recently goes
first, and every second of waiting counts as a GPU-second not used, so nobody waits behind an endless row of newcomers.
Whoever is first and does not fit keeps that place and has devices kept free for it: later and smaller requests pass it
only on other devices (backfilling that does not delay the head). So its wait is bounded by the cells already running.

Events come in (`Arrive`, `Leave`, `Ended`, `Room`), instructions go out (`Admit`, `Refuse`, `Tell`). An `Admit` has its
grant reserved in the ledger; the caller must hand it out or send `Ended`. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from gpu_daemon.ledger import Busy, Impossible, Ledger, Request
from nbos_cluster.records import GrantRecord

HALF_LIFE = 600.0
"""Seconds after which use counts half: 'recently' is some minutes, not the whole day."""

IN_HAND = 30.0
"""GPU-seconds that a running grant counts at least, so that an owner's second grant waits for others' first."""


@dataclass(frozen=True)
class Arrive:
    """A request that may wait (`wait`), or wants an answer now."""

    request: Request
    now: float
    wait: bool = True


@dataclass(frozen=True)
class Leave:
    """The request under this grant name does not wait any more."""

    grant: str
    now: float


@dataclass(frozen=True)
class Ended:
    """A grant was given back. `used`: it really ran (false: its claim was lost, nothing is learnt from it)."""

    grant: str
    now: float
    used: bool = True


@dataclass(frozen=True)
class Room:
    """Something else changed (a device's health, a restored grant): look again."""

    now: float


Event = Arrive | Leave | Ended | Room


@dataclass(frozen=True)
class Admit:
    """The request has its grant; it left the queue."""

    grant: GrantRecord


@dataclass(frozen=True)
class Refuse:
    """The request gets nothing; it is not in the queue. code: `busy` or `impossible`."""

    grant: str
    code: str
    reason: str


@dataclass(frozen=True)
class Tell:
    """The request waits: why, at which place of how many (1 = next), for about how many seconds (None: not known)."""

    grant: str
    position: int
    of: int
    reason: str
    estimate: float | None


Instruction = Admit | Refuse | Tell


@dataclass(frozen=True)
class _Running:
    record: GrantRecord
    since: float
    weight: float


@dataclass
class _Use:
    """GPU-seconds, decaying."""

    amount: float = 0.0
    at: float = 0.0

    def value(self, now: float) -> float:
        return self.amount * math.pow(0.5, max(0.0, now - self.at) / HALF_LIFE)

    def add(self, amount: float, now: float) -> None:
        self.amount, self.at = self.value(now) + amount, now


@dataclass
class _Mean:
    """A running mean of durations that follows what changes (weight of the newest: a quarter)."""

    value: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.value += (seconds - self.value) / min(self.count, 4)


@dataclass
class _Waiting:
    request: Request
    since: float
    told: Tell | None = None


class FairQueue:
    """The queue of one host over its ledger. Belongs to the daemon's event loop."""

    def __init__(self, ledger: Ledger, weights: dict[str, float] | None = None) -> None:
        self.ledger = ledger
        self._weights = weights or {}
        self._waiting: dict[str, _Waiting] = {}
        self._head: str = ""
        self._running: dict[str, _Running] = {}
        self._use: dict[str, _Use] = {}
        self._durations: dict[tuple[str, str], _Mean] = {}
        self._story: deque[Event] = deque(maxlen=50)

    def __len__(self) -> int:
        return len(self._waiting)

    def handle(self, event: Event) -> list[Instruction]:
        """One step. Instructions come in the order in which they must be carried out."""
        self._story.append(event)
        match event:
            case Arrive():
                return self._arrive(event)
            case Leave():
                return self._drop(event.grant, event.now)
            case Ended():
                return self._ended(event)
            case Room():
                return self._pump(event.now)

    def order(self, now: float) -> list[str]:
        """Grant names in the order in which they are served."""
        names = sorted(self._waiting, key=lambda name: (self._rank(self._waiting[name], now), name))
        if self._head in self._waiting:
            names.remove(self._head)
            names.insert(0, self._head)
        return names

    def tell_all(self, now: float) -> list[Tell]:
        """What each waiting request may be told now (for the regular repeat)."""
        if not self._waiting:
            return []
        estimates = self._estimates(now)
        order = self.order(now)
        return [
            Tell(name, i + 1, len(order), self._reason(name, order), estimates.get(name))
            for i, name in enumerate(order)
        ]

    def restored(self, record: GrantRecord, now: float) -> None:
        """A grant of before the daemon's restart counts as running since now."""
        self._running[record.grant] = _Running(record, now, self.ledger.weight(record))

    def validate_state(self) -> None:
        """Raises AssertionError (with the latest events) when the queue contradicts itself or its ledger."""
        self.ledger.validate_state()
        grants = self.ledger.grants
        wrong = [
            *(f"{n} waits and runs" for n in self._waiting if n in grants),
            *(f"{n} runs without a grant" for n in self._running if n not in grants),
            *(f"{n} waits for no GPU" for n, w in self._waiting.items() if not w.request.resources.wants_gpu),
        ]
        if self._head and self._head not in self._waiting:
            wrong.append(f"head {self._head} does not wait")
        if wrong:
            raise AssertionError(f"{wrong}; latest events: {list(self._story)}")

    # -- events -------------------------------------------------------------------------------------------------------

    def _arrive(self, event: Arrive) -> list[Instruction]:
        request, now = event.request, event.now
        if request.grant in self._waiting:
            raise ValueError(f"{request.grant} waits already; latest events: {list(self._story)}")
        impossible = self.ledger.possible(request.resources)
        if impossible:
            return [Refuse(request.grant, "impossible", impossible.reason)]
        self._waiting[request.grant] = _Waiting(request, now)
        if not request.resources.wants_gpu:
            raise ValueError("a CPU request never queues")
        instructions = self._pump(now)
        if event.wait or request.grant not in self._waiting:
            return instructions
        reason = self._reason(request.grant, self.order(now))
        others = [i for i in instructions if not (isinstance(i, Tell) and i.grant == request.grant)]
        return [*others, Refuse(request.grant, "busy", reason), *self._drop(request.grant, now)]

    def _drop(self, grant: str, now: float) -> list[Instruction]:
        if self._waiting.pop(grant, None) is None:
            return []
        if self._head == grant:
            self._head = ""
        return self._pump(now)

    def _ended(self, event: Ended) -> list[Instruction]:
        self.ledger.release(event.grant)
        run = self._running.pop(event.grant, None)
        if run is not None and event.used:
            seconds = max(0.0, event.now - run.since)
            owner, kernel = run.record.owner, run.record.kernel
            self._use.setdefault(owner, _Use()).add(seconds * run.weight, event.now)
            for key in ((owner, kernel), (owner, ""), ("", "")):
                self._durations.setdefault(key, _Mean()).add(seconds)
            self._forget(event.now)
        return self._pump(event.now)

    def _forget(self, now: float) -> None:
        """Keep the tables small: owners whose use has decayed to nothing, and the oldest kernels' means."""
        if len(self._use) > 1000:
            self._use = {o: u for o, u in self._use.items() if u.value(now) > 1.0}
        while len(self._durations) > 4000:
            self._durations.pop(next(iter(self._durations)))

    # -- decisions ----------------------------------------------------------------------------------------------------

    def _pump(self, now: float) -> list[Instruction]:
        """Admit everybody who may go, then tell those whose place or reason changed."""
        out: list[Instruction] = []
        while (step := self._next(now)) is not None:
            out.append(step)
        for tell in self.tell_all(now):
            waiting = self._waiting[tell.grant]
            old = waiting.told
            if old is None or (old.position, old.of, old.reason) != (tell.position, tell.of, tell.reason):
                waiting.told = tell
                out.append(tell)
        return out

    def _next(self, now: float) -> Admit | Refuse | None:
        """The first request, in order, that goes in (or never can any more); the first blocked one is the head."""
        closed: frozenset[str] = frozenset()
        for place, name in enumerate(self.order(now)):
            waiting = self._waiting[name]
            result = self.ledger.reserve(waiting.request, closed)
            if isinstance(result, Busy):
                if place == 0:
                    self._head = name
                    closed = self.ledger.drain_targets(waiting.request.resources)
                continue
            del self._waiting[name]
            if self._head == name:
                self._head = ""
            if isinstance(result, Impossible):
                return Refuse(name, "impossible", result.reason)
            self._running[name] = _Running(result, now, self.ledger.weight(result))
            return Admit(result)
        return None

    def _rank(self, waiting: _Waiting, now: float) -> float:
        """GPU-seconds used recently per weight, less the seconds waited (`now` is the same for all: left out)."""
        owner = waiting.request.owner
        use = self._use[owner].value(now) if owner in self._use else 0.0
        for run in self._running.values():
            if run.record.owner == owner:
                use += run.weight * max(IN_HAND, now - run.since)
        return use / self._weights.get(owner, 1.0) + waiting.since

    def _reason(self, name: str, order: list[str]) -> str:
        request = self._waiting[name].request
        fit = self.ledger.fit(request.resources)
        if isinstance(fit, Busy | Impossible):
            return fit.reason
        return f"the room on host {self.ledger.host} is kept for a larger request that waits longer"

    # -- estimates ----------------------------------------------------------------------------------------------------

    def expected(self, owner: str, kernel: str) -> float | None:
        """Seconds that a cell of this kernel holds its grant, from what was seen; None when nothing was."""
        for key in ((owner, kernel), (owner, ""), ("", "")):
            mean = self._durations.get(key)
            if mean is not None:
                return mean.value
        return None

    def _estimates(self, now: float) -> dict[str, float]:
        """Play the queue on a copy of the ledger with the expected durations; who is not reached has no estimate."""
        ledger = self.ledger.copy()
        ends = [(end, name) for name, run in self._running.items() if (end := self._ends(run, now)) is not None]
        found: dict[str, float] = {}
        waiting = self.order(now)[:100]
        while ends and waiting:
            ends.sort()
            end, name = ends.pop(0)
            ledger.release(name)
            for candidate in list(waiting):
                request = self._waiting[candidate].request
                if isinstance(ledger.reserve(request), Busy | Impossible):
                    break
                found[candidate] = round(max(0.0, end - now), 1)
                waiting.remove(candidate)
                length = self.expected(request.owner, request.kernel)
                if length is not None:
                    ends.append((end + length, candidate))
        return found

    def _ends(self, run: _Running, now: float) -> float | None:
        """When a running cell is expected to end; one that is over its mean, in half of what it took until now."""
        mean = self.expected(run.record.owner, run.record.kernel)
        if mean is None:
            return None
        elapsed = now - run.since
        return now + (mean - elapsed if elapsed < mean else elapsed / 2)
