"""One look at a host's GPUs through NVML: how each is (`Reading`, for people), and what speaks against it (`Sample`).

Blocking: called from a thread. What a device does not tell is named with the reason and stops nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpu_daemon.condition import Looked, Sample
from gpu_daemon.nvml import NOT_SUPPORTED, NVML, DeviceLost, NVMLGone, Untold
from nbos_cluster.records import Device, GPUProcess, Reading

_SENSOR_GPU, _THRESHOLD_SLOWDOWN = 0, 1
_UNCORRECTED, _SINCE_RESET = 1, 0
_HW_THERMAL_SLOWDOWN = 0x40
_FIELD_RECOVERY_ACTION = 230
_NOT_AVAILABLE = 2**64 - 1

ACTIONS = {
    1: "a reset of the GPU",
    2: "a restart of the machine",
    3: "no new peer-to-peer work on it, then a reset",
    4: "no new work on it, then a reset",
    5: "the recovery of its IMEX domain",
    6: "a reset of its bus",
    7: "a restart of the machine",
}
"""NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, on drivers that tell it; 0 is none."""


@dataclass(frozen=True)
class Sight:
    """looked: for the decision. readings: of every device that could be read, MIG instances too."""

    looked: Looked
    readings: Mapping[str, Reading] = field(default_factory=dict)


class Sampler:
    """Looks at these devices. NVML is started with the first look, and anew after it broke."""

    def __init__(self, module: Any, devices: Iterable[Device]) -> None:
        self._nvml = NVML(module)
        self._started = False
        self._of: dict[str, list[Device]] = {}
        """By the UUID of the GPU: itself, or its MIG instances."""
        for device in devices:
            self._of.setdefault(device.parent or device.uuid, []).append(device)

    def look(self) -> Sight:
        samples: dict[str, Sample] = {}
        readings: dict[str, Reading] = {}
        try:
            if not self._started:
                self._nvml.start()
                self._started = True
            for gpu, devices in self._of.items():
                try:
                    handle = self._nvml.handle(gpu)
                    samples[gpu], reading = self._gpu(handle, gpu)
                    for device in devices:
                        readings[device.uuid] = self._instance(device, reading) if device.parent else reading
                except DeviceLost as err:
                    samples[gpu] = Sample(lost=str(err))
        except NVMLGone as err:
            if self._started:
                self._nvml.stop()
            self._started = False
            return Sight(Looked({}, gone=str(err)))
        return Sight(Looked(samples), readings)

    def _gpu(self, handle: Any, uuid: str) -> tuple[Sample, Reading]:
        """Raises DeviceLost."""
        ask, untold = self._nvml.ask, _Untold()
        memory = untold.note("memory", ask("nvmlDeviceGetMemoryInfo", handle))
        utilisation = untold.note("utilisation", ask("nvmlDeviceGetUtilizationRates", handle))
        temperature = untold.note("temperature", ask("nvmlDeviceGetTemperature", handle, _SENSOR_GPU))
        power = untold.note("power", ask("nvmlDeviceGetPowerUsage", handle))
        bound = untold.note("power_limit", ask("nvmlDeviceGetEnforcedPowerLimit", handle))
        ecc = untold.note("ecc", ask("nvmlDeviceGetTotalEccErrors", handle, _UNCORRECTED, _SINCE_RESET))
        processes = untold.note("processes", self._processes(handle))
        limit = ask("nvmlDeviceGetTemperatureThreshold", handle, _THRESHOLD_SLOWDOWN)
        rows = ask("nvmlDeviceGetRemappedRows", handle)
        reading = Reading(
            uuid=uuid,
            memory=-1 if memory is None else int(memory.used),
            utilisation=-1 if utilisation is None else int(utilisation.gpu),
            temperature=-1 if temperature is None else int(temperature),
            power=-1 if power is None else round(power / 1000),
            power_limit=-1 if bound is None else round(bound / 1000),
            ecc=-1 if ecc is None else int(ecc),
            processes=tuple(processes or ()),
            notes=self._notes(handle, rows),
            untold=untold.reasons,
        )
        sample = Sample(
            ecc=None if ecc is None else int(ecc),
            remap_failed=not isinstance(rows, Untold) and bool(rows[3]),
            temperature=None if temperature is None else int(temperature),
            limit=None if isinstance(limit, Untold) else int(limit),
            slowed=self._slowed(handle),
            action=self._action(handle),
        )
        return sample, reading

    def _instance(self, device: Device, gpu: Reading) -> Reading:
        """Of a MIG instance: its own memory and processes; heat and power are the GPU's, and so are memory errors."""
        untold = _Untold(gpu.untold)
        untold.reasons["utilisation"] = NOT_SUPPORTED + " for a MIG instance"
        handle = self._nvml.ask("nvmlDeviceGetHandleByUUID", device.uuid)
        if isinstance(handle, Untold):
            return Reading(uuid=device.uuid, untold={"memory": f"the instance is gone: {handle.why}"})
        memory = untold.note("memory", self._nvml.ask("nvmlDeviceGetMemoryInfo", handle))
        processes = untold.note("processes", self._processes(handle))
        return Reading(
            uuid=device.uuid,
            memory=-1 if memory is None else int(memory.used),
            temperature=gpu.temperature,
            power=gpu.power,
            power_limit=gpu.power_limit,
            ecc=gpu.ecc,
            processes=tuple(processes or ()),
            notes=gpu.notes,
            untold=untold.reasons,
        )

    def _processes(self, handle: Any) -> tuple[GPUProcess, ...] | Untold:
        """Clients of MPS stand in a list of their own. An old driver has the older form of both."""
        plain, under_mps = (
            self._newest(f"nvmlDeviceGet{kind}RunningProcesses", handle) for kind in ("Compute", "MPSCompute")
        )
        if isinstance(plain, Untold):
            return plain
        found = {int(one.pid): _bytes(one.usedGpuMemory) for one in (*plain, *(under_mps or ()))}
        return tuple(GPUProcess(pid=pid, memory=memory) for pid, memory in found.items())

    def _newest(self, call: str, handle: Any) -> Any:
        found = self._nvml.ask(f"{call}_v3", handle)
        return self._nvml.ask(f"{call}_v2", handle) if isinstance(found, Untold) else found

    def _notes(self, handle: Any, rows: Any) -> tuple[str, ...]:
        notes = []
        if not isinstance(rows, Untold) and rows[2]:
            notes.append("a row of its memory is replaced at the next reset")
        pages = self._nvml.ask("nvmlDeviceGetRetiredPagesPendingStatus", handle)
        if not isinstance(pages, Untold) and pages:
            notes.append("a page of its memory is retired at the next reset")
        return tuple(notes)

    def _slowed(self, handle: Any) -> bool:
        reasons = self._nvml.ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if isinstance(reasons, Untold):
            reasons = self._nvml.ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return not isinstance(reasons, Untold) and bool(reasons & _HW_THERMAL_SLOWDOWN)

    def _action(self, handle: Any) -> str:
        values = self._nvml.ask("nvmlDeviceGetFieldValues", handle, [_FIELD_RECOVERY_ACTION])
        if isinstance(values, Untold) or values[0].nvmlReturn != 0:
            return ""
        number = int(values[0].value.uiVal)
        return ACTIONS.get(number, f"what it calls recovery action {number}") if number else ""


class _Untold:
    """Collects why something is not told."""

    def __init__(self, before: Mapping[str, str] | None = None) -> None:
        self.reasons = dict(before or {})

    def note(self, what: str, answer: Any) -> Any:
        """The answer, None when there is none."""
        if isinstance(answer, Untold):
            self.reasons[what] = answer.why
            return None
        self.reasons.pop(what, None)
        return answer


def _bytes(value: int | None) -> int:
    return -1 if value is None or value == _NOT_AVAILABLE else int(value)
