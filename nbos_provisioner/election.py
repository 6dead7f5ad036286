"""Whom to ask to run one execution, when, and what their answers come to. No IO, no clock.

Guarantees: the preferred replica is asked first and alone; the others as soon as it yields, is lost, or has been silent
for SILENCE; nobody is asked twice at a time; every answer leads to a lead, a new number, a refusal, or a next time.
A cell is refused as impossible only when every member has said so that may still say anything: another host than
those that are up may be the one with the GPUs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

SILENCE = 0.15
"""Seconds after which a replica that says nothing no longer keeps the others from being asked."""

LISTEN = 0.08
"""Seconds after which its heartbeat is listened to: whether it is only busy."""

BEAT = 1.0
"""Seconds between two heartbeats."""

ALIVE = 2.0
"""Seconds in which a replica is waited for that is silent, and alive by its heartbeat: a task on its event loop or a
thread in C keeps its interpreter, or its host has too much to do. What it has that cannot be replicated, threads and
tasks among it, would be lost if another one took its cell."""

DEBUGGED = 5.0
"""The same for the replica that a debugger is attached to: breakpoints stand nowhere else."""

SUBSHELLS = 1.0
"""The same for the replica that has subshells: they are its threads, and no other one knows them. Shorter, since
JupyterLab makes one wherever there are widgets, and a host that hangs should not hold up all of those notebooks."""

FIRST_RETRY = 0.05
LAST_RETRY = 1.0
SURE = 0.4
"""Once the pause between questions has grown to this, an answer that all give is believed."""

ABSENCE = 15.0
"""Seconds in which a member of which nobody says that it is starting is waited for: its host may come back, or another
one take its place."""

_SOON = {"behind", "taken", "cancelled"}
_WAIT = {"busy", "unavailable"}


@dataclass(slots=True)
class Ask:
    """A question to one replica. `code` is empty while it has not answered."""

    at: float
    wait: bool
    code: str = ""
    reason: str = ""
    waiting: bool = False
    following: int | None = None
    excused: float = 0.0
    """Until when it is known why it is silent."""

    def open(self) -> bool:
        return not self.code

    def silent(self, now: float, patience: float) -> bool:
        return self.open() and (self.waiting or self.wait or now >= self.due(patience))

    def due(self, patience: float) -> float:
        return max(self.at + patience, self.excused)


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now: ask these replicas (index, wait), or give up; `wake` is when to ask again what to do."""

    asks: tuple[tuple[int, bool], ...] = ()
    impossible: str = ""
    shown: str = ""
    wake: float | None = None


@dataclass(frozen=True, slots=True)
class Absent:
    """A member that is not connected: its name, and its state as the daemons tell it."""

    name: str
    state: str

    def __str__(self) -> str:
        return f"{self.name} is {'being connected' if self.state == 'ready' else self.state or 'away'}"

    def comes(self, waited: float) -> bool:
        return self.state == "starting" or (self.state != "failed" and waited < ABSENCE)


