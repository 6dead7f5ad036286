"""Who has how many TPCs when several clients of one device have a kernel to run: the ways a device is shared today.

Pure: `shares` says what each running kernel has from now on, and `changes_at` when that may be different though no
kernel began or ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from .cost import Kernel
from .parameters import CONTEXT_SWITCH, TIME_SLICE


@dataclass
class Running:
    """A client's kernel on the device. allowed: the TPCs its stream was confined to when it was launched."""

    kernel: Kernel
    allowed: frozenset[int]
    held: frozenset[int] = frozenset()
    """TPCs that its blocks occupy, where TPCs are told apart (Slices)."""


class Sharing(Protocol):
    def shares(self, running: Mapping[str, Running], tpcs: int, now: float) -> dict[str, float]:
        """TPCs of each client's running kernel from `now` on. `running` is in order of the kernels' starts."""

    def changes_at(self, now: float) -> float:
        """When, after `now`, `shares` has to be asked again, though nothing begins or ends."""


class Slices:
    """Every kernel keeps to the TPCs its client was confined to at its launch, as in a green context's stream.

    A kernel is not taken off TPCs it has; where slices overlap (one was moved while the other's kernel runs) it gets
    them as the other's kernel ends, and waits while it has none.
    """

    def shares(self, running: Mapping[str, Running], tpcs: int, now: float) -> dict[str, float]:
        taken: set[int] = set().union(*(run.held for run in running.values())) if running else set()
        for run in running.values():
            room = math.ceil(run.kernel.usable(len(run.allowed))) - len(run.held)
            if room > 0 and (new := sorted(run.allowed - taken)[:room]):
                run.held |= frozenset(new)
                taken.update(new)
        return {client: float(len(run.held)) for client, run in running.items()}

    def changes_at(self, now: float) -> float:
        return math.inf


class EqualShares:
    """Whoever has a kernel gets an equal part at once, and what one cannot fill goes to the others: MPS without limits.

    Kinder than MPS is in truth, where a kernel with more blocks gets more.
    """

    def shares(self, running: Mapping[str, Running], tpcs: int, now: float) -> dict[str, float]:
        left, out = float(tpcs), {}
        by_need = sorted(running.items(), key=lambda item: item[1].kernel.usable(tpcs))
        for place, (client, run) in enumerate(by_need):
            out[client] = run.kernel.usable(left / (len(by_need) - place))
            left -= out[client]
        return out

    def changes_at(self, now: float) -> float:
        return math.inf


@dataclass
class TimeSlices:
    """One client at a time has the whole device; the next one's turn comes after `turn` seconds and a switch."""

    turn: float = TIME_SLICE
    switch: float = CONTEXT_SWITCH
    _whose: str = ""
    _from: float = field(default=-math.inf)
    """When the turn begins (the switch before it is over)."""
    _alone: bool = True

    def shares(self, running: Mapping[str, Running], tpcs: int, now: float) -> dict[str, float]:
        names = sorted(running)
        self._alone = len(names) < 2
        over = now >= self._from + self.turn and not self._alone
        if names and (self._whose not in running or over):
            following = [name for name in names if name > self._whose]
            self._from = now + (self.switch if self._whose else 0.0)
            self._whose = (following or names)[0]
        at_work = now >= self._from
        return {name: float(tpcs) if name == self._whose and at_work else 0.0 for name in names}

    def changes_at(self, now: float) -> float:
        if now < self._from:
            return self._from
        return math.inf if self._alone else self._from + self.turn
