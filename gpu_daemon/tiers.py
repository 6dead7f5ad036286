"""Giving device memory back: which processes are asked for which tier, when somebody needs the room. No IO, no clock.

What a cell leaves on a device stays there (warm) until somebody lacks that room. Then those who have it are asked for
the next tier: `offload` (tensors to host memory, by the process itself), `checkpoint` (everything, by the driver),
`restart` (the process ends, and starts again from the log). Guarantees:
- a process whose cell runs is never asked, nor is anybody as long as nobody waits for that memory;
- only as many are asked as it takes, the owner's own notebooks first, then whoever has been idle for longest;
- an answer is waited for no longer than `within`; who does not give back is not asked again before its next cell, or
  `again` seconds, so that others are;
- what the ledger counts as a process's changes only by what is told or measured, never by what was asked.

Events come in, `Ask`s go out. `Told` and `Gave` change the ledger: the queue is to be looked at after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from gpu_daemon.book import Holder
from gpu_daemon.ledger import Ledger, Request, Shortage

Tier = Literal["warm", "offload", "checkpoint", "restart"]
TIERS: tuple[Tier, ...] = ("warm", "offload", "checkpoint", "restart")
GIB = 1 << 30


@dataclass(frozen=True)
class Policy:
    """at_most: the last tier that is asked for. within: seconds until an answer counts as none. again: seconds after
    which a process that did not give back is asked anew."""

    at_most: Tier = "checkpoint"
    within: float = 60.0
    again: float = 300.0


@dataclass(frozen=True)
class Told:
    """A cell with a GPU is over (its grant is still open), or the process said hello. left: bytes that it has by
    device, as it tells; peak: bytes that it knows to have had there at most, so that the rest of what was measured is
    another library's."""

    holder: Holder
    owner: str
    now: float
    left: Mapping[str, int]
    peak: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What NVML says the replica's processes have, by device, beyond what every process may have (its context)."""

    holder: Holder
    memory: Mapping[str, int]


@dataclass(frozen=True)
class Gave:
    """The answer to an `Ask`. left: as of `Told`; None: as before. stays: why something is left, '' if nothing is.
    away: bytes that come back with the next cell, of a checkpoint."""

    holder: Holder
    tier: Tier
    now: float
    left: Mapping[str, int] | None = None
    stays: str = ""
    away: int = 0


@dataclass(frozen=True)
class Froze:
    """An earlier daemon checkpointed it: so many bytes come back before its next cell. certain: the driver was asked,
    and it has nothing on a device; else what it told before counts, too."""

    holder: Holder
    away: int
    certain: bool = False


@dataclass(frozen=True)
class Woke:
    """What a checkpoint held is on this device again, within room that the ledger has reserved."""

    holder: Holder
    uuid: str


@dataclass(frozen=True)
class Died:
    """Its process has ended, and has nothing any more."""

    holder: Holder


Event = Told | Measured | Gave | Froze | Woke | Died


@dataclass(frozen=True)
class Ask:
    """Have the replica give back what it has, by this tier. why: for its user."""

    holder: Holder
    tier: Tier
    why: str


@dataclass
class _Process:
    """What is known of one replica's process. told, other: bytes by device, as it tells, and measured beyond that.
    done: the tier that it has gone through since its last cell."""

    owner: str = ""
    used: float = 0.0
    told: dict[str, int] = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    """Measured while its cell ran."""
    done: Tier = "warm"
    asked: Tier | None = None
    until: float = 0.0
    stays: str = ""
    away: int = 0

    @property
    def left(self) -> dict[str, int]:
        return {uuid: size for uuid in {*self.told, *self.other} if (size := self._of(uuid)) > 0}

    def _of(self, uuid: str) -> int:
        return self.told.get(uuid, 0) + self.other.get(uuid, 0)


