"""One router process that was started ahead of its kernel, so that a new notebook does not wait for its imports.

Guarantees: a process is handed out at most once, and only while it lives; it knows nothing of any kernel before (keys
come over its stdin, to whoever has been handed out); there is never more than one that waits, and it ends with its
server at the latest, because its stdin closes then. Without one, a kernel's router is started when it is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process

REFILL_AFTER = 2.0
"""Seconds after one was handed out until the next is started: its imports would take the processor from the new
kernel's first cell."""


async def start_router() -> Process:
    """A router that waits for its configuration. Raises OSError."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nbos_provisioner.router", stdin=PIPE, stdout=PIPE
    )


async def end_router(process: Process, patience: float = 5.0) -> None:
    """It ends by itself once its stdin has closed; killed, where that takes longer."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), patience)
    except TimeoutError:
        process.kill()
        await process.wait()


class SpareRouter:
    """Of one Jupyter Server, on its event loop."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self._waiting: Process | None = None
        self._refill: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Of the one that waits; 0 while there is none."""
        return self._waiting.pid if self._waiting is not None and _lives(self._waiting) else 0

    def prepare(self, delay: float = 0.0) -> None:
        """Have one started after `delay` seconds, unless one waits or is under way."""
        if not self.pid and (self._refill is None or self._refill.done()):
            self._refill = asyncio.create_task(self._make(delay), name="starting a router ahead")

    async def take(self) -> Process:
        """A router for a kernel; another one is started soon. Raises OSError."""
        spare, self._waiting = (self._waiting if self.pid else None), None
        self.prepare(REFILL_AFTER)
        return spare or await start_router()

    async def close(self) -> None:
        if self._refill is not None:
            self._refill.cancel()
            await asyncio.gather(self._refill, return_exceptions=True)
        spare, self._waiting = self._waiting, None
        if spare is not None:
            await end_router(spare)

    async def _make(self, delay: float) -> None:
        await asyncio.sleep(delay)
        # Shielded: cancelled in the middle, it could leave a process that nobody knows of.
        starting = asyncio.ensure_future(start_router())
        try:
            self._waiting = await asyncio.shield(starting)
        except OSError as err:
            self.log.warning("no router can be started ahead of its kernel: %s", err)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                self._waiting = await starting
            raise


def _lives(process: Process) -> bool:
    """Also when the event loop has not heard of its end yet."""
    if process.returncode is not None:
        return False
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
