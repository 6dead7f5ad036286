"""What this process has on its devices, as the daemon is told it, and giving it back between cells.

Guarantees: nothing here starts CUDA or imports torch, and telling asks the driver nothing, so that it can be told while
the driver is stopped for this process. Torch counts what its allocator has reserved; what other libraries have, only
NVML knows (the daemon looks there).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from ..capture import parked
from . import offload

_uuids: list[str] = []
"""UUIDs of the devices that CUDA started with in this process, in torch's order."""


@dataclass(frozen=True)
class Told:
    """left: bytes by device, with a 0 for each device that this process could use without a restart. peak: at most
    since the cell's begin."""

    left: dict[str, int]
    peak: dict[str, int]


def know(uuids: list[str]) -> None:
    """CUDA has started in this process, on these devices."""
    _uuids[:] = uuids


def moved(old: str, new: str) -> None:
    """The driver restored what was on `old` on another device, and what was on that on `old`."""
    swapped = {old: new, new: old}
    _uuids[:] = [swapped.get(uuid, uuid) for uuid in _uuids]


def tell(torch: Any) -> Told:
    """torch: None where it has not started CUDA."""
    left, peak = dict[str, int](), dict[str, int]()
    if torch is not None:
        for number, uuid in enumerate(_uuids):
            left[uuid], peak[uuid] = _counted(torch.cuda, "memory_reserved", number), 0
            peak[uuid] = max(left[uuid], _counted(torch.cuda, "max_memory_reserved", number))
    for uuid, size in (played.left() if (played := _simulated()) else {}).items():
        left[uuid] = left.get(uuid, 0) + size
    return Told(left, peak)


def away() -> int:
    """Bytes in host memory that come to one device (of several: the one that gets most) before the next cell."""
    waiting = max(parked.bytes_by_home().values(), default=0) if parked.anything() else 0
    return waiting + (played.away() if (played := _simulated()) else 0)


def give_back(torch: Any) -> dict[str, Any]:
    """Move tensors to host memory. What came of it, for the daemon: left, away, moved (bytes), stays (why, or '')."""
    began, moved, stays = time.monotonic(), 0, ""
    if torch is not None:
        try:
            done = offload.release(torch)
            moved, stays = done.bytes, "; ".join(done.left)
        except RuntimeError as err:
            stays = f"torch could not copy it: {err}"[:300]
    if (played := _simulated()) is not None:
        moved += played.offload()
    left = tell(torch).left
    if any(left.values()) and not stays:
        stays = "torch keeps it, though no tensor of the notebook lies there"
    seconds = round(time.monotonic() - began, 3)
    return {"left": left, "away": away(), "moved": moved, "stays": stays, "seconds": seconds}


def _counted(cuda: Any, what: str, number: int) -> int:
    try:
        return int(getattr(cuda, what)(number))
    except (AttributeError, RuntimeError):  # an allocator of the user's own keeps no count
        return 0


def _simulated() -> Any:
    return sys.modules.get("nbos_kernel.simgpu")
