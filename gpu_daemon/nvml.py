"""Asking NVML (through nvidia-ml-py) so that no question can end the daemon: an answer, or why there is none.

What a device, a driver or our user cannot tell comes back as `Untold` with the reason ('not supported', …); only two
things are raised: `DeviceLost` (this device does not answer any more) and `NVMLGone` (nothing does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Untold:
    """There is no answer: why, in words for people."""

    why: str

    def __bool__(self) -> bool:
        return False


class DeviceLost(Exception):
    """NVML does not reach the device any more; a reset may help."""


class NVMLGone(Exception):
    """NVML does not work (any more): the driver was unloaded, replaced or never there."""


_LOST = ("NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_RESET_REQUIRED", "NVML_ERROR_GPU_NOT_FOUND")
_GONE = ("NVML_ERROR_UNINITIALIZED", "NVML_ERROR_DRIVER_NOT_LOADED", "NVML_ERROR_LIB_RM_VERSION_MISMATCH")
_WORDS = {
    "NVML_ERROR_NOT_SUPPORTED": "not supported",
    "NVML_ERROR_FUNCTION_NOT_FOUND": "not supported by this driver (too old)",
    "NVML_ERROR_NO_PERMISSION": "no permission",
}
NOT_SUPPORTED = _WORDS["NVML_ERROR_NOT_SUPPORTED"]


class NVML:
    """The module pynvml, asked carefully. Any thread may ask; NVML itself is safe for that."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._lost = self._codes(_LOST)
        self._gone = self._codes(_GONE)
        self._words = {getattr(module, name): words for name, words in _WORDS.items() if hasattr(module, name)}

    def _codes(self, names: tuple[str, ...]) -> frozenset[int]:
        return frozenset(getattr(self.module, name) for name in names if hasattr(self.module, name))

    def start(self) -> None:
        """Raises NVMLGone. Every start wants a `stop`."""
        try:
            self.module.nvmlInit()
        except self.module.NVMLError as err:
            raise NVMLGone(str(err)) from err

    def stop(self) -> None:
        self.ask("nvmlShutdown", gone=False)

    def ask(self, call: str, *args: Any, gone: bool = True) -> Any:
        """The answer of the function `call`, or Untold. Raises DeviceLost and (unless `gone` is false) NVMLGone."""
        function = getattr(self.module, call, None)
        if function is None:
            return Untold(f"not known to this nvidia-ml-py ({call})")
        try:
            return function(*args)
        except self.module.NVMLError as err:
            return self._refused(err, gone)

    def _refused(self, err: Any, gone: bool) -> Untold:
        if err.value in self._lost:
            raise DeviceLost(str(err)) from err
        if gone and err.value in self._gone:
            raise NVMLGone(str(err)) from err
        return Untold(self._words.get(err.value, str(err)))

    def handle(self, uuid: str) -> Any:
        """The device's handle. Raises DeviceLost, also when NVML does not list it any more, and NVMLGone."""
        found = self.ask("nvmlDeviceGetHandleByUUID", uuid)
        if isinstance(found, Untold):
            raise DeviceLost(f"NVML does not find it: {found.why}")
        return found


def text(value: Any) -> str:
    """NVML's texts are bytes in some releases of the bindings."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
