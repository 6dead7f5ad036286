"""How few TPCs a cell needs: learnt from its own executions, without IO or clock.

Observations come in (`observe`), `advise` says what to grant. What is kept apart: each `Key`, which is an owner, a
model of device, a fingerprint of what the code does and the TPCs that were asked for. An observation's seconds are of
one step of an optimizer where the cell has steps, else of the cell; when that changes for a key, it is learnt anew.

Policy, per key:
- BASE executions run as asked. Cells shorter than SHORTEST, or whose durations scatter by more than NOISIEST, stay so.
- Then smaller sizes are tried, each for BASE to RECENT executions (as many as the noise asks for, every other one as
  asked): first 3/4 of what was asked, then what the fit (`speed.py`) predicts to cost AIM of the allowed slowdown,
  never less than half of the smallest size that was good. So the model never carries a cell further than one halving
  beyond what was measured. At most TRIES sizes are tried.
- A size is good when the median of its durations is within the allowed slowdown of the median as asked. One that is
  not is never granted again. Only good sizes are granted outside of trials.
- The fit counts only while it describes every size tried within FIT. Where it does not, nothing is guessed: what was
  asked stays, or, where a smaller size was measured to be good, the middle between that and the largest bad one is
  tried. So it is where the fit sees no gain, though the two lie far apart: many kernels fill only some TPCs (a kink).
- At a size that was settled on, every execution is watched: when its median leaves the allowed slowdown, that size is
  bad and the next larger good one is granted. Every RECHECK-th execution runs as asked, so that the comparison stays
  fresh; and when it shows that the cell itself became faster or slower by more than DRIFT, all is learnt anew.

Medians of the latest RECENT durations make single slow runs harmless. Memory is bounded: KEYS keys, the least recently
used are forgotten, SIZES durations lists each.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, sqrt
from statistics import median, median_low
from typing import Any, Literal

from gpu_daemon.speed import Fit, fit

BASE = 3
TRIES = 7
RECENT = 9
SHORTEST = 0.05
"""Seconds; a shorter cell is over before anybody could use what it leaves. For steps the whole cell counts."""
NOISIEST = 0.08
"""Median deviation from the median, relative."""
AIM = 0.75
FIT = 0.05
"""Largest relative error of the fit at any size that was tried."""
DRIFT = 0.15
RECHECK = 32
KEYS = 2000
SIZES = 8
FIRST_TRY = 0.75
WORTH = 0.93
"""Of the smallest good size: what is not smaller than that is not worth some slower executions."""
GAP = 0.8
"""Largest bad size by smallest good one below which the middle is worth a trial."""

Unit = Literal["cell", "step"]


@dataclass(frozen=True)
class Key:
    """owner: whose cell; nobody learns from, or misleads, anybody else. code: fingerprint of what the cell does."""

    owner: str
    model: str
    code: str
    asked: int


@dataclass(frozen=True)
class Advice:
    """Grant `tpcs`. why: one line for the user."""

    tpcs: int
    why: str


@dataclass
class _Size:
    """The durations seen on one number of TPCs; what was decided about it."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    verdict: Literal["", "good", "bad"] = ""

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass
class _Cell:
    unit: Unit = "cell"
    sizes: dict[int, _Size] = field(default_factory=dict)
    tries: int = 0
    trying: int = 0
    """The size on trial, 0: none."""
    since_check: int = 0
    strange: int = 0
    """Executions in a row that took another time than those before on the same size."""
    short: bool = False

    @property
    def noise(self) -> float:
        """How much executions on the same size scatter: the median deviation from their median, relative to it."""
        known = [size for size in self.sizes.values() if len(size.seconds) >= BASE]
        off = [abs(s / size.median - 1) for size in known for s in size.seconds]
        return median(off) if off else 0.0

    def smallest_good(self, asked: int) -> int:
        return min((t for t, size in self.sizes.items() if size.verdict == "good"), default=asked)

    def largest_bad(self) -> int:
        """The largest size known to be too small, 0: none is known."""
        return max((t for t, size in self.sizes.items() if size.verdict == "bad"), default=0)


