"""What processes use of the devices, from NVML. Blocking: called from a thread that may hang with the driver.

What NVML does not tell (no permission, MIG, an old driver) is -1, never 0; a device that does not answer is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LISTS = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses")

log = logging.getLogger("gpu_daemon")


@dataclass(frozen=True)
class Use:
    """One process on one device. pid: as this host counts. memory: bytes; busy: percent of the SMs' time since the last
    reading; -1: not told."""

    uuid: str
    pid: int
    memory: int = -1
    busy: int = -1


class NVMLUsage:
    """nvml: the module pynvml, or what plays it."""

    def __init__(self, nvml: Any, uuids: Collection[str]) -> None:
        self._nvml, self._uuids = nvml, tuple(uuids)
        self._ready = False
        self._seen: dict[str, int] = {}
        """NVML's time stamp of the newest sample of each device."""

    def read(self) -> list[Use] | None:
        """What every process does now; None when NVML does not work."""
        try:
            if not self._ready:
                self._nvml.nvmlInit()
                self._ready = True
            return [use for uuid in self._uuids for use in self._uses(uuid)]
        except self._nvml.NVMLError as err:
            log.warning("what processes do on the GPUs cannot be read: %s", err)
            self._ready = False
            return None

    def free(self, uuid: str) -> int | None:
        """Bytes of a device that no process has; None where that is not told."""
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(uuid)).free)
        except nvml.NVMLError as err:
            log.debug("GPU %s does not tell what is free: %s", uuid, err)
            return None

    def _uses(self, uuid: str) -> Iterator[Use]:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as err:
            log.debug("GPU %s does not answer: %s", uuid, err)
            return
        memory, busy = self._memory(handle), self._busy(uuid, handle)
        for pid in sorted({*memory, *(busy or ())}):
            # Where samples are kept at all, a process without one did nothing.
            yield Use(uuid, pid, memory.get(pid, 0), -1 if busy is None else busy.get(pid, 0))

    def _memory(self, handle: Any) -> dict[int, int]:
        """Bytes by process. Clients of MPS stand in a list of their own."""
        found: dict[int, int] = {}
        for call in LISTS:
            for process in self._list(call, handle):
                used = process.usedGpuMemory
                found[process.pid] = max(found.get(process.pid, -1), -1 if used is None else int(used))
        return found

    def _list(self, call: str, handle: Any) -> Sequence[Any]:
        """By version: nvidia-ml-py's names without one fail in a way of their own on an older driver."""
        for version in ("_v3", "_v2"):
            try:
                return getattr(self._nvml, call + version)(handle)
            except self._nvml.NVMLError as err:
                log.debug("%s%s: %s", call, version, err)
        return ()

    def _busy(self, uuid: str, handle: Any) -> dict[int, int] | None:
        """Percent of the SMs' time by process, the highest of the new samples; None: it is not told here."""
        nvml = self._nvml
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(handle, self._seen.get(uuid, 0))
        except nvml.NVMLError as err:
            # nvidia-ml-py raises SUCCESS when NVML has no new sample.
            return {} if err.value in (nvml.NVML_SUCCESS, nvml.NVML_ERROR_NOT_FOUND) else None
        found: dict[int, int] = {}
        for sample in samples:
            self._seen[uuid] = max(self._seen.get(uuid, 0), int(sample.timeStamp))
            found[sample.pid] = max(found.get(sample.pid, 0), int(sample.smUtil))
        return found
