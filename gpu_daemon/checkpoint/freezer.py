"""Which of a host's replicas stand frozen: checkpointed by the driver, with nothing on a device; and thawing them.

Guarantees: that a process is being frozen is on the disk before the driver is asked, so that the next daemon thaws it
before its next cell; memory is reserved (by the caller) and really free (by NVML, where that tells) before a restore is
begun; a process whose restore failed is ended, since it is stuck for good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from gpu_daemon.aside import aside
from gpu_daemon.checkpoint.checkpoints import Checkpoints
from gpu_daemon.replica import LocalReplica
from gpu_daemon.rundir import read_json, write_json
from nbos_cluster.records import Device

FILE = "frozen.json"
GIB = 1 << 30

Free = Callable[[str], int | None]
"""Bytes that are free on a device, by NVML; None where it does not tell. Blocking."""


@dataclass(frozen=True)
class Frozen:
    """pid: as this host counts. uuid: the device that it was on, as the process knows it now. size: bytes that come
    back, CUDA's context included."""

    pid: int
    uuid: str
    size: int


class Freezer:
    """devices: the host's. mps: whether its processes share a device by MPS."""

    def __init__(
        self, devices: Sequence[Device], checkpoints: Checkpoints, free: Free, mps: Callable[[], bool]
    ) -> None:
        self._real = [device for device in devices if device.kind == "nvml"]
        self.checkpoints, self._free, self._mps = checkpoints, free, mps

    async def open(self) -> str:
        """Why nothing can be frozen on this host, '' where it can."""
        if not self._real:
            return "there is no real GPU"
        if any(device.parent for device in self._real):
            return "there are MIG instances, which the driver does not checkpoint"
        return await self.checkpoints.open()

    def refused(self, pids: Sequence[int], devices: Sequence[str]) -> str:
        """Why this process cannot be frozen, '' where nothing is known against it."""
        if self._mps():
            return "it is not known whether clients of MPS can be checkpointed"
        if len(pids) != 1:
            return f"{len(pids)} of its processes use the GPU"
        return "" if len(devices) == 1 else f"it uses {len(devices)} GPUs"

    def homes(self, uuid: str) -> frozenset[str]:
        """The devices on which what was frozen on `uuid` can be thawed."""
        if not self.checkpoints.remaps:
            return frozenset([uuid])
        model = next((device.model for device in self._real if device.uuid == uuid), "")
        return frozenset(device.uuid for device in self._real if device.model == model or device.uuid == uuid)

    async def freeze(self, replica: LocalReplica, wanted: Frozen) -> str:
        """What is in its way; '' when it is frozen. The process has ended, or is being ended, where that failed."""
        write_json(replica.folder / FILE, asdict(wanted))
        handle = replica.handle
        process = await self.checkpoints.bring(wanted.pid, "parked")
        if process.state == "checkpointed":
            return ""
        self.forget(replica)
        if process.state == "failed" and replica.handle is handle:
            replica.end(f"its GPU memory could not be moved to host memory: {process.error}")
        return process.error

    def frozen(self, replica: LocalReplica) -> Frozen | None:
        """What this or an earlier daemon froze."""
        found = read_json(replica.folder / FILE)
        return Frozen(**found) if found is not None else None

    def forget(self, replica: LocalReplica) -> None:
        (replica.folder / FILE).unlink(missing_ok=True)

    async def lacks(self, what: Frozen, uuid: str) -> str:
        """What NVML says against thawing it there now, '' where nothing."""
        free = await aside(lambda: self._free(uuid), "looking at a GPU's memory")
        if free is None or free >= what.size:
            return ""
        return f"{what.size / GIB:.1f} GiB come back to GPU {uuid}, {free / GIB:.1f} GiB are free there"

    async def thaw(self, replica: LocalReplica, what: Frozen, uuid: str) -> str:
        """Room is reserved on `uuid`. Why it failed, for good: the process is being ended; '' when it runs on."""
        handle = replica.handle
        process = await self.checkpoints.bring(what.pid, "running", self._pairs(what.uuid, uuid))
        if process.state == "running" and not process.error:
            self.forget(replica)
            if uuid != what.uuid:
                replica.push({"type": "gpu_moved", "from": what.uuid, "to": uuid})
            return ""
        if replica.handle is handle:
            replica.end(f"what it had on the GPU could not be restored: {process.error}")
        return process.error

    def _pairs(self, old: str, new: str) -> list[tuple[str, str]]:
        """The driver wants every GPU of the host named."""
        if old == new:
            return []
        swapped = {old: new, new: old}
        return [(device.uuid, swapped.get(device.uuid, device.uuid)) for device in self._real]
