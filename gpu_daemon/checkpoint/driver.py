"""The calls of libcuda that checkpoint another process, typed. Nothing is decided here. Through ctypes, as
`nbos_kernel.gpu.driver`, and for the same reasons.

Raises `Refused` for what the driver refuses, `TooOld` where the library or a call is missing. `cuInit` takes seconds
and every call may hang with the driver: for `helper`, a process of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_uint64, c_void_p
from typing import Any, Literal

LIBRARY = "libcuda.so.1"
NEEDED = "driver 570 (CUDA 12.8)"
REMAPS = 13000
"""The version of CUDA whose driver restores onto another GPU."""

State = Literal["running", "locked", "checkpointed", "failed"]
STATES: tuple[State, ...] = ("running", "locked", "checkpointed", "failed")

WORDS = {
    1: "it is no process that uses CUDA, or has ended",
    2: "the device has no memory left for it",
    401: "it is in another state than this needs",
    600: "it did not come to rest in time",
    800: "the daemon is not permitted to: run it as the user that replicas run as, or with CAP_SYS_PTRACE",
    801: "not supported for this process: managed memory, MIG, or memory that it shares with another process",
    805: "the MPS daemon does not answer",
    999: "the device does not answer any more",
}
"""What CUresults mean for these calls."""


class TooOld(Exception):
    """There is no driver here that can; says why."""


class Refused(Exception):
    """code: the CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        words = WORDS.get(code)
        super().__init__(f"{call}: {name or f'CUDA error {code}'}" + (f" ({words})" if words else ""))
        self.code = code


class LockArgs(ctypes.Structure):
    _fields_ = (("timeout_ms", c_uint), ("_reserved0", c_uint), ("_reserved1", c_uint64 * 7))


class GpuPair(ctypes.Structure):
    _fields_ = (("old", ctypes.c_ubyte * 16), ("new", ctypes.c_ubyte * 16))


class RestoreArgs(ctypes.Structure):
    _fields_ = (
        ("pairs", POINTER(GpuPair)),
        ("count", c_uint),
        ("_reserved", ctypes.c_char * (52 - ctypes.sizeof(c_void_p))),
        ("_reserved1", c_uint64),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuCheckpointProcessGetState": (c_int, POINTER(c_int)),
    "cuCheckpointProcessLock": (c_int, POINTER(LockArgs)),
    "cuCheckpointProcessCheckpoint": (c_int, c_void_p),
    "cuCheckpointProcessRestore": (c_int, POINTER(RestoreArgs)),
    "cuCheckpointProcessUnlock": (c_int, c_void_p),
}


class Driver:
    """Initialised. Its calls may be made from several threads."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as err:
            raise TooOld(f"{LIBRARY} cannot be loaded ({err})") from err
        self._calls = {name: self._bound(name, types) for name, types in _SIGNATURES.items()}
        self._call("cuInit", 0)

    def _bound(self, name: str, types: tuple[Any, ...]) -> Any:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise TooOld(f"the NVIDIA driver has no {name}; checkpoints need {NEEDED} or newer") from None
        function.argtypes, function.restype = types, c_int
        return function

    def _call(self, name: str, *args: Any) -> None:
        code = self._calls[name](*args)
        if code:
            text = c_char_p()
            self._calls["cuGetErrorName"](code, byref(text))
            raise Refused(name, code, (text.value or b"").decode())

    def version(self) -> int:
        """CUDA's version that the driver speaks, such as 13000 for 13.0."""
        number = c_int()
        self._call("cuDriverGetVersion", byref(number))
        return number.value

    def state(self, pid: int) -> State:
        number = c_int()
        self._call("cuCheckpointProcessGetState", pid, byref(number))
        return STATES[number.value] if 0 <= number.value < len(STATES) else "failed"

    def lock(self, pid: int, timeout_ms: int) -> None:
        """Its CUDA calls block from now on. Waits for what it has launched, no longer than `timeout_ms`."""
        args = LockArgs(timeout_ms=timeout_ms)
        self._call("cuCheckpointProcessLock", pid, byref(args))

    def checkpoint(self, pid: int) -> None:
        """A locked process's device memory goes to its host memory; it has nothing on a device then."""
        self._call("cuCheckpointProcessCheckpoint", pid, None)

    def restore(self, pid: int, pairs: Sequence[tuple[str, str]] = ()) -> None:
        """Back onto the devices; it is locked then. pairs: for each GPU of the host the one that it becomes."""
        made = (GpuPair * len(pairs))(*(GpuPair(_raw(old), _raw(new)) for old, new in pairs))
        args = RestoreArgs(pairs=made if pairs else None, count=len(pairs))
        self._call("cuCheckpointProcessRestore", pid, byref(args))

    def unlock(self, pid: int) -> None:
        self._call("cuCheckpointProcessUnlock", pid, None)


def _raw(uuid: str) -> Any:
    """`GPU-…` as the driver has it. Raises ValueError for what is no GPU's UUID."""
    raw = bytes.fromhex(uuid.removeprefix("GPU-").replace("-", ""))
    return (ctypes.c_ubyte * 16)(*raw.ljust(16, b"\0")[:16])
