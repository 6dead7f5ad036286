"""An important tenant beside a steady background one, under every way of sharing a device.

    python benchmarks/sharing.py [--seconds 40] [--seed 1]

Played on the simulated device (`nbos_cluster.simdevice`) with the daemon's own lending (`gpu_daemon/lending.py`). No
clock is read: the table is the same everywhere. 'p99' is from a cell's arrival to its end, 'own p99' without the time
in which earlier cells of the same tenant ran. 'use' is the part of the device's TPC-seconds that kernels held, 'work'
the part that they spent on their m (in m/t + b): a kernel's b is time in which TPCs are held and do nothing. The bars
are judged on the last row but one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.simtable import Table, bar  # noqa: E402
from benchmarks.tenants import BACKGROUND, IMPORTANT, QUOTA, STEP, Background, Important, arrivals  # noqa: E402
from gpu_daemon.lending import BOUND, Ask, End, Gave, Hold, Instruction, Lending, Owner, Pause, Recall, Tick  # noqa: E402
from nbos_cluster.simdevice import Device, EqualShares, Sharing, Slices, TimeSlices  # noqa: E402
from nbos_cluster.simdevice.parameters import HOPPER_TPCS  # noqa: E402

TAIL, USE = 1.05, 0.95
EVERY = frozenset(range(HOPPER_TPCS))
QUOTAS = {IMPORTANT: frozenset(range(QUOTA)), BACKGROUND: frozenset(range(QUOTA, HOPPER_TPCS))}


@dataclass(frozen=True)
class Result:
    p50: float
    p99: float
    own: float
    use: float
    work: float
    trained: float
    """Training steps a second of the background tenant."""


class Play:
    """Both tenants on one device. `lending` decides about their slices where there is one."""

    def __init__(self, sharing: Sharing, lending: Lending | None = None, by_step: bool = False) -> None:
        self.device = Device(HOPPER_TPCS, sharing=sharing)
        self.important, self.background = Important(), Background()
        self.lending, self.by_step = lending, by_step
        self._leaving: frozenset[int] = frozenset()
        """TPCs that the background is to give back."""
        self._last_on_them: int | None = None
        """Number of the background's last kernel that was launched while it had them; None: it launches there yet."""
        self._has: frozenset[int] = frozenset()
        self._cells = 0

    def run(
        self, arrive: Iterable[float], seconds: float, background: bool, slices: dict[str, frozenset[int]]
    ) -> Result:
        for tenant in (IMPORTANT, BACKGROUND):
            self.device.open(tenant, slices.get(tenant, EVERY))
        if background and self.lending is not None:
            self._obey(self.lending.handle(Ask(BACKGROUND, BACKGROUND, HOPPER_TPCS, 0.0)))
        if background:
            self.background.launch(self.device)
        else:
            self.background.paused = True
        for at in [*arrive, seconds]:
            self._until(at)
            if at < seconds:
                self.important.arrive(self.device, at)
                self._next_cell()
        return self._result(seconds)

    # -- time ---------------------------------------------------------------------------------------------------------

    def _until(self, to: float) -> None:
        while True:
            tick = self.lending.next_at() if self.lending is not None else math.inf
            at = min(self.device.next_at(), tick, to)
            for outcome in self.device.advance(at):
                if outcome.client == IMPORTANT:
                    self._important_did(outcome.at)
                else:
                    self._background_did(outcome.tag)
            if tick <= at and self.lending is not None:
                self._obey(self.lending.handle(Tick(at)))
            if at >= to:
                return

    def _important_did(self, at: float) -> None:
        if self.important.done(at):
            if self.lending is not None and not self.important.waiting:
                self._obey(self.lending.handle(End(f"cell {self._cells}", at)))
            self._next_cell()

    def _next_cell(self) -> None:
        """The important tenant's next cell begins, when none runs; its TPCs come as they are given back."""
        if self.important.began is not None or not self.important.waiting:
            return
        idle = self.lending is not None and not any(cell != BACKGROUND for cell in self.lending.held)
        if self.lending is not None and idle:
            self._cells += 1
            self.device.confine(IMPORTANT, QUOTAS[IMPORTANT])
            self._obey(self.lending.handle(Ask(f"cell {self._cells}", IMPORTANT, QUOTA, self.device.now)))
        self.important.next_cell(self.device)

    def _background_did(self, number: object) -> None:
        self.background.done += 1
        if self._leaving and self._last_on_them is None and (not self.by_step or self.background.at_step):
            self._leave()
        if self._leaving and number == self._last_on_them:
            self._give()
        self.background.launch(self.device)

    # -- lending ------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """From its next launch on the background is off the TPCs that it owes."""
        self.device.confine(BACKGROUND, self._has - self._leaving)
        self._last_on_them = self.background.launched - 1

    def _give(self) -> None:
        assert self.lending is not None
        gone, self._leaving, self._last_on_them = self._leaving, frozenset(), None
        self._has -= gone
        self._obey(self.lending.handle(Gave(BACKGROUND, gone, self.device.now)))

    def _obey(self, instructions: list[Instruction]) -> None:
        for step in instructions:
            if step.cell != BACKGROUND:
                continue  # The important tenant's kernels wait on their slice; the device gives TPCs as they come free.
            if isinstance(step, Hold):
                self._has = step.tpcs | self._leaving
                self.device.confine(BACKGROUND, step.tpcs)
            elif isinstance(step, Recall):
                self._leaving |= step.tpcs
                if not self.by_step:
                    self._leave()
            elif isinstance(step, Pause):
                self.background.paused = True
                if self._last_on_them is None:
                    self._leave()
            else:
                self.background.paused = False
                self.background.launch(self.device)

    def _result(self, seconds: float) -> Result:
        latencies = sorted(self.important.latencies)
        used = [self.device.use(tenant) for tenant in (IMPORTANT, BACKGROUND)]
        capacity = HOPPER_TPCS * seconds
        return Result(
            p50=_percentile(latencies, 0.50),
            p99=_percentile(latencies, 0.99),
            own=_percentile(sorted(self.important.own), 0.99),
            use=sum(busy for busy, _ in used) / capacity,
            work=sum(work for _, work in used) / capacity,
            trained=self.background.done / STEP / seconds,
        )


