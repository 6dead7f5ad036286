"""Standbys use the processor after executors, where Linux shares it among sessions (sched(7), "autogroup").

A standby applies what a cell has computed, and nobody waits for that unless the executor dies. Each replica is a
session of its own, whose nice value it may set back at any time; that of a process only a privileged one may. Where
there are no autogroups, or a container's own share counts, this changes nothing.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

BEHIND = 10
"""A tenth of the processor beside somebody at 0, on sched(7)'s scale: enough not to fall behind for ever."""

AGAIN = 0.15
"""Seconds after which a setting is tried again: the kernel takes one each 0.1 s from all unprivileged processes."""

GROUP = Path("/proc/self/autogroup")


class Precedence:
    """Of this process's session. `first` when it is asked to run something, `last` when it applies what others did."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._is = self._wanted = 0
        self._again: asyncio.TimerHandle | None = None
        self._possible = os.getsid(0) == os.getpid() and os.access(GROUP, os.W_OK)
        """Whoever shares its session with others must not slow them down."""

    def first(self) -> None:
        self._want(0)

    def last(self) -> None:
        self._want(BEHIND)

    def _want(self, nice: int) -> None:
        self._wanted = nice
        if self._possible and self._is != nice and self._again is None:
            self._put()

    def _put(self) -> None:
        self._again = None
        if self._is == self._wanted:
            return
        try:
            GROUP.write_text(str(self._wanted))
        except OSError as err:
            self._possible = err.errno == errno.EAGAIN
            if self._possible:
                self._again = self._loop.call_later(AGAIN, self._put)
        else:
            self._is = self._wanted
