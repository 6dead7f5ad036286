"""Work for a simulated GPU: a cell with a simulated grant takes as long as the model says, on the TPCs it was granted.

    %%gpu tpcs=32 mem=20G
    from nbos_kernel import simgpu
    simgpu.run(work=64, serial=0.5)           # 64 TPC-seconds that spread over TPCs, 0.5 s that do not: 2.5 s on 32
    weights = simgpu.allocate("4G")           # raises simgpu.OutOfMemory beyond the grant's memory
    simgpu.copy("4G")                         # host to device, 50 GB/s
    for _ in simgpu.steps(100, work=0.6):     # 100 steps of an optimizer, as right-sizing counts them
        ...
    weights.free()
    simgpu.fault("an illegal memory access")  # what is called next raises simgpu.DeviceFault, until the next cell

No GPU and no data: it is for trying, showing and testing the daemon's policies (slices, queues, right-sizing) without
hardware. Durations follow l(t) = m/t + b (`nbos_cluster.simdevice`); the cell sleeps, and can be interrupted. What is
allocated stays on the device until it is freed or its name is gone, as a tensor does; when somebody else needs the room
it goes to host memory, and comes back before the next cell's first line, both at the model's bandwidth.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nbos_cluster.simdevice import Device, DeviceFault, Failed, Kernel, OutOfMemory
from nbos_cluster.simdevice.parameters import PCIE5_BANDWIDTH

from . import binding, resources
from .capture import devicedata
from .gpu.gate import gate
from .pace import pace

__all__ = ["Allocation", "DeviceFault", "NoSimulatedGrant", "OutOfMemory", "allocate", "copy", "fault", "run", "steps"]

_ME = "this cell"


class NoSimulatedGrant(RuntimeError):
    """The cell holds no simulated GPU; says what it holds."""


@dataclass
class _Played:
    """The slice of the grant that runs now, as a device of its own: slices do not feel each other in the model."""

    grant: str
    device: Device
    began: float
    touched: bool = False
    """The device is being changed: who looks between two lines must not."""

    @property
    def now(self) -> float:
        return time.monotonic() - self.began


_played: _Played | None = None


@dataclass(eq=False)
class Allocation:
    """Bytes of device memory. where: UUID of the device they are on, '' in host memory."""

    size: int
    where: str = ""
    _device: Device | None = field(default=None, repr=False)

    def free(self) -> None:
        if self.size and self._device is not None:
            self._device.free(_ME, self.size)
        self.size, self._device = 0, None

    def __del__(self) -> None:
        self.free()

    def __reduce__(self) -> Any:
        devicedata.note()
        return _arrived, (self.size,)  # elsewhere it is in host memory, until a cell there gets a device


_refs: dict[int, weakref.ref[Allocation]] = {}


def _known(allocation: Allocation) -> Allocation:
    key = id(allocation)
    _refs[key] = weakref.ref(allocation, lambda _: _refs.pop(key, None))
    return allocation


def _living() -> list[Allocation]:
    """Any thread may ask."""
    return [one for ref in list(_refs.values()) if (one := ref()) is not None and one.size]


def _arrived(size: int) -> Allocation:
    devicedata.note()
    return _known(Allocation(size))


# -- what stays after a cell ------------------------------------------------------------------------------------------


def left() -> dict[str, int]:
    """Bytes on each simulated device."""
    found: dict[str, int] = {}
    for one in _living():
        if one.where:
            found[one.where] = found.get(one.where, 0) + one.size
    return found


def away() -> int:
    """Bytes in host memory, or on another device than the next grant may name: they move before the next cell."""
    return sum(one.size for one in _living() if not one.where)


def offload() -> int:
    """Move everything to host memory; how many bytes that were."""
    return _move([one for one in _living() if one.where], "")


def bring_home(granted: binding.Grant) -> None:
    """A cell was granted a simulated device: what is elsewhere moves there."""
    uuid = granted.devices[0]
    _move([one for one in _living() if one.where not in granted.devices], uuid)


def _move(some: list[Allocation], to: str) -> int:
    size = sum(one.size for one in some)
    time.sleep(size / PCIE5_BANDWIDTH)
    for one in some:
        one.where, one._device = to, None
    return size


def run(work: float, serial: float = 0.0, width: int = 0, sensitivity: float = 1.0) -> float:
    """Run a kernel of `work` TPC-seconds plus `serial` seconds, which fills at most `width` TPCs (0: any number), and
    loses `sensitivity` times what the clock loses.

    Returns the seconds it took by the model. Raises NoSimulatedGrant or DeviceFault.
    """
    played = _current()
    kernel = Kernel(work, serial, width, sensitivity)
    with _touching(played):
        played.device.advance(max(played.now, played.device.now))
        played.device.launch(_ME, kernel, tag := object())
    return _wait(played, tag)


def copy(size: int | str) -> float:
    """Move `size` bytes (or `"4G"`) between host and device. Returns the seconds by the model."""
    played, count = _current(), _bytes(size)
    with _touching(played):
        played.device.advance(max(played.now, played.device.now))
        played.device.copy(_ME, count, tag := object())
    return _wait(played, tag)


def steps(count: int, work: float, serial: float = 0.0, width: int = 0, sensitivity: float = 1.0) -> Iterator[int]:
    """`count` training steps of one kernel each: each yields its number when it is over, and counts as a step."""
    for number in range(count):
        run(work, serial, width, sensitivity)
        pace.step()
        yield number


def allocate(size: int | str) -> Allocation:
    """Raises OutOfMemory beyond what the grant has left."""
    played, wanted = _current(), _bytes(size)
    held = binding.grant()
    assert held is not None
    played.device.allocate(_ME, wanted)
    return _known(Allocation(wanted, held.devices[0], played.device))


def fault(reason: str) -> None:
    """Break the device for this cell."""
    _current().device.fault(reason, _ME)


def _current() -> _Played:
    """The device of the running cell's grant. Raises NoSimulatedGrant."""
    global _played
    held = binding.grant()
    if held is None:
        gate.touch("a simulated GPU is used")
        held = binding.grant()
    if held is None:
        raise NoSimulatedGrant("this cell holds no GPU; begin it with `%%gpu tpcs=16`, or another number of TPCs")
    if not held.simulated:
        raise NoSimulatedGrant(f"this cell holds a real GPU ({', '.join(held.devices)}); use it as you always do")
    if _played is None or _played.grant != held.id:
        here = [one for one in _living() if one.where in held.devices]
        size = sum(one.size for one in here)
        # One device as large as the granted ones together; of a slice, as large as what it is of.
        total = max(held.tpcs, *(share.of for share in held.shares), *(t + 1 for t in held.shares[0].tpcs))
        device = Device(total, max(held.memory, 1), clock=min(share.clock for share in held.shares))
        device.open(_ME, frozenset(held.shares[0].tpcs) if len(held.shares) == 1 else None, used=size)
        for one in here:
            one._device = device
        _played = _Played(held.id, device, time.monotonic())
    return _played