def _percentile(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1)]


def _lending(bound: float, strict: bool = False) -> Lending:
    owners = (Owner(IMPORTANT, QUOTAS[IMPORTANT], priority=1), Owner(BACKGROUND, QUOTAS[BACKGROUND], priority=0))
    return Lending(HOPPER_TPCS, owners, bound, strict)


Make = Callable[[], tuple[Play, bool, dict[str, frozenset[int]]]]
WAYS: dict[str, Make] = {
    "important alone": lambda: (Play(Slices()), False, {}),
    "time slicing": lambda: (Play(TimeSlices()), True, {}),
    "equal sharing": lambda: (Play(EqualShares()), True, {}),
    "quotas": lambda: (Play(Slices()), True, QUOTAS),
    "quotas, lent but never downward": lambda: (Play(Slices(), _lending(BOUND, strict=True)), True, QUOTAS),
    "quotas + stealing, back at a step's end": lambda: (Play(Slices(), _lending(math.inf), True), True, QUOTAS),
    "quotas + stealing, step's end or paused": lambda: (Play(Slices(), _lending(BOUND), True), True, QUOTAS),
    "quotas + stealing, back at a kernel's end": lambda: (Play(Slices(), _lending(BOUND)), True, QUOTAS),
}
OURS = "quotas + stealing, step's end or paused"


def measure(seconds: float, seed: int) -> dict[str, Result]:
    times, out = arrivals(seconds, seed), {}
    for name, make in WAYS.items():
        play, background, slices = make()
        out[name] = play.run(times, seconds, background, slices)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of simulated time (40)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    results = measure(options.seconds, options.seed)
    alone, equal, ours = results["important alone"], results["equal sharing"], results[OURS]
    table = Table(
        f"{options.seconds:g} s on {HOPPER_TPCS} TPCs, {QUOTA} of them the important tenant's quota, "
        f"seed {options.seed}",
        ("way", "p50 ms", "p99 ms", "by alone", "own p99", "by alone", "use", "work", "steps/s"),
    )
    for name, r in results.items():
        tails = (
            f"{r.p99 * 1000:.1f}",
            f"{r.p99 / alone.p99:.2f} ×",
            f"{r.own * 1000:.1f}",
            f"{r.own / alone.own:.2f} ×",
        )
        table.add(name, f"{r.p50 * 1000:.1f}", *tails, f"{r.use:.1%}", f"{r.work:.1%}", f"{r.trained:.1f}")
    print(table.render(), "\n")
    tail, own = ours.p99 / alone.p99, ours.own / alone.own
    use, work = ours.use / equal.use, ours.work / equal.work
    print(f"bars, of '{OURS}':")
    print(bar("important p99 by alone", f"{tail:.3f} ×", f"≤ {TAIL} ×", tail <= TAIL))
    print(bar("important p99 of a cell's own time", f"{own:.3f} ×", f"≤ {TAIL} ×", own <= TAIL))
    print(bar("use of the device by equal sharing's", f"{use:.1%}", f"≥ {USE:.0%}", use >= USE))
    print(bar("work by equal sharing's", f"{work:.1%}", f"≥ {USE:.0%}", work >= USE))


if __name__ == "__main__":
    main()
