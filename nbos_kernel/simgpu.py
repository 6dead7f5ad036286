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
hardware. Durations follow l(t) = m/t + b (`nbos_cluster.simdevice`); the cell sleeps, and can be interrupted. Memory is
given back at the end of the cell.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from nbos_cluster.simdevice import Device, DeviceFault, Failed, Kernel, OutOfMemory

from . import binding, resources
from .pace import pace

__all__ = ["Allocation", "DeviceFault", "NoSimulatedGrant", "OutOfMemory", "allocate", "copy", "fault", "run", "steps"]

_ME = "this cell"


class NoSimulatedGrant(RuntimeError):
    """The cell holds no simulated GPU; says what it holds."""


@dataclass
class _Played:
    """The slice of the grant that runs now, as a device of its own: slices do not feel each other in the model."""

    grant: binding.Grant
    device: Device
    began: float

    @property
    def now(self) -> float:
        return time.monotonic() - self.began


_played: _Played | None = None


@dataclass
class Allocation:
    """Bytes of device memory."""

    size: int
    _device: Device

    def free(self) -> None:
        if self.size:
            self._device.free(_ME, self.size)
            self.size = 0


def run(work: float, serial: float = 0.0, width: int = 0) -> float:
    """Run a kernel of `work` TPC-seconds plus `serial` seconds, which fills at most `width` TPCs (0: any number).

    Returns the seconds it took by the model. Raises NoSimulatedGrant or DeviceFault.
    """
    played = _current()
    kernel = Kernel(work, serial, width)
    played.device.advance(max(played.now, played.device.now))
    played.device.launch(_ME, kernel, tag := object())
    return _wait(played, tag)


def copy(size: int | str) -> float:
    """Move `size` bytes (or `"4G"`) between host and device. Returns the seconds by the model."""
    played = _current()
    played.device.advance(max(played.now, played.device.now))
    played.device.copy(_ME, _bytes(size), tag := object())
    return _wait(played, tag)


def steps(count: int, work: float, serial: float = 0.0, width: int = 0) -> Iterator[int]:
    """`count` training steps of one kernel each: each yields its number when it is over, and counts as a step."""
    for number in range(count):
        run(work, serial, width)
        pace.step()
        yield number


def allocate(size: int | str) -> Allocation:
    """Raises OutOfMemory beyond what the grant has left."""
    device, wanted = _current().device, _bytes(size)
    device.allocate(_ME, wanted)
    return Allocation(wanted, device)


def fault(reason: str) -> None:
    """Break the device for this cell."""
    _current().device.fault(reason, _ME)


def _current() -> _Played:
    """The device of the running cell's grant. Raises NoSimulatedGrant."""
    global _played
    held = binding.grant()
    if held is None:
        raise NoSimulatedGrant("this cell holds no GPU; begin it with `%%gpu tpcs=16`, or another number of TPCs")
    if not held.simulated:
        raise NoSimulatedGrant(f"this cell holds a real GPU ({', '.join(held.devices)}); use it as you always do")
    if _played is None or _played.grant is not held:
        device = Device(max(held.tpcs, 1), max(held.memory, 1))
        device.open(_ME)
        _played = _Played(held, device, time.monotonic())
    return _played


def _wait(played: _Played, tag: object) -> float:
    """Sleep until what was launched as `tag` is over, and what stands before it, such as a kernel whose wait was
    interrupted."""
    device, began = played.device, played.device.now
    while True:
        end = device.next_at()
        time.sleep(max(0.0, end - played.now))
        for outcome in device.advance(end):
            if isinstance(outcome, Failed):
                raise DeviceFault(f"simulated device: {outcome.reason}")
            if outcome.tag is tag:
                return end - began


def _bytes(size: int | str) -> int:
    return resources.size(size) if isinstance(size, str) else size
