"""Which replicas of this host to start, stop and report, without IO: records say what should be, this says what to do.

Guarantees: at most one process per replica; a new incarnation starts only after the old process is gone; a replica that
died is started again, at once after its first death and more slowly (0.2 s doubling to 10 s) while it keeps dying soon
after its start; of a kernel that nobody can use yet, the first replica starts alone, so that it is usable soon; on a
host that comes back nothing starts before what it must no longer run is gone.

Events come in (`Wanted`, `Unwanted`, `Found`, `Hello`, `Died`, `Tick`), instructions go out (`Start`, `Stop`,
`Publish`, `Forget`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

FIRST_BACKOFF = 0.2
LAST_BACKOFF = 10.0
QUICK = 10.0
"""Seconds: a process that lives less than that died quickly."""
GIVE_UP_AFTER = 5
"""Quick deaths in a row after which the replica is called failed. It is tried again nevertheless."""
HEAD_START = 4.0
"""Seconds that the first replica of a fresh kernel has the machine for itself."""
FIRST_CELL = 0.3
"""Seconds more, once it is ready: the first cell was sent long ago, and is now connected to, claimed and run."""

RESTARTED = "the kernel is restarted"
UNWANTED = "the replica is not wanted on this host any more"


@dataclass(frozen=True, order=True)
class ReplicaId:
    kernel: str
    index: int


@dataclass(frozen=True)
class Wanted:
    """The record of a kernel as it is now: the indexes placed on this host. usable: some replica of it is ready. first:
    its lowest index anywhere."""

    kernel: str
    indexes: frozenset[int]
    incarnation: int
    usable: bool
    now: float
    first: int = 0


@dataclass(frozen=True)
class Unwanted:
    """A replica that was found must not run on this host any more."""

    id: ReplicaId


@dataclass(frozen=True)
class Found:
    """A process of before the daemon's restart is alive."""

    id: ReplicaId
    incarnation: int
    now: float


@dataclass(frozen=True)
class Hello:
    """The replica's process reported itself."""

    id: ReplicaId
    now: float


@dataclass(frozen=True)
class Died:
    """The replica's process is gone, or could not be started; reason says how."""

    id: ReplicaId
    reason: str
    now: float


@dataclass(frozen=True)
class Tick:
    now: float


Event = Wanted | Unwanted | Found | Hello | Died | Tick


@dataclass(frozen=True)
class Start:
    id: ReplicaId
    incarnation: int


@dataclass(frozen=True)
class Stop:
    """End the process; `Died` must follow."""

    id: ReplicaId
    reason: str


@dataclass(frozen=True)
class Publish:
    """Write the replica's record."""

    id: ReplicaId
    state: Literal["starting", "ready", "failed"]
    reason: str = ""


@dataclass(frozen=True)
class Forget:
    """The replica is gone for good: delete its record and its files."""

    id: ReplicaId


Instruction = Start | Stop | Publish | Forget


@dataclass
class _Replica:
    id: ReplicaId
    incarnation: int
    """What the record asks for; `running` is what the process was started as."""
    wanted: bool = True
    phase: Literal["waiting", "running", "stopping"] = "waiting"
    running: int = 0
    due: float = 0.0
    started: float = 0.0
    ready: bool = False
    quick_deaths: int = 0
    reason: str = ""
    found: bool = False


