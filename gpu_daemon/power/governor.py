"""How high a device's clocks must be for what runs on it, without IO: LithOS' formula (SOSP'25, arXiv 2504.15465).

A kind of cell loses `slowdown` at the clock f. Its sensitivity is s = slowdown / (f_max/f - 1): 1 where only computing
counts, 0 where it waits for memory. With S, the sensitivities of what ran lately weighted by their share of the time,
f = f_max / (1 + slip/S) makes the whole slower by no more than `slip`. S is that of the last minutes or of what runs
now, whichever is higher.

Guarantees: a clock that the chip has, never below `least` of the highest; nothing is guessed: while a kind of cell runs
that was not measured at full clock, clocks are full, and one that was never measured below counts as s = 1, the most
that a clock can cost, so that the first step down is one that nothing can lose more by; a switch concerns the whole
device and takes about 50 ms, so one down comes `down_after` seconds after the last at the earliest, one up `up_after`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

Key = Hashable
"""A kind of cell: whose, what its code does, on how many TPCs, and in which unit it is measured."""

FULL_ENOUGH = 2
STALE = 200
"""Executions below full clock after which what was measured at full clock counts no more: inputs change."""
KEPT = 2000
HALF_LIFE = 300.0
"""Seconds in which time that was spent counts half."""
MOST = 1.5
"""Of a measured sensitivity: more than 1 is noise, or another cause."""


@dataclass(frozen=True)
class Policy:
    slip: float = 0.04
    least: float = 0.5
    down_after: float = 60.0
    up_after: float = 5.0
    worth: float = 0.02
    """A step down of less than this part is not made."""


@dataclass(frozen=True)
class Ran:
    """An execution of `key` took `seconds`, all of it below the clock (MHz) that is set now."""

    uuid: str
    key: Key
    seconds: float
    began: float
    now: float


@dataclass(frozen=True)
class Look:
    """What runs on a device now, with the part of it that each has. None: a cell of which nothing is known."""

    uuid: str
    running: Mapping[Key | None, float]
    now: float


@dataclass(frozen=True)
class Failed:
    """The device's clocks cannot be set."""

    uuid: str


@dataclass(frozen=True)
class Cap:
    """Let the device's clocks go no higher than this; the highest of the chip: as high as they like."""

    uuid: str
    mhz: int


Event = Ran | Look | Failed


@dataclass
class _Kind:
    """What is known of one kind of cell."""

    full: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    below: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=16))
    """(f_max/f - 1, seconds)."""
    since: int = 0
    """Executions below full clock since the last at it."""

    @property
    def measured(self) -> bool:
        return len(self.full) >= FULL_ENOUGH and self.since <= STALE

    @property
    def sensitivity(self) -> float:
        if not self.measured or not self.below:
            return 1.0
        base = median(self.full)
        slope = sum(x * (seconds / base - 1) for x, seconds in self.below) / sum(x * x for x, _ in self.below)
        return min(max(slope, 0.0), MOST)


@dataclass
class _Chip:
    clocks: tuple[int, ...]
    mhz: int
    switched: float = float("-inf")
    looked: float | None = None
    spent: dict[Key | None, float] = field(default_factory=dict)
    """Seconds of the device, older ones counting less."""
    lost: bool = False


class Governor:
    """clocks: what each device can be locked to, MHz, ascending."""

    def __init__(self, policy: Policy, clocks: Mapping[str, Sequence[int]]) -> None:
        self._policy = policy
        self._chips = {uuid: _Chip(tuple(all_), all_[-1]) for uuid, all_ in clocks.items() if all_}
        self._kinds: OrderedDict[Key, _Kind] = OrderedDict()

    def cap(self, uuid: str) -> tuple[int, int] | None:
        """What the device is locked to, and its highest clock; None where it is not locked."""
        chip = self._chips.get(uuid)
        return None if chip is None or chip.mhz == chip.clocks[-1] else (chip.mhz, chip.clocks[-1])

    def sensitivity(self, key: Key) -> float:
        return self._kinds[key].sensitivity if key in self._kinds else 1.0

    def handle(self, event: Event) -> list[Cap]:
        chip = self._chips.get(event.uuid)
        if chip is None or chip.lost:
            return []
        match event:
            case Ran():
                return self._ran(chip, event)
            case Look():
                return self._look(chip, event)
            case Failed():
                chip.lost, chip.mhz = True, chip.clocks[-1]
                return []

    def _ran(self, chip: _Chip, event: Ran) -> list[Cap]:
        if event.began <= chip.switched or event.seconds <= 0:
            return []  # the clocks changed on its way
        kind = self._kinds.setdefault(event.key, _Kind())
        self._kinds.move_to_end(event.key)
        if len(self._kinds) > KEPT:
            self._kinds.popitem(last=False)
        if chip.mhz == chip.clocks[-1]:
            if not kind.measured:
                kind.below.clear()  # against what it was then
            kind.full.append(event.seconds)
            kind.since = 0
        else:
            kind.below.append((chip.clocks[-1] / chip.mhz - 1, event.seconds))
            kind.since += 1
            if not kind.measured:
                kind.full.clear()
        return []

    def _look(self, chip: _Chip, event: Look) -> list[Cap]:
        passed = event.now - chip.looked if chip.looked is not None else 0.0
        chip.looked = event.now
        fade = 0.5 ** (passed / HALF_LIFE)
        chip.spent = {key: spent * fade for key, spent in chip.spent.items() if spent * fade > 1e-3}
        for key, part in event.running.items():
            chip.spent[key] = chip.spent.get(key, 0.0) + part * passed
        if not event.running:
            return []  # an idle device's clocks are low by themselves
        target = self._target(chip, event.running)
        waited, policy = event.now - chip.switched, self._policy
        if target > chip.mhz and waited >= policy.up_after:
            return self._switch(chip, event, target)
        if target < chip.mhz * (1 - policy.worth) and waited >= policy.down_after:
            return self._switch(chip, event, target)
        return []

    def _switch(self, chip: _Chip, event: Look, target: int) -> list[Cap]:
        chip.mhz, chip.switched = target, event.now
        return [Cap(event.uuid, target)]

    def _weighted(self, parts: Mapping[Key | None, float]) -> float:
        whole = sum(parts.values())
        found = sum(part * (1.0 if key is None else self.sensitivity(key)) for key, part in parts.items())
        return found / whole if whole > 0 else 0.0

    def _target(self, chip: _Chip, running: Mapping[Key | None, float]) -> int:
        highest = chip.clocks[-1]
        if any(key is not None and not (key in self._kinds and self._kinds[key].measured) for key in running):
            return highest
        # What ran lately, and no less than what runs now wants: what is over has nothing from a high clock.
        weighted = max(self._weighted(chip.spent), self._weighted(running))
        wanted = highest / (1 + self._policy.slip / weighted) if weighted > 0 else 0.0
        floor = max(wanted, self._policy.least * highest)
        return next(clock for clock in chip.clocks if clock >= floor - 1e-6)
