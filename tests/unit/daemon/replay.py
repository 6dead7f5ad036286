"""Cells in virtual time through the very ledger and queue of the daemon; every step is checked.

`Replay.run` raises when promise 3 is broken, when a cell is left waiting, or when the accounts are not what was held.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from gpu_daemon.accounts import Accounts
from gpu_daemon.ledger import Ledger, Request
from gpu_daemon.order import Policy
from gpu_daemon.queue import Admit, Arrive, Ended, FairQueue, Instruction
from gpu_daemon.simulated import simulated
from nbos_cluster.records import Resources

MINUTE = 60.0
QUANTILES = ((0.0, 1.0), (0.5, 5.0), (0.75, 11.0), (0.9, 32.0), (0.95, 95.0), (0.99, 1021.0), (1.0, 3000.0))
"""Minutes: durations of the training cells of production notebooks in a month (the source: benchmarks/trace.py)."""
GPUS = (49, 20, 31)
"""Per cent of its cells that ask for 1, 4 and 8 GPUs."""


@dataclass(frozen=True)
class Cell:
    """submitted, seconds: of the trace's own clock."""

    session: str
    submitted: float
    gpus: int
    seconds: float


def made_up(sessions: int, cells: int, seed: int = 1) -> Iterator[Cell]:
    """Sessions whose cells have the trace's durations and numbers of GPUs."""
    chance = random.Random(seed)
    for session in range(sessions):
        at, gpus = chance.uniform(0, 30 * 24 * 60), chance.choices((1, 4, 8), GPUS)[0]
        for _ in range(cells):
            minutes = quantile(chance.random())
            yield Cell(f"s{session}", at * MINUTE, gpus, minutes * MINUTE)
            at += minutes + chance.expovariate(1 / 20)


def quantile(share: float) -> float:
    for (low, least), (high, most) in pairwise(QUANTILES):
        if share <= high:
            return least + (most - least) * (share - low) / (high - low)
    return QUANTILES[-1][1]


@dataclass
class Outcome:
    """waits, seconds: by cell. held: device-seconds that were granted. accounted: those that the accounts say."""

    waits: list[float]
    decisions: list[float]
    held: float
    accounted: float
    cells: int
    refused: int
    span: float


class Replay:
    """check_every: steps between two checks of the whole state."""

    def __init__(self, devices: int, policy: Policy | None = None, check_every: int = 50) -> None:
        self._devices = simulated("trace", devices, "H200", 66, 141 << 30)
        self._queue = FairQueue(Ledger("trace", self._devices), policy or Policy())
        self._accounts = Accounts(self._devices)
        self._check_every = check_every
        self._cells: dict[str, Cell] = {}
        self._arrived: dict[str, float] = {}
        self._next: dict[str, list[Cell]] = {}
        self._since: dict[str, float] = {}
        self._events: list[tuple[float, int, str, str]] = []
        self._steps = self._submitted = 0
        self.out = Outcome([], [], 0.0, 0.0, 0, 0, 0.0)

    def run(self, cells: Iterator[Cell]) -> Outcome:
        for cell in cells:
            self._next.setdefault(cell.session, []).append(cell)
        for session, found in self._next.items():
            found.reverse()
            self._plan(found[-1].submitted, "submit", session)
        now = 0.0
        while self._events:
            now, _, what, name = heapq.heappop(self._events)
            if what == "submit":
                self._submit(name, now)
            else:
                self._end(name, now)
            if self._steps % self._check_every == 0:
                self._queue.validate_state()
        self._queue.validate_state()
        if len(self._queue) or self._queue.ledger.grants:
            raise AssertionError(f"{len(self._queue)} cells still wait, {len(self._queue.ledger.grants)} still run")
        if abs(self.out.held - self.out.accounted) > 1.0:
            raise AssertionError(f"{self.out.held} device-seconds were held, {self.out.accounted} are accounted")
        self.out.span = now
        return self.out

    def _plan(self, at: float, what: str, name: str) -> None:
        self._steps += 1
        heapq.heappush(self._events, (at, self._steps, what, name))

    def _do(self, event: Arrive | Ended) -> list[Instruction]:
        began = time.thread_time_ns()
        out = self._queue.handle(event)
        self.out.decisions.append((time.thread_time_ns() - began) / 1e3)
        return out

    def _submit(self, session: str, now: float) -> None:
        cell = self._next[session].pop()
        self._submitted += 1
        name = f"g{self._submitted}"
        self._cells[name], self._arrived[name] = cell, now
        request = Request(name, cell.session, f"k-{cell.session}", 0, 1, Resources(gpus=cell.gpus))
        self._carry_out(self._do(Arrive(request, now)), now)

    def _end(self, name: str, now: float) -> None:
        record = self._queue.ledger.grants[name]
        self.out.held += (now - self._since.pop(name)) * len(record.shares)
        self.out.accounted += sum(line.device_seconds for line in self._accounts.end(name, now))
        cell = self._cells.pop(name)
        if self._next[cell.session]:
            self._plan(max(now, self._next[cell.session][-1].submitted), "submit", cell.session)
        self._carry_out(self._do(Ended(name, now)), now)

    def _carry_out(self, instructions: list[Instruction], now: float) -> None:
        for step in instructions:
            if isinstance(step, Admit):
                name = step.grant.grant
                self.out.cells += 1
                self.out.waits.append(now - self._arrived.pop(name))
                self._begun(name, now)
            else:
                self.out.refused += 1

    def _begun(self, name: str, now: float) -> None:
        record = self._queue.ledger.grants[name]
        self._accounts.begin(record, now)
        self._since[name] = now
        self._plan(now + self._cells[name].seconds, "end", name)