# -- while what is lent to the cell comes and goes (`borrowed`) -------------------------------------------------------


@contextmanager
def _touching(played: _Played) -> Iterator[None]:
    played.touched = True
    try:
        yield
    finally:
        played.touched = False


def busy() -> bool:
    """Whether this line is in the middle of a change of the device."""
    return _played is not None and _played.touched


def settle() -> None:
    """Wait until what was launched is over. Its outcome is left to who launched it."""
    played, held = _played, binding.grant()
    if played is not None and held is not None and played.grant == held.id and played.device.pending(_ME):
        time.sleep(max(0.0, played.device.next_at() - played.now))


def moved() -> None:
    """The cell's slice is another one: what is launched from now on runs there."""
    held = binding.grant()
    if _played is not None and held is not None and _played.grant == held.id:
        _played.device.confine(_ME, frozenset(held.shares[0].tpcs))


def _wait(played: _Played, tag: object) -> float:
    """Sleep until what was launched as `tag` is over, and what stands before it, such as a kernel whose wait was
    interrupted."""
    device, began = played.device, played.device.now
    while True:
        end = device.next_at()
        time.sleep(max(0.0, end - played.now))
        with _touching(played):
            outcomes = device.advance(end)
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                raise DeviceFault(f"simulated device: {outcome.reason}")
            if outcome.tag is tag:
                return end - began


def _bytes(size: int | str) -> int:
    return resources.size(size) if isinstance(size, str) else size
