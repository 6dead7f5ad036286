"""The daemon's hand on its GPUs' clocks: what runs and what it took goes to the governor, its caps to the devices.

Guarantees: nothing is locked that was not noted first, in the run directory and by the restorer, a process that resets
it when this one is gone. A restorer that is gone is replaced at the next look; when both are gone, the next daemon
resets what the note names (`restore_left`), whether it is to lock clocks or not. A device whose clocks cannot be set is
left alone from then on. Belongs to the daemon's event loop; calls into the driver are made beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from msgspec.structs import replace

from gpu_daemon.aside import aside
from gpu_daemon.power.clocks import ClockFailed, Clocks
from gpu_daemon.power.governor import Cap, Failed, Governor, Key, Look, Policy, Ran
from gpu_daemon.power.note import Note
from gpu_daemon.power.restorer import DONE, LEFT_TO_THE_DAEMON, restore
from gpu_daemon.requests import Took
from nbos_cluster.records import DeviceShare, GrantRecord

if TYPE_CHECKING:
    from gpu_daemon.site import Site

log = logging.getLogger("gpu_daemon")

NOTE = "clocks.json"
RESTORE_WITHIN = 2.0
KEPT = 5000


class Restorer:
    """The process that resets what it was told of, once this one is gone."""

    def __init__(self, note: Path) -> None:
        self._note = note
        self._process: subprocess.Popen[bytes] | None = None
        self._told: list[str] = []

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def tell(self, uuid: str) -> None:
        """Before the device is locked. Raises OSError when no such process can be had."""
        self._told.append(uuid)
        try:
            self._write(uuid)
        except BrokenPipeError:
            self._begin()

    def look(self) -> None:
        """Have another one when it has ended."""
        if self._process is not None and self._process.poll() is not None:
            log.warning("the process that restores clocks has ended (%s); another one is started", self._process.poll())
            self._begin()

    def done(self) -> None:
        """Everything is restored."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._write(DONE)
            self.leave()

    def leave(self) -> None:
        """Have it restore what it knows of."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._pipe.close()

    def _begin(self) -> None:
        command = [sys.executable, "-m", "gpu_daemon.power.restorer", str(self._note)]
        # It inherits the mask: a signal that comes before it ignores them must not end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_DAEMON)
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for uuid in self._told:
            self._write(uuid)

    def _write(self, line: str) -> None:
        if self._process is None:
            self._begin()
            return
        self._pipe.write(f"{line}\n".encode())
        self._pipe.flush()

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._process is not None
        assert self._process.stdin is not None
        return self._process.stdin


class PowerWatch:
    """real: the devices' clocks outlive this process, and are restored by another one."""

    def __init__(self, policy: Policy, every: float, clocks: Clocks, real: bool) -> None:
        self._policy, self._every, self._clocks, self._real = policy, every, clocks, real
        self._governor = Governor(policy, {})
        self._units: dict[Key, str] = {}
        self._locked: set[str] = set()
        self._note: Note | None = None
        self._restorer: Restorer | None = None
        self.changed: Callable[[], None] = lambda: None
        self.switches = 0

    async def run(self, site: Site) -> None:
        """For as long as the daemon lives."""
        if self._real:
            self._note = Note(site.rundir.path / NOTE)
            self._restorer = Restorer(site.rundir.path / NOTE)
        known = await aside(self._clocks.known, "asking for clocks")
        for device in site.ledger.devices:
            if device.uuid not in known:
                log.info("GPU %s does not say which clocks it has; they are left alone", device.uuid)
        self._governor = Governor(self._policy, known)
        while True:
            if self._restorer is not None:
                self._restorer.look()
            for uuid, running in self._running(site, known).items():
                for cap in self._governor.handle(Look(uuid, running, time.monotonic())):
                    await self._set(cap, known[uuid][-1])
            await asyncio.sleep(self._every)

    def _running(self, site: Site, known: Iterable[str]) -> dict[str, dict[Key | None, float]]:
        size = {device.uuid: max(1, device.tpcs) for device in site.ledger.devices}
        found: dict[str, dict[Key | None, float]] = {uuid: defaultdict(float) for uuid in known}
        for grant in site.ledger.grants.values():
            for share in grant.shares:
                if share.uuid in found:
                    found[share.uuid][_key(grant, share)] += len(share.tpcs) / size[share.uuid]
        return found

    def ran(self, grant: GrantRecord, took: Took | None) -> None:
        """An execution under this grant ended and took so long."""
        if took is None or len(grant.shares) != 1:
            return
        share, now = grant.shares[0], time.monotonic()
        key = _key(grant, share)
        if key is None or self._units.setdefault(key, took.unit) != took.unit:
            return
        if len(self._units) > KEPT:
            self._units.clear()
        began = now - max(0.0, time.time() - grant.since)
        self._governor.handle(Ran(share.uuid, key, took.seconds, began, now))

    async def _set(self, cap: Cap, highest: int) -> None:
        try:
            if cap.mhz == highest:
                await self._reset(cap.uuid)
            else:
                await self._lock(cap)
        except (ClockFailed, OSError) as err:
            log.warning("clocks are left alone from now on: %s", err)
            self._governor.handle(Failed(cap.uuid))
            with contextlib.suppress(ClockFailed):
                await self._reset(cap.uuid)
        self.switches += 1
        self.changed()

    async def _lock(self, cap: Cap) -> None:
        if cap.uuid not in self._locked and self._note is not None and self._restorer is not None:
            self._note.add(cap.uuid)
            self._restorer.tell(cap.uuid)
        self._locked.add(cap.uuid)
        await aside(lambda: self._clocks.lock(cap.uuid, cap.mhz), "locking clocks")

    async def _reset(self, uuid: str) -> None:
        if uuid in self._locked:
            await aside(lambda: self._clocks.reset(uuid), "resetting clocks")
            # The restorer goes on knowing it: to reset it once more does no harm.
            self._locked.discard(uuid)
            if self._note is not None:
                self._note.remove(uuid)

    def caps(self) -> dict[str, tuple[int, int]]:
        """By device that is locked: to how many MHz, of how many."""
        return {uuid: cap for uuid in sorted(self._locked) if (cap := self._governor.cap(uuid)) is not None}

    def clocked(self, shares: tuple[DeviceShare, ...]) -> tuple[DeviceShare, ...]:
        """Shares of simulated devices say how fast those are: the cell plays them itself."""
        caps = self.caps()
        return tuple(
            replace(s, clock=caps[s.uuid][0] / caps[s.uuid][1]) if s.kind == "simulated" and s.uuid in caps else s
            for s in shares
        )

    async def close(self) -> None:
        """The daemon ends: every device as it was. What the driver does not do now is left to the restorer."""
        locked = sorted(self._locked)
        try:
            async with asyncio.timeout(RESTORE_WITHIN):
                for uuid in locked:
                    await self._reset(uuid)
        except (ClockFailed, TimeoutError) as err:
            log.warning("clocks are still locked, another process goes on trying: %s", err)
        if self._restorer is not None:
            (self._restorer.leave if self._locked else self._restorer.done)()


def _key(grant: GrantRecord, share: DeviceShare) -> Key | None:
    return (grant.owner, grant.code, len(share.tpcs)) if grant.code and len(grant.shares) == 1 else None


def restore_left(folder: Path, clocks: Callable[[Iterable[str]], Clocks]) -> None:
    """What a daemon before this one has locked, and neither it nor its restorer has reset. Blocking."""
    note = Note(folder / NOTE)
    left = note.read()
    if not left:
        return
    failed = restore(clocks(left), left)
    for uuid in left - failed.keys():
        log.warning("GPU %s: clocks that a daemon of before had locked are reset", uuid)
        note.remove(uuid)
    for text in failed.values():
        log.error("clocks that a daemon of before has locked cannot be reset: %s", text)
