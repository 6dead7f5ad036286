"""In which order those who wait are served. No IO, no clock.

    0  who has waited longest, once that is longer than `overdue_after`; one at a time (a turn)
    1  cells within a guaranteed quota, or a seat of a course that is on: first come, first served
    2  others who have waited for longer than `overdue_after`: first come, first served
    3  everybody else: higher priority first; then the owner who used less of the GPUs in the last day, by weight;
       then first come, first served

So nobody waits for ever, whatever the shares: an overdue request gets a turn after those that wait longer. The next
turn comes a tenth of `overdue_after` after the last, and not before the guaranteed request that was next meanwhile has
its grant: turns and guarantees alternate, so that neither makes the other wait for more than one of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpu_daemon.ledger import Ledger, Request
from gpu_daemon.reservations import Reservation
from gpu_daemon.seats import Seats
from gpu_daemon.shares import Holdings, Principal, Shares, Standing
from gpu_daemon.use import DAY, Use
from nbos_cluster.records import GrantRecord

TURN, GUARANTEED, OVERDUE, FAIR = range(4)
Rank = tuple[int, int, int, int, float, int]

IN_HAND = 30.0
"""Device-seconds that a running device counts beyond its time: an owner's second grant waits for others' first."""

STEP = 60.0
"""Device-seconds (per weight) that are no difference: within them, first come is first served."""


@dataclass(frozen=True)
class Policy:
    """What was configured. overdue_after: seconds after which waiting outweighs priority and shares. unknown_run:
    seconds that a cell counts for, of whose kernel and owner nothing is known. window: seconds of use that count."""

    shares: Shares = field(default_factory=Shares)
    reservations: tuple[Reservation, ...] = ()
    overdue_after: float = 3600.0
    unknown_run: float = 3600.0
    window: float = DAY
    lend: bool = False
    """Idle quota is given to others on loan only, where slices can change while a cell runs."""
    give_back: float = 2.0
    """Seconds that a borrower has to give back what is recalled, before it is late."""

    @property
    def turn_every(self) -> float:
        return self.overdue_after / 10


@dataclass
class Waiting:
    """A request in the queue. number: counts arrivals. memory: the bytes that it would get, for quotas."""

    request: Request
    since: float
    number: int
    memory: int = 0


class Order:
    """Ranks. Told of every grant given (`granted`) and given back (`ended`)."""

    def __init__(self, policy: Policy, ledger: Ledger, holdings: Holdings, seats: Seats) -> None:
        self._policy, self._ledger, self._holdings, self._seats = policy, ledger, holdings, seats
        self._use: dict[str, Use] = {}
        self._standings: dict[tuple[str, tuple[str, ...], str], Standing] = {}
        self._turn = ""
        self._turn_given = float("-inf")
        self._owed: str | None = ""
        """The guaranteed request that must be served before the next turn; None: to be looked up."""

    def granted(self, record: GrantRecord, now: float) -> None:
        self.use(record.owner, now).change_rate(self._ledger.weight(record), now)
        if record.grant == self._turn:
            self._turn, self._turn_given, self._owed = "", now, None

    def resized(self, owner: str, by: float, now: float) -> None:
        """A grant holds so much more of the devices, or less."""
        self.use(owner, now).change_rate(by, now)

    def ended(self, record: GrantRecord, weight: float, now: float) -> None:
        self.use(record.owner, now).change_rate(-weight, now)
        if len(self._use) > 1000:
            self._use = {o: u for o, u in self._use.items() if u.rate or u.value(now) > 1.0}

    def use(self, owner: str, now: float) -> Use:
        found = self._use.get(owner)
        if found is None:
            found = self._use[owner] = Use(now, self._policy.window)
        return found

    def used(self, owner: str, now: float) -> float:
        """Device-seconds of the last day."""
        return self._use[owner].value(now) if owner in self._use else 0.0

    def guarantee(self, waiting: Waiting, wall: float) -> Principal | Reservation | None:
        """Whose quota, or which course's seat, the request would stay within."""
        request, quotas = waiting.request, self.standing(waiting.request).quotas
        within = self._holdings.within(quotas, request.resources, waiting.memory) if quotas else None
        if not self._policy.reservations:
            return within
        return within or self._seats.seated(request.owner, request.groups, request.resources, wall)

    def rank(self, waiting: Waiting, now: float, wall: float, head: bool) -> Rank:
        """Smaller is earlier. head: it is first already, and keeps that place among its like."""
        request, since = waiting.request, waiting.since
        first = 0 if head else 1
        if request.grant == self._turn:
            return (TURN, 0, first, 0, since, waiting.number)
        if self.guarantee(waiting, wall) is not None:
            return (GUARANTEED, 0, first, 0, since, waiting.number)
        if self.overdue(waiting, now):
            return (OVERDUE, 0, first, 0, since, waiting.number)
        standing = self.standing(request)
        use = self._use.get(request.owner)
        share = (use.value(now) + use.rate * IN_HAND) / standing.weight if use is not None else 0.0
        return (FAIR, -standing.priority, first, int(share // STEP), since, waiting.number)

    def standing(self, request: Request) -> Standing:
        return self._standing((request.owner, request.groups, request.kernel))

    def standing_of(self, record: GrantRecord) -> Standing:
        return self._standing((record.owner, record.groups, record.kernel))

    def _standing(self, key: tuple[str, tuple[str, ...], str]) -> Standing:
        found = self._standings.get(key)
        if found is None:
            if len(self._standings) > 10_000:
                self._standings.clear()
            found = self._standings[key] = self._policy.shares.of(*key)
        return found

    def overdue(self, waiting: Waiting, now: float) -> bool:
        return now - waiting.since >= self._policy.overdue_after

    def sort(self, waiting: Mapping[str, Waiting], head: str, now: float, wall: float) -> list[str]:
        """The grant names in the order in which they are served."""
        self._give_turn(waiting, head, now, wall)
        return sorted(waiting, key=lambda name: self.rank(waiting[name], now, wall, name == head))

    def _give_turn(self, waiting: Mapping[str, Waiting], head: str, now: float, wall: float) -> None:
        if self._owed is None:
            ranks = [(self.rank(w, now, wall, name == head), name) for name, w in waiting.items()]
            first = min(ranks, default=None)
            self._owed = first[1] if first is not None and first[0][0] == GUARANTEED else ""
        if self._turn in waiting or now - self._turn_given < self._policy.turn_every:
            return
        if self._owed in waiting and self.guarantee(waiting[self._owed], wall) is not None:
            return
        late = [(w.since, w.number, name) for name, w in waiting.items() if self.overdue(w, now)]
        self._turn = min(late)[2] if late else ""
