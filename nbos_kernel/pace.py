"""How long an execution took, for right-sizing: a step where the cell has steps, else the cell.

Steps are those of torch's optimizers (a hook that torch offers, set only once torch.optim is imported), or what says so
itself (`simgpu.steps`). Times are the host's. An execution lasts until what it launched is over (`binding.unbind` waits
for that).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

LEAST_STEPS = 12
CHUNKS = 8
MOST_STAMPS = 4096

Took = dict[str, Any]


class Pace:
    """One at a time: `begin`, any number of `step`, `end`; `took` then gives what was measured, once."""

    def __init__(self) -> None:
        self._began = self._ended = 0.0
        self._stamps: list[float] = []
        self._stride = 1
        self._steps = 0
        self._hooked = False
        self.boundary: Callable[[], None] | None = None
        """Called at the end of each step."""

    def begin(self) -> None:
        self._hook()
        self._stamps, self._stride, self._steps = [], 1, 0
        self._began, self._ended = time.perf_counter(), 0.0

    def step(self) -> None:
        if self.boundary is not None:
            self.boundary()
        if not self._began or self._ended:
            return
        self._steps += 1
        if self._steps % self._stride == 0:
            self._stamps.append(time.perf_counter())
            if len(self._stamps) >= MOST_STAMPS:
                self._stamps, self._stride = self._stamps[1::2], 2 * self._stride

    def end(self) -> None:
        """The code is over. The first call counts."""
        if self._began and not self._ended:
            self._ended = time.perf_counter()

    def took(self, well: bool) -> Took | None:
        """seconds, unit (`step` or `cell`), whole. None where nothing can be said: a cell without steps that failed."""
        self.end()
        began, self._began = self._began, 0.0
        if not began:
            return None
        whole = self._ended - began
        step = self._step()
        if step:
            return {"seconds": step, "unit": "step", "whole": whole}
        return {"seconds": whole, "unit": "cell", "whole": whole} if well and whole > 0 else None

    def _step(self) -> float:
        """Seconds of a step: the median of means over some steps each, since a step that does not wait for the device
        is short and the one that does is long. The first steps, which compile and warm up, are left out."""
        stamps = self._stamps[len(self._stamps) // 10 :]
        if self._steps < LEAST_STEPS or len(stamps) < 4:
            return 0.0
        size = max(1, (len(stamps) - 1) // CHUNKS)
        edges = stamps[::size]
        return median(b - a for a, b in pairwise(edges)) / size / self._stride

    def _hook(self) -> None:
        optim = sys.modules.get("torch.optim.optimizer")
        register = getattr(optim, "register_optimizer_step_post_hook", None)
        if register is not None and not self._hooked:
            self._hooked = True
            register(lambda *_: self.step())


pace = Pace()
"""Of this process: cells run one at a time."""
