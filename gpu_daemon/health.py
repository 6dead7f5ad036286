"""The daemon's watch over its GPUs: what NVML shows and tells goes to `condition`, its verdicts to the ledger.

Guarantees: a device that is not well gets no new grants, with the reason in the host's record and for whoever waits;
one that is well again is used again; a driver that hangs blocks nobody but this watch, and makes its devices unusable
after half a minute. Cells that run are left alone: they may be done before it matters. What cannot be measured again
(XIDs, what an admin said) outlives a restart of the daemon; XIDs do not outlive one of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from gpu_daemon import xids
from gpu_daemon.condition import Closed, Conditions, Event, Heard, Looked, Policy, Reopened, Verdict
from gpu_daemon.owners import Owners
from gpu_daemon.sampling import Sampler, Sight
from gpu_daemon.site import Site, log
from gpu_daemon.xid_listener import XIDListener
from nbos_cluster.records import Reading

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class HealthOptions:
    """every: seconds between two looks; stuck: after which a driver that does not answer makes its GPUs unusable."""

    every: float = 10.0
    stuck: float = 30.0
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class Watched:
    """nvml: the module pynvml, None where all devices are simulated. driver: its version, as it was found."""

    options: HealthOptions = field(default_factory=HealthOptions)
    nvml: Any = None
    driver: str = ""


class HealthWatch:
    """changed: called when the ledger knows something new, looked: when only the readings are new. Belongs to the
    daemon's loop."""

    def __init__(
        self,
        site: Site,
        watched: Watched,
        changed: Callable[[], None],
        looked: Callable[[], None],
    ) -> None:
        self._site, self._options, self._nvml = site, watched.options, watched.nvml
        self._changed, self._looked = changed, looked
        self._owners = Owners(site)
        # What was wrong at the start (its SMs cannot be counted) stays wrong until the daemon is started anew.
        self._of: dict[str, list[str]] = {}
        """The devices of each GPU: itself, or its MIG instances."""
        for device in site.ledger.devices:
            if device.healthy:
                self._of.setdefault(device.parent or device.uuid, []).append(device.uuid)
        self._conditions = Conditions(self._of, watched.options.policy)
        self._readings: Mapping[str, Reading] = {}
        self._last_xid: dict[str, int] = {}
        self.closed: dict[str, str] = {}
        self.reopened: dict[str, int] = {}

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Of all devices that could be read, as of the last look."""
        return tuple(self._readings[d.uuid] for d in self._site.ledger.devices if d.uuid in self._readings)

    def remember(self) -> None:
        """Called once, when the run directory is there."""
        saved = self._site.rundir.load_health()
        if saved.get("boot") == _boot_id():
            self._conditions = Conditions(self._of, self._options.policy, saved.get("xids"))
        self.closed, self.reopened = dict(saved.get("closed") or {}), dict(saved.get("reopened") or {})
        self._conditions.handle(Closed(self.closed))
        self._apply(self._conditions.verdicts())

    def obey(self, closed: Mapping[str, str], reopened: Mapping[str, int]) -> None:
        """An admin said something in the host's record (or nothing new)."""
        for gpu in [gpu for gpu, count in reopened.items() if self.reopened.get(gpu) != count]:
            log.info("an admin says that GPU %s may be used again", gpu)
            self._take(Reopened(gpu))
        news = (self.closed, self.reopened) != (closed, reopened)
        self.closed, self.reopened = dict(closed), dict(reopened)
        self._take(Closed(closed))
        if news:
            self._save()
            self._looked()

    async def run(self) -> None:
        """For as long as the daemon lives."""
        real = [device for device in self._site.ledger.devices if device.kind == "nvml"]
        if self._nvml is None or not real:
            return
        gpus = dict.fromkeys(device.parent or device.uuid for device in real)
        XIDListener(self._nvml, gpus, asyncio.get_running_loop(), self._heard).start()
        sampler = Sampler(self._nvml, real)
        while True:
            looking = asyncio.ensure_future(_in_thread(sampler.look))
            if not (await asyncio.wait({looking}, timeout=self._options.stuck))[0]:
                self._take(Looked({}, gone=f"the driver has not answered for {self._options.stuck:g} s"))
            self._see(await looking)
            await asyncio.sleep(self._options.every)

    def _see(self, sight: Sight) -> None:
        self._readings = {uuid: self._complete(reading) for uuid, reading in sight.readings.items()}
        if not self._take(sight.looked):
            self._looked()

    def _complete(self, reading: Reading) -> Reading:
        """With whose processes they are, and the last XID."""
        processes = tuple(self._owners.of(process) for process in reading.processes)
        xid = self._last_xid.get(reading.uuid)
        notes = (*reading.notes, f"the driver told of: {xids.words(xid)}") if xid is not None else reading.notes
        return replace(reading, processes=processes, notes=notes)

    def _heard(self, uuid: str, xid: int) -> None:
        meaning = xids.meaning(xid, self._options.policy.harmless)
        log.warning("GPU %s: %s, %s", uuid, xids.words(xid), meaning)
        if meaning != "critical":
            self._last_xid |= dict.fromkeys(self._of.get(uuid, [uuid]), xid)
        self._take(Heard(uuid, xid))
        self._save()

    def _take(self, event: Event) -> bool:
        """Whether it changed whether some device is used, or why not."""
        verdicts = self._conditions.handle(event)
        self._apply(verdicts)
        if verdicts:
            self._changed()
        return bool(verdicts)

    def _apply(self, verdicts: list[Verdict]) -> None:
        known = {device.uuid: device for device in self._site.ledger.devices}
        for verdict in verdicts:
            for uuid in self._of[verdict.uuid]:
                if known[uuid].reason != verdict.reason:
                    log.warning("GPU %s: %s", uuid, verdict.reason or "it is well again")
                self._site.ledger.set_health(uuid, not verdict.reason, verdict.reason, verdict.passing)

    def _save(self) -> None:
        self._site.rundir.save_health(
            boot=_boot_id(), xids=self._conditions.heard(), closed=self.closed, reopened=self.reopened
        )


async def _in_thread(work: Callable[[], Sight]) -> Sight:
    """In a thread that ends with the process, whatever it hangs in: the executor's threads would hold us up."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Sight] = loop.create_future()

    def run() -> None:
        try:
            sight = work()
        except Exception as err:  # noqa: BLE001  whatever it is (the bindings have errors of their own)
            # A watch that ends would watch nothing.
            log.exception("looking at the GPUs failed")
            sight = Sight(Looked({}, gone=f"looking at the GPUs failed: {err}"))
        with contextlib.suppress(RuntimeError):  # the daemon ended meanwhile
            loop.call_soon_threadsafe(result.set_result, sight)

    threading.Thread(target=run, name="looking at the GPUs", daemon=True).start()
    return await result


def _boot_id() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
