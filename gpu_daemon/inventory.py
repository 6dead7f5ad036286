"""What GPUs this machine has, through NVML: 'no library', 'no driver', 'no device' and 'works' read differently.

Guarantees: one device that does not answer hides none of the others; each thing that cannot be granted stands in the
list with the reason. Where an admin has set MIG up, every instance is a device of its own.
Uses no CUDA context: a context costs about 500 MB of device memory and would stay for as long as the daemon lives.
TPCs are counted, never looked up by the model's name: chips of one model differ in how many are switched on.
"""

from __future__ import annotations

import enum
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_daemon.nvml import NVML, DeviceLost, NVMLGone, Untold, text
from nbos_cluster.records import Device

SMS_PER_TPC = 2
"""On every NVIDIA data-centre chip from Pascal to Blackwell."""

COUNT_WITHIN = 30.0
"""Seconds that the CUDA driver has to count SMs: its first start on a machine with many GPUs is slow."""

NO_SMS = "the number of its SMs could not be read (libcuda does not show the device)"
NO_INSTANCE = "MIG is on, but it has no instance; make some (nvidia-smi mig -cgi … -C), or switch MIG off"


class NVMLState(enum.Enum):
    """What NVML says about this machine."""

    NO_LIBRARY = "no NVML library: the NVIDIA driver is not installed (or not visible in this container)"
    NO_DRIVER = "the NVML library is there, but no NVIDIA driver is loaded"
    NO_DEVICE = "the NVIDIA driver works, but shows no GPU"
    WORKS = "works"


@dataclass(frozen=True)
class Inventory:
    """state: what NVML says; detail: its own words, for people; devices: what was found; driver: its version."""

    state: NVMLState
    detail: str = ""
    devices: tuple[Device, ...] = ()
    driver: str = ""


def look() -> Inventory:
    """The machine's GPUs, in NVML's order. Never raises: what cannot be read is said in the inventory."""
    try:
        import pynvml
    except ImportError as err:
        return Inventory(NVMLState.NO_LIBRARY, f"the Python package nvidia-ml-py is missing: {err}")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as err:
        missing = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        state = NVMLState.NO_LIBRARY if err.value == missing else NVMLState.NO_DRIVER
        return Inventory(state, str(err))
    nvml = NVML(pynvml)
    try:
        return _inventory(nvml)
    except (NVMLGone, DeviceLost) as err:
        return Inventory(NVMLState.NO_DEVICE, str(err))
    finally:
        nvml.stop()


def _inventory(nvml: NVML) -> Inventory:
    driver = nvml.ask("nvmlSystemGetDriverVersion")
    version = "" if isinstance(driver, Untold) else text(driver)
    count = nvml.ask("nvmlDeviceGetCount")
    if isinstance(count, Untold):
        return Inventory(NVMLState.NO_DEVICE, count.why, driver=version)
    sms = _sms_by_uuid() if count else {}
    devices = tuple(device for index in range(count) for device in _devices(nvml, index, sms))
    return Inventory(NVMLState.WORKS if devices else NVMLState.NO_DEVICE, "", devices, version)


def _devices(nvml: NVML, index: int, sms: Mapping[str, int]) -> list[Device]:
    """GPU `index`, or its MIG instances; a device that cannot be used says why."""
    uuid = f"GPU-at-{index}"
    try:
        handle = nvml.ask("nvmlDeviceGetHandleByIndex", index)
        if isinstance(handle, Untold):
            return [_unusable(uuid, index, f"NVML does not open it: {handle.why}")]
        found = nvml.ask("nvmlDeviceGetUUID", handle)
        if isinstance(found, Untold):
            return [_unusable(uuid, index, f"NVML does not tell its UUID: {found.why}")]
        uuid = text(found)
        mode = nvml.ask("nvmlDeviceGetMigMode", handle)
        if not isinstance(mode, Untold) and mode[0]:
            instances = list(_instances(nvml, index, uuid, handle))
            return instances or [_unusable(uuid, index, NO_INSTANCE, _model(nvml, handle))]
        return [_device(nvml, index, uuid, handle, sms.get(uuid.removeprefix("GPU-"), 0), NO_SMS)]
    except DeviceLost as err:
        return [_unusable(uuid, index, f"the device is lost ({err})")]


def _unusable(uuid: str, index: int, reason: str, model: str = "unknown") -> Device:
    return Device(uuid=uuid, index=index, model=model, tpcs=0, memory=0, kind="nvml", healthy=False, reason=reason)


def _device(nvml: NVML, index: int, uuid: str, handle: Any, sms: int, no_sms: str, parent: str = "") -> Device:
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    capability = nvml.ask("nvmlDeviceGetCudaComputeCapability", handle)
    reason = no_sms if sms <= 0 else ""
    if isinstance(memory, Untold):
        reason = f"the size of its memory could not be read: {memory.why}"
    return Device(
        uuid=uuid,
        index=index,
        model=_model(nvml, handle),
        tpcs=sms // SMS_PER_TPC,
        memory=0 if isinstance(memory, Untold) else int(memory.total),
        kind="nvml",
        healthy=not reason,
        reason=reason,
        sms=sms,
        capability="" if isinstance(capability, Untold) else "{}.{}".format(*capability),
        parent=parent,
    )


def _instances(nvml: NVML, index: int, parent: str, handle: Any) -> Iterator[Device]:
    """The MIG devices of a GPU: NVML knows their SMs itself."""
    most = nvml.ask("nvmlDeviceGetMaxMigDeviceCount", handle)
    for number in range(0 if isinstance(most, Untold) else most):
        instance = nvml.ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
        if isinstance(instance, Untold):  # numbers of instances that were destroyed are left free
            continue
        uuid = nvml.ask("nvmlDeviceGetUUID", instance)
        attributes = nvml.ask("nvmlDeviceGetAttributes_v2", instance)
        told = not isinstance(attributes, Untold)
        sms = int(attributes.multiprocessorCount) if told else 0
        why = "" if told else f"the number of its SMs could not be read: {attributes.why}"
        if isinstance(uuid, Untold):
            yield _unusable(f"MIG-at-{index}-{number}", index, f"NVML does not tell its UUID: {uuid.why}")
        else:
            yield _device(nvml, index, text(uuid), instance, sms, why or NO_SMS, parent)


def _model(nvml: NVML, handle: Any) -> str:
    name = nvml.ask("nvmlDeviceGetName", handle)
    return "unknown" if isinstance(name, Untold) else text(name)


def _sms_by_uuid() -> dict[str, int]:
    """SMs by device UUID (without `GPU-`); empty when the CUDA driver does not tell."""
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("sms.py"))]
    try:
        done = subprocess.run(command, capture_output=True, timeout=COUNT_WITHIN, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return {str(uuid): int(count) for uuid, count in found.items()}