class GivingBack:
    """One host's. The ledger's `left` and `stuck` are written here only. cell_runs: whether a cell without a GPU runs
    in a replica; those with one are in the ledger."""

    def __init__(
        self, ledger: Ledger, policy: Policy | None = None, cell_runs: Callable[[Holder], bool] = lambda _: False
    ) -> None:
        self._ledger, self.policy, self._cell_runs = ledger, policy or Policy(), cell_runs
        self._processes: dict[Holder, _Process] = {}
        self.checkpoints = "no driver that can was found"
        """Why processes cannot be checkpointed here, '' where they can."""

    # -- what happens -------------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        match event:
            case Told():
                self._told(event)
            case Measured(holder, memory):
                self._measured(self._of(holder), holder, memory)
            case Gave():
                self._gave(event)
            case Froze(holder, away, certain):
                process = self._of(holder)
                process.away, process.done = away, "checkpoint"
                if certain:
                    process.told, process.other = {}, {}
                self._write(holder)
            case Woke(holder, uuid):
                process = self._of(holder)
                process.told, process.away, process.done = {uuid: process.away}, 0, "warm"
                self._write(holder)
            case Died(holder):
                self._processes.pop(holder, None)
                self._ledger.set_left(holder, {})

    def _told(self, event: Told) -> None:
        process = self._of(event.holder)
        process.owner = event.owner
        if process.away or process.asked == "checkpoint":
            return  # it says what it had before: CUDA stands still in it
        process.used, process.told = event.now, dict(event.left)
        process.other = {
            uuid: most for uuid, size in process.seen.items() if (most := size - event.peak.get(uuid, 0)) > 0
        }
        process.done, process.asked, process.stays = "warm", None, ""
        process.seen.clear()
        self._write(event.holder)

    def _measured(self, process: _Process, holder: Holder, memory: Mapping[str, int]) -> None:
        if self._busy(holder):
            process.seen.update(memory)
        elif process.asked is None and not process.away:
            process.other = {
                uuid: beyond for uuid, size in memory.items() if (beyond := size - process.told.get(uuid, 0)) > 0
            }
            self._write(holder)

    def _gave(self, event: Gave) -> None:
        process = self._of(event.holder)
        current = process.asked == event.tier
        if current:
            process.asked = None
        busy = self._busy(event.holder)
        if event.left is not None and not busy:
            process.told = dict(event.left)
            if event.tier == "checkpoint" and not event.stays:
                process.other, process.away = {}, event.away
            self._write(event.holder)
        if current and not busy:
            self._went_through(event.holder, process, event.tier, event.stays, event.now)

    def _went_through(self, holder: Holder, process: _Process, tier: Tier, stays: str, now: float) -> None:
        process.asked, process.done, process.stays = None, tier, stays
        process.until = now + self.policy.again
        self._note_stuck(holder, process)

    def _write(self, holder: Holder) -> None:
        process = self._of(holder)
        self._ledger.set_left(holder, process.left)
        self._note_stuck(holder, process)

    def _note_stuck(self, holder: Holder, process: _Process) -> None:
        if process.left and process.asked is None and self._next(process) is None:
            self._ledger.stuck.add(holder)
        else:
            self._ledger.stuck.discard(holder)

    def _busy(self, holder: Holder) -> bool:
        return self._ledger.holds_any(holder) or self._cell_runs(holder)

    def _of(self, holder: Holder) -> _Process:
        return self._processes.setdefault(holder, _Process())

    # -- what is asked ------------------------------------------------------------------------------------------------

    def decide(self, lacking: tuple[Request, Shortage] | None, now: float) -> list[Ask]:
        """Who is asked, now that this is what the first who could go in lacks. Call it whenever the queue was looked
        at, and every few seconds while somebody waits."""
        self._time_passes(now)
        if lacking is None:
            return []
        request, shortage = lacking
        found = (self._plan(request, uuid, size) for uuid, size in shortage.missing.items())
        plans = sorted((plan for plan in found if plan is not None), key=lambda plan: plan.cost)
        if len(plans) < shortage.count:
            return []
        asks = dict.fromkeys(holder for plan in plans[: shortage.count] for holder in plan.asked)
        return [ask for holder in asks if (ask := self._ask(holder, request, now)) is not None]

    def _time_passes(self, now: float) -> None:
        for holder, process in self._processes.items():
            if now < process.until:
                continue
            if process.asked == "offload":
                stays = f"it did not answer within {self.policy.within:.0f} s"
                self._went_through(holder, process, "offload", stays, now)
            elif process.asked is None and process.done != "warm":
                process.done, process.stays = "warm", ""
                self._note_stuck(holder, process)

    def _plan(self, request: Request, uuid: str, missing: int) -> _Plan | None:
        """Who would be asked for so many bytes of a device; None where they are not to be had."""
        able, coming = [], 0
        for holder, process in self._processes.items():
            size = process.left.get(uuid, 0)
            if not size or process.away or holder == request.holder or self._busy(holder):
                continue
            if process.asked is not None:
                coming += size
            elif self._next(process) is not None:
                able.append((process.owner != request.owner, process.used, -size, holder))
        able.sort()
        chosen: list[tuple[bool, int, Holder]] = []
        for foreign, _, negative, holder in able:
            if coming + _bytes(chosen) >= missing:
                break
            chosen.append((foreign, -negative, holder))
        total = coming + _bytes(chosen)
        if total < missing:
            return None
        for one in chosen[::-1]:  # whoever comes last in the order is spared first
            if total - one[1] >= missing:
                total -= one[1]
                chosen.remove(one)
        theirs = _bytes([one for one in chosen if one[0]])
        return _Plan((theirs, _bytes(chosen)), tuple(holder for *_, holder in chosen))

    def _next(self, process: _Process) -> Tier | None:
        """The tier that comes next for this process; None: there is none here."""
        for tier in TIERS[TIERS.index(process.done) + 1 : TIERS.index(self.policy.at_most) + 1]:
            if tier != "checkpoint" or not self.checkpoints:
                return tier
        return None

    def _ask(self, holder: Holder, request: Request, now: float) -> Ask | None:
        process = self._of(holder)
        tier = self._next(process)
        if tier is None or process.asked is not None:
            return None
        process.asked, process.until = tier, now + self.policy.within
        size = sum(process.left.values()) / GIB
        return Ask(holder, tier, f"another cell waits for the {size:.1f} GiB that this one left on the GPU")

    # -- what is known ------------------------------------------------------------------------------------------------

    def busy_with(self, holder: Holder) -> Tier | None:
        """The tier that was asked of a replica and is not answered yet."""
        process = self._processes.get(holder)
        return process.asked if process is not None else None

    def away(self, holder: Holder) -> int:
        """Bytes that a checkpoint holds, which come back before its next cell."""
        process = self._processes.get(holder)
        return process.away if process is not None else 0

    def rows(self) -> Iterator[Row]:
        """For people: what lies where."""
        for holder, process in self._processes.items():
            left = process.left
            if left or process.away:
                state: Tier = "checkpoint" if process.away else process.done
                yield Row(holder, process.owner, state, left, process.away, process.asked, process.stays)


@dataclass(frozen=True)
class _Plan:
    """cost: bytes of other owners that would go, then all bytes."""

    cost: tuple[int, int]
    asked: tuple[Holder, ...]


@dataclass(frozen=True)
class Row:
    """What one process has. tier: the last that it went through since its cell; stays: why something is left."""

    holder: Holder
    owner: str
    tier: Tier
    left: Mapping[str, int]
    away: int
    asked: Tier | None
    stays: str


def _bytes(chosen: list[tuple[bool, int, Holder]]) -> int:
    return sum(size for _, size, _ in chosen)
