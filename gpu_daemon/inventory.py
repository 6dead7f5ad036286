"""What GPUs this machine has, through NVML: 'no library', 'no driver', 'no device' and 'works' read differently.

Uses no CUDA context: a context costs about 500 MB of device memory and would stay for as long as the daemon lives.
TPCs are counted, never looked up by the model's name: chips of one model differ in how many are switched on.
"""

from __future__ import annotations

import enum
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbos_cluster.records import Device

SMS_PER_TPC = 2
"""On every NVIDIA data-centre chip from Pascal to Blackwell."""

COUNT_WITHIN = 30.0
"""Seconds that the CUDA driver has to count SMs: its first start on a machine with many GPUs is slow."""


class NVMLState(enum.Enum):
    """What NVML says about this machine."""

    NO_LIBRARY = "no NVML library: the NVIDIA driver is not installed (or not visible in this container)"
    NO_DRIVER = "the NVML library is there, but no NVIDIA driver is loaded"
    NO_DEVICE = "the NVIDIA driver works, but shows no GPU"
    WORKS = "works"


@dataclass(frozen=True)
class Inventory:
    """state: what NVML says; detail: its own words, for people; devices: what was found."""

    state: NVMLState
    detail: str = ""
    devices: tuple[Device, ...] = ()


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
    try:
        count = pynvml.nvmlDeviceGetCount()
        sms = _sms_by_uuid() if count else {}
        devices = tuple(_device(pynvml, index, sms) for index in range(count))
        return Inventory(NVMLState.WORKS if devices else NVMLState.NO_DEVICE, "", devices)
    except pynvml.NVMLError as err:
        return Inventory(NVMLState.NO_DEVICE, str(err))
    finally:
        pynvml.nvmlShutdown()


def _device(nvml: Any, index: int, sms: dict[str, int]) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    uuid = _text(nvml.nvmlDeviceGetUUID(handle))
    count = sms.get(uuid.removeprefix("GPU-"), 0)
    return Device(
        uuid=uuid,
        index=index,
        model=_text(nvml.nvmlDeviceGetName(handle)),
        tpcs=count // SMS_PER_TPC,
        memory=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        kind="nvml",
        healthy=count > 0,
        reason="" if count > 0 else "the number of its SMs could not be read (libcuda does not show the device)",
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _sms_by_uuid() -> dict[str, int]:
    """SMs by device UUID (without `GPU-`); empty when the CUDA driver does not tell."""
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("sms.py"))]
    try:
        done = subprocess.run(command, capture_output=True, timeout=COUNT_WITHIN, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return {str(uuid): int(count) for uuid, count in found.items()}
