"""A GPU that is played, by a stated model: `Device` is a discrete-event machine, and whoever uses it brings the time.

Kernels take m/t + b seconds on t TPCs, memory is allocated and runs out, copies share a bandwidth, faults come on
command. The same model stands behind the benchmarks of the policies and behind a user's cell on a simulated grant
(`nbos_kernel.simgpu`). Standard library only: it is imported inside replicas.
"""

from .cost import Kernel
from .device import Device, DeviceFault, Done, Failed, OutOfMemory
from .sharing import EqualShares, Sharing, Slices, TimeSlices

__all__ = [
    "Device",
    "DeviceFault",
    "Done",
    "EqualShares",
    "Failed",
    "Kernel",
    "OutOfMemory",
    "Sharing",
    "Slices",
    "TimeSlices",
]
