"""What GPUs this machine has, through NVML: 'no library', 'no driver', 'no device' and 'works' read differently.

Uses no CUDA context: a context costs about 500 MB of device memory and would stay for as long as the daemon lives.
TPCs are counted, never looked up by the model's name: chips of one model differ in how many are switched on.
"""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass
from typing import Any

from nbos_cluster.records import Device

SMS_PER_TPC = 2
"""On every NVIDIA data-centre chip from Pascal to Blackwell."""

_CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16


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
        sms = _sms_by_uuid()
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
    """SMs by device UUID (without `GPU-`), from the CUDA driver: NVML itself has no call for the number of SMs.

    cuInit and cuDeviceGetAttribute make no context. Matched by UUID since CUDA's order of devices is not NVML's.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    if cuda.cuInit(0) != 0:
        return {}
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return {}
    found: dict[str, int] = {}
    for ordinal in range(count.value):
        device, sms, uuid = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
        failed = (
            cuda.cuDeviceGet(ctypes.byref(device), ordinal)
            or cuda.cuDeviceGetUuid(uuid, device)
            or cuda.cuDeviceGetAttribute(ctypes.byref(sms), _CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device)
        )
        if not failed:
            found[_uuid_text(bytes(uuid))] = sms.value
    return found


def _uuid_text(raw: bytes) -> str:
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
