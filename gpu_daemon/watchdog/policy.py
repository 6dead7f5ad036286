"""What is done about a process that uses a device without a grant, or more memory than it was granted. Pure.

An offence goes through stages: seen, warned, interrupted, restarted. Guarantees:
- nothing is said before it has lasted `grace` seconds, so that the end of a grant, and NVML's averages, are no offence;
- each stage is reached once an offence, in this order, `patience` seconds apart, and never one beyond the policy's;
- it is over when it was not seen for `grace` seconds; time in which NVML does not tell counts neither for nor against;
- a process that is no replica's is never touched, only named.

What a cell leaves on a device stays there until somebody needs the room: so without a grant a replica may go on having
the memory of its last one, and only what it computes, or takes beyond that, is an offence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from gpu_daemon.fleet import ReplicaId

Limit = Literal["ignore", "warn", "interrupt", "restart"]
Kind = Literal["without_grant", "over_budget"]
STAGES: tuple[Limit, ...] = ("ignore", "warn", "interrupt", "restart")
GIB = 1 << 30


@dataclass(frozen=True)
class Policy:
    """without_grant, over_budget: how far it goes. slack: bytes that every process may have beyond its budget: CUDA's
    context (about 0.5 GB) and what libraries keep. busy: percent of the SMs' time that counts as computing."""

    without_grant: Limit = "restart"
    over_budget: Limit = "restart"
    grace: float = 10.0
    patience: float = 30.0
    slack: int = GIB
    busy: int = 2

    def limit(self, kind: Kind) -> int:
        return STAGES.index(self.without_grant if kind == "without_grant" else self.over_budget)


@dataclass(frozen=True)
class Sample:
    """One replica's processes on one device, together. memory: bytes, busy: percent of the SMs' time; -1: not told.
    budget: bytes of its grant on that device, None: it holds none there."""

    replica: ReplicaId
    uuid: str
    memory: int
    busy: int
    budget: int | None


@dataclass(frozen=True)
class Act:
    """Warn, interrupt or restart a replica, and tell its user `text`."""

    replica: ReplicaId
    stage: Limit
    text: str


@dataclass
class _Offence:
    since: float
    seen: float
    stage: int = 0
    reached: float = 0.0
    """When `stage` was."""


@dataclass
class Watchdog:
    policy: Policy = field(default_factory=Policy)
    _offences: dict[tuple[ReplicaId, str, Kind], _Offence] = field(default_factory=dict)
    _last_budget: dict[tuple[ReplicaId, str], int] = field(default_factory=dict)
    """Of the last grant on the device, while the replica lives."""
    _looked: float = 0.0

    def decide(self, samples: Iterable[Sample], now: float) -> list[Act]:
        """What is to be done, now that this was seen. Call it with every replica that uses a device, or holds one."""
        acts: list[Act] = []
        blind, self._looked = max(0.0, now - self._looked), now
        for sample in samples:
            place = (sample.replica, sample.uuid)
            if sample.budget is not None:
                self._last_budget[place] = sample.budget
            for kind, what in self._found(sample, self._last_budget.get(place, 0)).items():
                if what is None:
                    self._stand_still(self._offences.get((*place, kind)), blind)
                elif what:
                    acts += self._offended(sample, kind, what, now)
        return acts

    def blind(self, now: float) -> None:
        """Nothing could be seen since the last look."""
        since, self._looked = max(0.0, now - self._looked), now
        for offence in self._offences.values():
            self._stand_still(offence, since)

    def died(self, replica: ReplicaId) -> None:
        """Its process has ended: the next one begins anew."""
        for key in [key for key in self._offences if key[0] == replica]:
            del self._offences[key]
        for place in [place for place in self._last_budget if place[0] == replica]:
            del self._last_budget[place]

    def _found(self, sample: Sample, last: int) -> Mapping[Kind, str | None]:
        """The offences of a sample, in words; '': it is none, None: not told."""
        budget = sample.budget if sample.budget is not None else last
        amounts = f"{sample.memory / GIB:.1f} GiB of GPU {sample.uuid}'s memory, its budget is {budget / GIB:.1f} GiB"
        over = f"uses {amounts}" if sample.memory > budget + self.policy.slack else ""
        computes = f"computes on GPU {sample.uuid} without holding a grant" if sample.busy >= self.policy.busy else ""
        return {
            "without_grant": "" if sample.budget is not None else None if sample.busy < 0 else computes,
            "over_budget": None if sample.memory < 0 else over,
        }

    @staticmethod
    def _stand_still(offence: _Offence | None, seconds: float) -> None:
        if offence is not None:
            offence.since, offence.seen = offence.since + seconds, offence.seen + seconds
            offence.reached += seconds

    def _offended(self, sample: Sample, kind: Kind, what: str, now: float) -> list[Act]:
        policy, key = self.policy, (sample.replica, sample.uuid, kind)
        offence = self._offences.get(key)
        if offence is None or now - offence.seen >= policy.grace:
            offence = self._offences[key] = _Offence(now, now)
        offence.seen = now
        due = offence.since + policy.grace if offence.stage == 0 else offence.reached + policy.patience
        if now < due or offence.stage >= policy.limit(kind):
            return []
        offence.stage, offence.reached = offence.stage + 1, now
        return [Act(sample.replica, STAGES[offence.stage], self._text(kind, what, offence.stage))]

    def _text(self, kind: Kind, what: str, stage: int) -> str:
        done = {1: "", 2: "The cell is interrupted. ", 3: "Its process is restarted, from the state before this cell. "}
        last = stage >= self.policy.limit(kind)
        will = {1: "interrupted", 2: "restarted from its last committed cell"}.get(stage, "")
        threat = "" if last or not will else f"If it goes on, it is {will} in {self.policy.patience:.0f} s. "
        return f"NBOS: this kernel {what}. {done[stage]}{threat}{WAYS_OUT[kind]}"


WAYS_OUT: Mapping[Kind, str] = {
    "without_grant": "Work on a GPU belongs into a cell that asks for one (%%gpu in its first line); end threads and "
    "processes that outlive such a cell.",
    "over_budget": "Ask for more in the cell's first line (%%gpu tpcs=N mem=SIZE, or %%gpu 1 for a whole device), or "
    "free what is not needed (del, torch.cuda.empty_cache()).",
}