@dataclass(slots=True)
class Election:
    """The election of one (number, attempt)."""

    asks: dict[int, Ask] = field(default_factory=dict)
    opened: bool = False
    listening: int | None = None
    """The replica whose heartbeat matters: asked first and alone, and silent for LISTEN."""
    patience: float = SILENCE
    waiting: bool = False
    retry_at: float | None = None
    backoff: float = FIRST_RETRY
    refused_at: float | None = None
    unknown: set[int] = field(default_factory=set)
    """Replicas that were lost before they answered: they may have claimed the execution."""

    def answer(self, replica: int, code: str, reason: str, following: int | None = None) -> None:
        ask = self.asks.get(replica)
        if ask is not None:
            ask.code, ask.reason, ask.following = code, reason, following
            self.opened = True

    def excuse(self, replica: int, until: float) -> None:
        """It is known why this one has not answered yet, and need not have before `until`."""
        ask = self.asks.get(replica)
        if ask is not None:
            ask.excused = max(ask.excused, until)

    def alive(self, replica: int, now: float) -> None:
        """It has answered a heartbeat."""
        ask = self.asks.get(replica)
        if ask is not None:
            self.excuse(replica, min(now + BEAT, ask.at + ALIVE))

    def waits(self, replica: int, reason: str) -> None:
        ask = self.asks.get(replica)
        if ask is not None:
            ask.waiting, ask.reason = True, reason

    def lost(self, replica: int) -> None:
        ask = self.asks.pop(replica, None)
        if ask is not None:
            self.opened = True
            if ask.open():
                self.unknown.add(replica)

    def too_high(self, n: int) -> int | None:
        """The number to use when everybody has kept saying that n comes too early, and none before it is decided.

        That is what is left when a number was taken by a replica that was lost before it did anything with it.
        """
        follow = [ask.following for ask in self.asks.values() if ask.code == "behind"]
        if len(follow) < len(self.asks) or not follow or self.backoff < SURE:
            return None
        highest = max((number for number in follow if number is not None), default=n)
        return highest if highest < n else None

    def passed(self, n: int) -> int | None:
        """The number to use when n was decided by somebody else's execution; None while it may have been this one.

        A replica that was asked and has not answered may be the one that decided it: its lead is on its way, or it
        ran the execution to its end and then its host was cut off, which nobody has noticed yet. It will lead, yield,
        or be found lost.
        """
        if self.open_asks() or self.unknown:
            return None
        follow = [ask.following for ask in self.asks.values() if ask.code == "stale" and ask.following is not None]
        highest = max(follow, default=n)
        return highest if highest > n else None

    def open_asks(self) -> list[int]:
        return [index for index, ask in self.asks.items() if ask.open()]

    def step(
        self, up: Collection[int], preferred: int | None, now: float, absent: Mapping[int, Absent] | None = None
    ) -> Step:
        """`absent`: the members that are not `up`."""
        if not up:
            return Step()
        if not self.asks and not self.opened:
            first = preferred if preferred in up else min(up)
            assert first is not None
            return self._ask([first], now)
        self._listen(now)
        if any(ask.silent(now, self.patience) for ask in self.asks.values()):
            self.opened = True
        fresh = [index for index in sorted(up) if index not in self.asks] if self.opened else []
        if fresh:
            return self._ask(fresh, now)
        open_asks = [ask for ask in self.asks.values() if ask.open() and not ask.silent(now, self.patience)]
        if not open_asks:
            self.listening = None
            return self._all_answered(now, absent or {})
        due = [ask.due(self.patience) for ask in open_asks]
        if not self.opened and self.listening is None:
            due += [ask.at + LISTEN for ask in open_asks]
        return Step(wake=min(due))

    def _listen(self, now: float) -> None:
        """The one that is asked alone has been silent for a while: is it only busy?"""
        if self.opened or self.listening is not None:
            return
        for index, ask in self.asks.items():
            if ask.open() and not ask.waiting and now >= ask.at + LISTEN:
                self.listening = index
                self.excuse(index, now + SILENCE - LISTEN)  # this process itself may come late

    def _ask(self, replicas: list[int], now: float) -> Step:
        for index in replicas:
            self.asks[index] = Ask(now, self.waiting)
        asks = tuple((index, self.waiting) for index in replicas)
        return Step(asks, wake=None if self.waiting else now + min(self.patience, LISTEN))

    def _all_answered(self, now: float, absent: Mapping[int, Absent]) -> Step:
        closed = {index: ask for index, ask in self.asks.items() if not ask.open()}
        if not closed:
            return Step()
        if len(closed) == len(self.asks) and all(ask.code == "impossible" for ask in closed.values()):
            return self._refused(now, absent)
        queue = [index for index, ask in closed.items() if ask.code in _WAIT and not ask.wait]
        if queue:
            self.waiting = True
            shown = closed[queue[0]].reason
            return Step(self._ask(queue, now).asks, shown=shown, wake=self._retry(closed, queue, now))
        again = [index for index, ask in closed.items() if ask.code != "impossible"]
        if not again:
            return Step()
        wake = self._retry(closed, [], now)
        if wake is not None and now >= wake:
            self.retry_at = None
            self.backoff = min(self.backoff * 2, LAST_RETRY)
            return self._ask(again, now)
        slow = next((closed[i].reason for i in again if closed[i].code not in _SOON), "")
        return Step(wake=wake, shown=slow)

    def _refused(self, now: float, absent: Mapping[int, Absent]) -> Step:
        """Nobody who is up can ever run it."""
        since = self.refused_at = now if self.refused_at is None else self.refused_at
        away = [absent[index] for index in sorted(absent)]
        reasons = sorted({ask.reason for ask in self.asks.values()})
        coming = [str(member) for member in away if member.comes(now - since)]
        if coming:
            return Step(shown="; ".join([*coming, *reasons]), wake=max(since + ABSENCE, now + LAST_RETRY))
        return Step(impossible="; ".join([*reasons, *map(str, away)]))

    def _retry(self, closed: dict[int, Ask], asked: list[int], now: float) -> float | None:
        """When those that yielded for a passing reason are asked again."""
        left = [ask for index, ask in closed.items() if index not in asked and ask.code != "impossible"]
        if not left:
            return None
        if self.retry_at is None:
            quick = any(ask.code in _SOON for ask in left)
            self.retry_at = now + (self.backoff if quick else LAST_RETRY)
        return self.retry_at