class Rightsizer:
    """slowdown: what a cell may become slower, 0.04 = 4 %; 0: nothing is made smaller."""

    def __init__(self, slowdown: float = 0.04) -> None:
        self.slowdown = slowdown
        self._cells: OrderedDict[Key, _Cell] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cells)

    # -- questions ----------------------------------------------------------------------------------------------------

    def advise(self, key: Key) -> Advice:
        """What to grant to the next execution. The same until something is observed."""
        asked, cell = key.asked, self._cells.get(key)
        if not self.slowdown or asked < 2 or not key.code:
            return Advice(asked, "as asked")
        if cell is None:
            return Advice(asked, f"as asked: execution 1 of {BASE} to learn its speed")
        base = cell.sizes.get(asked)
        if cell.short:
            return Advice(asked, "as asked: too short to make smaller")
        if base is None or len(base.seconds) < BASE:
            seen = len(base.seconds) if base is not None else 0
            return Advice(asked, f"as asked: execution {seen + 1} of {BASE} to learn its speed")
        if cell.noise > NOISIEST:
            return Advice(asked, f"as asked: its durations differ by {cell.noise:.0%} from run to run")
        if cell.trying:
            on_trial = cell.sizes.get(cell.trying)
            if on_trial is not None and BASE <= len(on_trial.seconds) > len(base.seconds):
                return Advice(asked, "as asked this once: to compare")
            return Advice(cell.trying, f"{cell.trying} of {asked} TPCs on trial: how much slower is it?")
        best = cell.smallest_good(asked)
        if best < asked and cell.since_check >= RECHECK:
            return Advice(asked, "as asked this once: to compare")
        return Advice(best, self._why(cell, asked, best))

    def _why(self, cell: _Cell, asked: int, best: int) -> str:
        found = self._fit(cell)
        if best < asked:
            slower = cell.sizes[best].median / cell.sizes[asked].median - 1
            doubt = " (within its noise)" if slower > self.slowdown else ""
            return f"{best} of {asked} TPCs: measured {max(slower, 0):.1%} slower{doubt}, {self.slowdown:.1%} allowed"
        if found is not None and found.error > FIT:
            return f"as asked: its speed does not follow m/t + b (off by {found.error:.0%})"
        return "as asked: it would be slower with less"

    # -- learning -----------------------------------------------------------------------------------------------------

    def observe(self, key: Key, tpcs: int, seconds: float, unit: Unit = "cell", whole: float | None = None) -> None:
        """One execution on `tpcs` TPCs took `seconds` (of a step or of the cell, as `unit` says).

        whole: seconds of the whole cell, where `unit` is a step.
        """
        if not (self.slowdown and key.code and 1 <= tpcs <= key.asked and 0 < seconds < inf):
            return
        cell = self._cells.get(key)
        if cell is None or cell.unit != unit:
            cell = self._cells[key] = _Cell(unit)
        self._cells.move_to_end(key)
        self._forget(key.owner)
        cell.short = (whole if whole is not None else seconds) < SHORTEST
        if self._strange(cell, tpcs, seconds) and tpcs == key.asked and cell.strange >= 2:
            self._cells[key] = cell = _Cell(unit)
        size = cell.sizes.setdefault(tpcs, _Size())
        size.seconds.append(seconds)
        cell.since_check = 0 if tpcs == key.asked else cell.since_check + 1
        if cell.strange:
            cell.since_check = RECHECK  # look again at once
        self._judge(cell, key.asked, tpcs)
        self._next_try(cell, key.asked)
        self._trim(cell, key.asked)

    def _forget(self, owner: str) -> None:
        """One owner's cells push out others' only while they are few: nobody makes the daemon forget everybody's."""
        if len(self._cells) > KEYS:
            own = [key for key in self._cells if key.owner == owner]
            del self._cells[own[0] if len(own) > KEYS // 4 else next(iter(self._cells))]

    def _strange(self, cell: _Cell, tpcs: int, seconds: float) -> bool:
        """Far from what was seen on this size. Twice in a row as asked: the cell does something else than before."""
        size = cell.sizes.get(tpcs)
        if size is None or len(size.seconds) < BASE:
            return False
        far = abs(seconds / size.median - 1) > max(DRIFT, 4 * cell.noise)
        cell.strange = cell.strange + 1 if far else 0
        return far

    def _judge(self, cell: _Cell, asked: int, tpcs: int) -> None:
        """Is this size good? Two very slow runs decide against a trial, else BASE to RECENT runs decide it, the more
        the less clear; what is settled is watched, and has the benefit of the doubt."""
        base, size = cell.sizes.get(asked), cell.sizes[tpcs]
        if base is None or len(base.seconds) < BASE:
            return
        if tpcs == asked:
            self._acquit(cell, base.median)
            return
        if size.verdict == "bad":
            return
        runs, over = len(size.seconds), size.median / base.median - 1 - self.slowdown
        # Standard error of the ratio of two medians: 1.25 sigma / sqrt(n) each, sigma = 1.48 median deviations.
        unsure = 1.25 * 1.48 * cell.noise * sqrt(1 / runs + 1 / len(base.seconds))
        if size.verdict == "good":
            size.verdict = "bad" if runs >= BASE and over > unsure else "good"
        elif runs >= 2 and min(size.seconds) > (1 + 2 * self.slowdown) * base.median:
            size.verdict = "bad"
        elif runs == RECENT or (runs >= BASE and not -unsure / 2 < over < unsure):
            size.verdict = "good" if over <= 0 else "bad"

    def _acquit(self, cell: _Cell, base: float) -> None:
        """What was found bad by comparison with too few runs as asked may be tried again."""
        for size in cell.sizes.values():
            if size.verdict == "bad" and size.median <= (1 + self.slowdown) * base:
                size.verdict = ""

    def _next_try(self, cell: _Cell, asked: int) -> None:
        """Which size is on trial from now on."""
        on_trial = cell.sizes.get(cell.trying)
        if cell.trying and (on_trial is None or not on_trial.verdict):
            return
        cell.trying = 0
        base = cell.sizes.get(asked)
        if base is None or len(base.seconds) < BASE or cell.noise > NOISIEST or cell.short or cell.tries >= TRIES:
            return
        size = self._proposal(cell, asked)
        if size:
            cell.trying, cell.tries = size, cell.tries + 1

    def _proposal(self, cell: _Cell, asked: int) -> int:
        """A size worth trying, or 0."""
        best, bad = cell.smallest_good(asked), cell.largest_bad()
        found = self._fit(cell)
        if found is None:
            wanted = round(asked * FIRST_TRY)
        else:
            wanted = max(found.smallest(asked, AIM * self.slowdown), (best + 1) // 2, bad + 1)
            gap = wanted > WORTH * best and bad < GAP * best
            if found.error > FIT or gap:
                wanted = (best + bad + 1) // 2 if best < asked else 0
        known = cell.sizes.get(wanted)
        return wanted if 1 <= wanted <= WORTH * best and (known is None or not known.verdict) else 0

    def _fit(self, cell: _Cell) -> Fit | None:
        # The lower of two in the middle: two runs of which one met an outlier must not spoil the fit.
        return fit((t, median_low(size.seconds)) for t, size in cell.sizes.items() if size.seconds)

    def _trim(self, cell: _Cell, asked: int) -> None:
        while len(cell.sizes) > SIZES:
            keep = {asked, cell.trying, cell.smallest_good(asked)}
            del cell.sizes[next(t for t in cell.sizes if t not in keep)]

    # -- across restarts ----------------------------------------------------------------------------------------------

    def dump(self) -> list[dict[str, Any]]:
        """As JSON types, least recently used first."""
        return [
            {
                "key": [key.owner, key.model, key.code, key.asked],
                "unit": cell.unit,
                "tries": cell.tries,
                "trying": cell.trying,
                "since_check": cell.since_check,
                "short": cell.short,
                "sizes": {str(t): [size.verdict, *size.seconds] for t, size in cell.sizes.items()},
            }
            for key, cell in self._cells.items()
        ]

    def load(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """What `dump` gave. Raises ValueError, KeyError or TypeError when it is something else, and takes nothing."""
        cells: OrderedDict[Key, _Cell] = OrderedDict()
        for each in saved:
            owner, model, code, asked = each["key"]
            cell = _Cell("step" if each["unit"] == "step" else "cell", tries=int(each["tries"]))
            cell.since_check, cell.short = int(each["since_check"]), bool(each["short"])
            for tpcs, (verdict, *seconds) in each["sizes"].items():
                cell.sizes[int(tpcs)] = _Size(deque(map(float, seconds), maxlen=RECENT), verdict)
            cell.trying = int(each["trying"]) if int(each["trying"]) <= int(asked) else 0
            cells[Key(str(owner), str(model), str(code), int(asked))] = cell
        self._cells = cells
