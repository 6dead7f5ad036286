"""When a replica looks into its variables, so that captures may leave out what a cell cannot have touched.

Guarantees: it ends as soon as another execution or entry begins, and what is not known by then is simply examined; a
cell waits for it only where this replica was a standby, and then for AHEAD seconds of processor time at most: to
examine all of a namespace of gigabytes after that cell would cost the next one more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator

from .capture.changes import Capture

SLICE, PAUSE = 0.005, 0.015
"""Seconds of work on what the next capture may leave out, and of rest between two pieces of it."""

REST = 2.0
"""Seconds without an entry after which a standby looks into what it loaded: while cells follow each other, the
processor is theirs."""

INTERRUPTED = 8
"""Entries after which what a standby still could not look into, and none of them wrote, is looked into at once."""

AHEAD = 0.05


class Looking:
    """Runs on the main thread's `loop`."""

    def __init__(self, capture: Capture, loop: asyncio.AbstractEventLoop) -> None:
        self._capture, self._loop = capture, loop
        self._task: asyncio.Task[None] | None = None

    def after_cell(self) -> None:
        """This replica's entry is in the log: look into what the cell touched, in slices, while the user thinks.

        Cells that follow each other without a pause would go on like that: what has been examined in vain is looked
        into at once, which takes about as long as examining it.
        """
        self._task = self._loop.create_task(self._own())

    def after_entry(self) -> None:
        """Another executor's entry was applied."""
        if self._capture.unlooked():
            self._task = self._loop.create_task(self._standby())

    def before_code(self) -> None:
        """A cell is about to run. What other executors made and this replica loaded is looked into first."""
        if not self._capture.from_log:
            return
        until = time.thread_time() + AHEAD
        work = self._capture.look_ahead()
        while time.thread_time() < until and next(work, self) is not self:
            pass
        work.close()

    def disturb(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _own(self) -> None:
        for _ in self._capture.settle(in_vain=1):
            pass
        await self._in_slices(self._capture.settle())

    async def _standby(self) -> None:
        for _ in self._capture.settle(in_vain=INTERRUPTED):
            pass
        await asyncio.sleep(REST)
        await self._in_slices(self._capture.look_ahead())

    async def _in_slices(self, work: Generator[None, None, None]) -> None:
        try:
            while True:
                until = time.perf_counter() + SLICE
                while time.perf_counter() < until:
                    next(work)
                await asyncio.sleep(PAUSE)
        except StopIteration:
            return
        finally:
            work.close()