class Fleet:
    """The replicas of one host."""

    def __init__(self) -> None:
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._usable: dict[str, bool] = {}
        self._story: deque[Event] = deque(maxlen=50)

    def handle(self, event: Event) -> list[Instruction]:
        self._story.append(event)
        match event:
            case Wanted():
                return self._on_wanted(event)
            case Unwanted():
                return self._on_unwanted(event)
            case Found():
                self._on_found(event)
                return []
            case Hello():
                return self._on_hello(event)
            case Died():
                return self._on_died(event)
            case Tick():
                return self._start_due(event.now)

    def next_due(self) -> float | None:
        """When the next `Tick` is needed; None when nothing waits for the clock."""
        if self._clearing():
            return None
        return min((r.due for r in self._replicas.values() if r.phase == "waiting"), default=None)

    def _clearing(self) -> bool:
        """Whether something of before the daemon's restart is still to go."""
        return any(replica.found and not replica.wanted for replica in self._replicas.values())

    def wants(self, replica: ReplicaId) -> bool:
        return replica in self._replicas and self._replicas[replica].wanted

    def ends(self, replica: ReplicaId) -> str:
        """Why its process should end, as far as it is not known to have; empty when it should not. Whoever has just
        started one asks: a `Stop` that came meanwhile found no process."""
        known = self._replicas.get(replica)
        if known is None or not known.wanted:
            return UNWANTED
        return RESTARTED if known.phase == "stopping" else ""

    def count(self) -> int:
        return len(self._replicas)

    def validate_state(self) -> None:
        for replica in self._replicas.values():
            if replica.ready and replica.phase == "waiting":
                raise AssertionError(f"{replica} is ready without a process; latest events: {list(self._story)}")
            if not replica.wanted and replica.phase != "stopping":
                raise AssertionError(f"{replica} is unwanted and not stopping; latest events: {list(self._story)}")

    # -- events -------------------------------------------------------------------------------------------------------

    def _on_wanted(self, event: Wanted) -> list[Instruction]:
        out: list[Instruction] = []
        self._usable[event.kernel] = event.usable
        for index in sorted(event.indexes):
            out += self._want(ReplicaId(event.kernel, index), event)
        for replica in [r for r in self._replicas.values() if r.id.kernel == event.kernel]:
            if replica.id.index not in event.indexes and replica.wanted:
                out += self._unwant(replica)
        if not event.indexes:
            self._usable.pop(event.kernel, None)
        return out + self._start_due(event.now)

    def _want(self, id: ReplicaId, event: Wanted) -> list[Instruction]:
        replica = self._replicas.get(id)
        if replica is None:
            head_start = 0.0 if id.index == event.first or event.usable else HEAD_START
            self._replicas[id] = _Replica(id, event.incarnation, due=event.now + head_start)
            return [Publish(id, "starting")]
        replica.wanted = True
        if event.usable and replica.phase == "waiting" and not replica.quick_deaths and not replica.reason:
            replica.due = min(replica.due, event.now + FIRST_CELL)
        if replica.incarnation == event.incarnation:
            return []
        replica.incarnation, replica.quick_deaths, replica.due = event.incarnation, 0, event.now
        if replica.phase == "running" and replica.running != event.incarnation:
            replica.phase = "stopping"
            return [Stop(id, RESTARTED)]
        return []

    def _unwant(self, replica: _Replica) -> list[Instruction]:
        replica.wanted = False
        if replica.phase == "waiting":
            del self._replicas[replica.id]
            return [Forget(replica.id)]
        if replica.phase == "running":
            replica.phase = "stopping"
            return [Stop(replica.id, UNWANTED)]
        return []

    def _on_unwanted(self, event: Unwanted) -> list[Instruction]:
        replica = self._replicas.get(event.id)
        return self._unwant(replica) if replica is not None and replica.wanted else []

    def _on_found(self, event: Found) -> None:
        """Found processes are told before the records; the records then say whether they are still wanted."""
        self._replicas[event.id] = _Replica(
            event.id, event.incarnation, phase="running", running=event.incarnation, started=event.now, found=True
        )

    def _on_hello(self, event: Hello) -> list[Instruction]:
        replica = self._replicas.get(event.id)
        if replica is None or replica.phase != "running":
            return []
        replica.ready, replica.reason = True, ""
        return [Publish(event.id, "ready")]

    def _on_died(self, event: Died) -> list[Instruction]:
        replica = self._replicas.get(event.id)
        if replica is None or replica.phase == "waiting":
            return []
        asked_for, lived = replica.phase == "stopping", event.now - replica.started
        replica.phase, replica.ready, replica.running = "waiting", False, 0
        if not replica.wanted:
            del self._replicas[event.id]
            return [Forget(event.id), *self._start_due(event.now)]
        if asked_for:
            replica.due, replica.reason = event.now, ""
            return [Publish(event.id, "starting"), *self._start_due(event.now)]
        replica.quick_deaths = replica.quick_deaths + 1 if lived < QUICK else 1
        replica.due = event.now + min(FIRST_BACKOFF * 2 ** (replica.quick_deaths - 1), LAST_BACKOFF)
        replica.reason = event.reason
        if replica.quick_deaths >= GIVE_UP_AFTER:
            return [Publish(event.id, "failed", f"died {replica.quick_deaths} times in a row: {event.reason}")]
        return [Publish(event.id, "starting", event.reason)]

    def _start_due(self, now: float) -> list[Instruction]:
        out: list[Instruction] = []
        if self._clearing():
            return out
        for replica in self._replicas.values():
            if replica.phase == "waiting" and replica.wanted and replica.due <= now:
                replica.phase, replica.running, replica.started = "running", replica.incarnation, now
                out.append(Start(replica.id, replica.incarnation))
        return out
