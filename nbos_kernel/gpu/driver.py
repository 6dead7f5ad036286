"""The calls of libcuda that slices need, typed. Nothing is decided here.

Through ctypes: these are a dozen calls with a stable ABI, and the binding package for them (cuda-bindings) would add
31 MB to every kernel image. Raises `NoDriver` where the library or a call is missing, `CallFailed` for what it refuses.
No call here makes a context of its own, besides `green_context`.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from typing import Any

from .errors import CallFailed, NoDriver

LIBRARY = "libcuda.so.1"
NEEDED = (550, "12.4")
"""The driver, and its CUDA version, that brought green contexts."""

SM = 1
"""CU_DEV_RESOURCE_TYPE_SM."""
SPLIT_IGNORE_COSCHEDULING = 1
GREEN_DEFAULT_STREAM = 1
STREAM_NON_BLOCKING = 1


class Resource(ctypes.Structure):
    """CUdevResource: opaque but for its type and, when that is SM, the three numbers of CUdevSmResource."""

    _fields_ = (
        ("type", c_int),
        ("_padding", ctypes.c_ubyte * 92),
        ("sm_count", c_uint),
        ("min_partition", c_uint),
        ("alignment", c_uint),
        ("_oversize", ctypes.c_ubyte * 36),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetDevResource": (c_int, POINTER(Resource), c_int),
    "cuDevSmResourceSplitByCount": (
        POINTER(Resource),
        POINTER(c_uint),
        POINTER(Resource),
        POINTER(Resource),
        c_uint,
        c_uint,
    ),
    "cuDevResourceGenerateDesc": (POINTER(c_void_p), POINTER(Resource), c_uint),
    "cuGreenCtxCreate": (POINTER(c_void_p), c_void_p, c_int, c_uint),
    "cuGreenCtxDestroy": (c_void_p,),
    "cuGreenCtxGetDevResource": (c_void_p, POINTER(Resource), c_int),
    "cuGreenCtxStreamCreate": (POINTER(c_void_p), c_void_p, c_uint, c_int),
}


class Driver:
    """The driver of this process, initialised."""

    def __init__(self, library: Any = None) -> None:
        self._library = library if library is not None else _open()
        self._calls = {name: self._bound(name, types) for name, types in _SIGNATURES.items()}
        self._call("cuInit", 0)

    def _bound(self, name: str, types: tuple[Any, ...]) -> Any:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise NoDriver(
                f"the NVIDIA driver (CUDA {_version(self._library)}) has no {name}; slices need driver {NEEDED[0]} "
                f"(CUDA {NEEDED[1]}) or newer"
            ) from None
        function.argtypes, function.restype = types, c_int
        return function

    def _call(self, name: str, *args: Any) -> None:
        code = self._calls[name](*args)
        if code:
            text = c_char_p()
            self._calls["cuGetErrorName"](code, byref(text))
            raise CallFailed(name, code, (text.value or b"").decode())

    def version(self) -> int:
        """CUDA's version that the driver speaks, such as 13000 for 13.0."""
        number = c_int()
        self._call("cuDriverGetVersion", byref(number))
        return number.value

    def device(self, ordinal: int) -> int:
        """The device that this process counts as `ordinal`."""
        device = c_int()
        self._call("cuDeviceGet", byref(device), ordinal)
        return device.value

    def device_sms(self, device: int) -> Resource:
        """All SMs of a device that this process may use (under an MPS limit, those)."""
        resource = Resource()
        self._call("cuDeviceGetDevResource", device, byref(resource), SM)
        return resource

    def split(self, resource: Resource, least: int) -> list[Resource]:
        """Groups of at least `least` SMs each, in the driver's order, the remainder (when there is one) last.

        Co-scheduling in clusters is ignored for the sake of the grain. Groups of two different splits must not be put
        together: split once.
        """
        name, count, whole = "cuDevSmResourceSplitByCount", c_uint(), byref(resource)
        self._call(name, None, byref(count), whole, None, SPLIT_IGNORE_COSCHEDULING, least)
        groups, rest = (Resource * count.value)(), Resource()
        self._call(name, groups, byref(count), whole, byref(rest), SPLIT_IGNORE_COSCHEDULING, least)
        found = list(groups[: count.value])
        return [*found, rest] if rest.type == SM and rest.sm_count else found

    def green_context(self, device: int, groups: list[Resource]) -> int:
        """A green context with the SMs of these groups (of one split); its handle."""
        array, description, context = (Resource * len(groups))(*groups), c_void_p(), c_void_p()
        self._call("cuDevResourceGenerateDesc", byref(description), array, len(groups))
        self._call("cuGreenCtxCreate", byref(context), description, device, GREEN_DEFAULT_STREAM)
        assert context.value is not None
        return context.value

    def green_sms(self, context: int) -> int:
        """How many SMs the driver gave a green context."""
        resource = Resource()
        self._call("cuGreenCtxGetDevResource", context, byref(resource), SM)
        return resource.sm_count

    def green_stream(self, context: int) -> int:
        """A stream whose kernels run on the green context's SMs only; its handle."""
        stream = c_void_p()
        self._call("cuGreenCtxStreamCreate", byref(stream), context, STREAM_NON_BLOCKING, 0)
        assert stream.value is not None
        return stream.value

    def destroy_green_context(self, context: int) -> None:
        """Nothing may run on its streams any more."""
        self._call("cuGreenCtxDestroy", context)


def _open() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as err:
        raise NoDriver(
            f"{LIBRARY} cannot be loaded here ({err}); the host needs the NVIDIA driver, its containers the NVIDIA "
            "container toolkit"
        ) from err


def _version(library: Any) -> str:
    number = c_int()
    try:
        failed = library.cuDriverGetVersion(byref(number))
    except AttributeError:
        return "of unknown version"
    return "of unknown version" if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"
