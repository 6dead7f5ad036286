"""Whether this host's GPUs are well: read from NVML every few seconds, told to the ledger when it changes.

Guarantees: a device that is lost, has uncorrected memory errors or reported a fatal XID gets no new grants, with the
reason in the host's record; one that recovered is used again; a driver that hangs blocks nobody but this watch, and
makes its devices unusable after half a minute. Cells that run are left alone: they may be done before it matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from gpu_daemon.ledger import Ledger
from gpu_daemon.site import log

EVERY = 10.0
STUCK = 30.0

FATAL_XIDS = {
    48: "an uncorrectable memory error",
    64: "a row of its memory could not be replaced",
    79: "it has fallen off the bus",
    95: "an uncontained memory error",
    119: "its system processor does not answer",
    120: "its system processor failed",
}
"""Errors after which only a reset helps. Others (13, 31, 43, 45, …) are mistakes of the program that ran."""

RESET = "reset it (nvidia-smi --gpu-reset) or restart the machine"

Reasons = Mapping[str, str]
"""By UUID: why the device cannot be used, '' when it is well."""


class NVMLHealth:
    """Reads through NVML. Blocking: called from a thread. nvml: the module pynvml, or what plays it."""

    def __init__(self, nvml: Any, uuids: Collection[str]) -> None:
        self._nvml, self._uuids = nvml, tuple(uuids)
        self._ready = False
        self._events: Any = None
        self._xids: dict[str, int] = {}
        """Fatal XIDs seen; they count until this daemon is started anew."""

    def read(self) -> dict[str, str]:
        try:
            if not self._ready:
                self._nvml.nvmlInit()
                self._ready = True
                self._listen()
            self._hear()
        except self._nvml.NVMLError as err:
            self._ready = False
            return dict.fromkeys(self._uuids, f"NVML does not work any more: {err}; look at the NVIDIA driver")
        return {uuid: self._reason(uuid) for uuid in self._uuids}

    def _reason(self, uuid: str) -> str:
        nvml, xid = self._nvml, self._xids.get(uuid)
        if xid is not None:
            return f"{FATAL_XIDS[xid]} (XID {xid}); {RESET}"
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            nvml.nvmlDeviceGetMemoryInfo(handle)
            errors = self._optional(
                nvml.nvmlDeviceGetTotalEccErrors,
                handle,
                nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                nvml.NVML_VOLATILE_ECC,
            )
            rows = self._optional(nvml.nvmlDeviceGetRemappedRows, handle)
        except nvml.NVMLError as err:
            lost = err.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_NOT_FOUND)
            return f"the device is lost ({err}); {RESET}" if lost else f"NVML cannot read it: {err}"
        if errors:
            return f"{errors} uncorrected memory errors since its last reset; {RESET}"
        if rows is not None and rows[3]:
            return "a row of its memory could not be replaced; have the device replaced"
        return ""

    def _optional(self, call: Callable[..., Any], *args: Any) -> Any:
        """What the device tells, None where it does not count that (no ECC, an older chip)."""
        try:
            return call(*args)
        except self._nvml.NVMLError as err:
            if err.value == self._nvml.NVML_ERROR_NOT_SUPPORTED:
                return None
            raise

    def _listen(self) -> None:
        """XIDs are told once, to who listens."""
        nvml = self._nvml
        self._events = None
        try:
            events = nvml.nvmlEventSetCreate()
            for uuid in self._uuids:
                handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError as err:
            log.info("XIDs of the GPUs cannot be heard: %s", err)
            return
        self._events = events

    def _hear(self) -> None:
        """Every event that waits; NVML says TIMEOUT when there is none."""
        nvml = self._nvml
        while self._events is not None:
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError as err:
                if err.value != nvml.NVML_ERROR_TIMEOUT:
                    log.warning("XIDs of the GPUs cannot be heard any more: %s", err)
                    self._events = None
                return
            uuid, xid = nvml.nvmlDeviceGetUUID(event.device), int(event.eventData)
            uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
            log.warning("GPU %s reported XID %d", uuid, xid)
            if xid in FATAL_XIDS:
                self._xids[uuid] = xid


class HealthWatch:
    """read: the reasons by device, blocking. changed: called when the ledger knows something new."""

    def __init__(self, read: Callable[[], Reasons], ledger: Ledger, changed: Callable[[], None]) -> None:
        self._read, self._ledger, self._changed = read, ledger, changed
        # What was wrong at the start (its SMs cannot be counted) stays wrong.
        self._watched = {device.uuid for device in ledger.devices if device.healthy}

    async def run(self) -> None:
        """For as long as the daemon lives."""
        while True:
            reading = asyncio.ensure_future(self._reading())
            if not (await asyncio.wait({reading}, timeout=STUCK))[0]:
                self._apply(dict.fromkeys(self._watched, f"the NVIDIA driver has not answered for {STUCK:.0f} s"))
            self._apply(await reading)
            await asyncio.sleep(EVERY)

    async def _reading(self) -> Reasons:
        """In a thread that ends with the process, whatever it hangs in: the executor's threads would hold us up."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Reasons] = loop.create_future()

        def work() -> None:
            try:
                tell, outcome = result.set_result, self._read()
            except Exception as err:  # noqa: BLE001  the watch must hear of it, whatever it is
                tell, outcome = result.set_exception, err  # type: ignore[assignment]
            with contextlib.suppress(RuntimeError):  # the daemon ended meanwhile
                loop.call_soon_threadsafe(tell, outcome)

        threading.Thread(target=work, name="reading the GPUs' health", daemon=True).start()
        return await result

    def _apply(self, reasons: Reasons) -> None:
        news = False
        for device in self._ledger.devices:
            reason = reasons.get(device.uuid, device.reason)
            if device.uuid in self._watched and device.reason != reason:
                news = True
                log.warning("GPU %s: %s", device.uuid, reason or "it is well again")
                self._ledger.set_health(device.uuid, not reason, reason)
        if news:
            self._changed()
