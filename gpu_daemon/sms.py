"""How many SMs each GPU has, from the CUDA driver, as JSON by UUID: a program of its own (`python -I -S sms.py`).

NVML has no call for that, and cuInit leaves device files open and 4 MiB allocated for as long as its process lives:
so a short one asks. It makes no CUDA context, and imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import json

_MULTIPROCESSOR_COUNT = 16
"""CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT."""


def sms_by_uuid() -> dict[str, int]:
    """SMs by UUID (without `GPU-`). Matched by UUID since CUDA's order of devices is not NVML's."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return {}
    found: dict[str, int] = {}
    for ordinal in range(count.value):
        device, sms, uuid = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
        failed = (
            cuda.cuDeviceGet(ctypes.byref(device), ordinal)
            or cuda.cuDeviceGetUuid(uuid, device)
            or cuda.cuDeviceGetAttribute(ctypes.byref(sms), _MULTIPROCESSOR_COUNT, device)
        )
        if not failed:
            found[_text(bytes(uuid))] = sms.value
    return found


def _text(raw: bytes) -> str:
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


if __name__ == "__main__":
    print(json.dumps(sms_by_uuid()))
