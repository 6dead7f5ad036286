"""Where a cell that holds no GPU is stopped when it first uses one: it asks for its grant there, and goes on with it.

While the gate is armed (a cell runs that may get a GPU, and has none yet) these lead to `touch`:
- torch's own start of CUDA (`torch.cuda._lazy_init`), which everything in `torch.cuda` begins with, and every tensor
  that is made on, or moved to, a device. Where an earlier cell has started CUDA in this process, torch's C++ no longer
  asks for that start; it is told to ask once more (`set_requires_device_init`, which torch itself uses after a fork).
  So a cell that never touches a device pays nothing, and neither does one after its first touch;
- the import of a library that calls CUDA by itself (LIBRARIES);
- `nbos_kernel.simgpu`.
`torch.cuda.is_available()` and `device_count()` are questions and no use: they answer what the cell would get.

Not caught: C code that calls libcuda itself, `torch.cuda.Stream()` before anything else of torch.cuda, and kernels on
device data of a cell before that no variable holds (a module's global). Where CUDA has not started such code sees no
device; else the daemon's watchdog sees it.

torch's functions keep their identity (their code is exchanged, and put back): others have imported them by name, and
torch.compile knows them. A forked child is not stopped: it holds no claim, and sees no device.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import logging
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LIBRARIES = ("cupy", "numba.cuda", "jax", "tensorflow", "cudf", "rmm", "pycuda", "warp", "paddle", "tensorrt")
"""What calls CUDA by itself."""

AGAIN = "_ZN5torch5utils24set_requires_device_initEN3c1010DeviceTypeEb"
CUDA = 1
"""c10::DeviceType::CUDA."""

Ask = Callable[[str], None]


def _lazy_init() -> None:
    from nbos_kernel.gpu import gate

    gate.gate.lazy_init()


def _is_available() -> bool:
    from nbos_kernel.gpu import gate

    return gate.gate.is_available()


def _device_count() -> int:
    from nbos_kernel.gpu import gate

    return gate.gate.device_count()


_EXCHANGED = {"_lazy_init": _lazy_init, "is_available": _is_available, "device_count": _device_count}


class Gate:
    """One a process. Any thread may touch; those that do while another one asks wait for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._ask: Ask | None = None
        self._asking = False
        self._devices = 0
        self._real = False
        self._before: dict[str, tuple[types.FunctionType, types.CodeType]] = {}
        self._original: dict[str, Callable[[], Any]] = {}
        self._finder = _Finder(self)
        self._forgets = False

    @property
    def armed(self) -> bool:
        return self._ask is not None

    def arm(self, ask: Ask, devices: int, real: bool) -> None:
        """From now on `ask(why)` is called, once, by whatever first needs a GPU. It returns when this process is bound
        to the grant, or raises. devices: how many the cell would get; real: not simulated ones."""
        if not self._forgets:
            self._forgets = True
            os.register_at_fork(after_in_child=self._forked)
        self._ask, self._devices, self._real = ask, devices, real
        if real:
            sys.meta_path.insert(0, self._finder)
            self.imported(sys.modules.get("torch.cuda"))

    def disarm(self) -> None:
        """Everything is as it was. Waits for nobody: a thread that asks just now is answered by who asks."""
        self._ask = None
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._put_back()

    def touch(self, why: str) -> None:
        """A GPU is needed now. Returns at once where nothing is armed."""
        if self._ask is None:
            return
        with self._lock:
            ask = self._ask
            if ask is None or self._asking:  # the latter: binding the grant uses torch itself
                return
            self._asking = True
            try:
                ask(why)
                self.disarm()
            finally:
                self._asking = False

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What this thread does within uses the device on NBOS's behalf, such as giving it back: it is not stopped."""
        with self._lock:
            before, self._asking = self._asking, True
            try:
                yield
            finally:
                self._asking = before
                cuda = sys.modules.get("torch.cuda")
                if self.armed and not before and self._before and cuda is not None and cuda.is_initialized():
                    _ask_again(True)

    # -- torch --------------------------------------------------------------------------------------------------------

    def imported(self, cuda: Any) -> None:
        """torch.cuda is there."""
        if self._ask is None or cuda is None or self._before:
            return
        for name, ours in _EXCHANGED.items():
            function = getattr(cuda, name, None)
            if isinstance(function, types.FunctionType) and not function.__closure__:
                self._exchange(name, function, ours)
        if "_lazy_init" in self._before and cuda.is_initialized():
            _ask_again(True)

    def _exchange(self, name: str, function: types.FunctionType, ours: Callable[[], Any]) -> None:
        code = function.__code__
        self._original[name] = types.FunctionType(code, function.__globals__, name, function.__defaults__)
        self._before[name] = function, code
        function.__code__ = ours.__code__

    def _put_back(self) -> None:
        if not self._before:
            return
        for function, code in self._before.values():
            function.__code__ = code
        self._before.clear()
        cuda = sys.modules.get("torch.cuda")
        if cuda is not None and cuda.is_initialized():
            _ask_again(False)

    def lazy_init(self) -> None:
        self.touch("torch uses CUDA")
        self._original["_lazy_init"]()

    def is_available(self) -> bool:
        started = sys.modules["torch.cuda"].is_initialized()
        if self._ask is None or started or self._asking:
            return bool(self._original["is_available"]())
        return self._devices > 0 and _compiled()

    def device_count(self) -> int:
        started = sys.modules["torch.cuda"].is_initialized()
        if self._ask is None or started or self._asking:
            return int(self._original["device_count"]())
        return self._devices if _compiled() else 0

    def _forked(self) -> None:
        self._lock = threading.RLock()  # the parent's may be held by a thread that is not here
        self._asking = False
        self.disarm()


def _compiled() -> bool:
    """Whether this torch can use CUDA at all."""
    cuda = sys.modules["torch.cuda"]
    compiled = getattr(cuda, "_is_compiled", None)
    return bool(compiled()) if compiled is not None else True


def _ask_again(required: bool) -> None:
    """Whether torch's C++ calls `torch.cuda._lazy_init` before it uses CUDA the next time, or thinks that it has."""
    torch = sys.modules["torch"]
    folder = os.path.join(os.path.dirname(getattr(torch, "__file__", "") or ""), "lib")
    try:
        library = ctypes.PyDLL(os.path.join(folder, "libtorch_python.so"))
        call = getattr(library, AGAIN)
    except (OSError, AttributeError) as err:
        logging.getLogger(__name__).warning(
            "NBOS: this torch cannot be told to ask again before it uses CUDA (%s): a cell that has no GPU and puts "
            "tensors on one is not stopped, and seen by the watchdog only; begin it with %%%%gpu",
            err,
        )
        return
    call.argtypes, call.restype = (ctypes.c_int8, ctypes.c_bool), None
    call(CUDA, required)


class _Finder(importlib.abc.MetaPathFinder):
    """Notices the import of what calls CUDA by itself."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in LIBRARIES and importlib.machinery.PathFinder.find_spec(fullname, path) is not None:
            self._gate.touch(f"{fullname} is imported, which uses CUDA by itself")
        return None


gate = Gate()
