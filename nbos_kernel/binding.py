"""What GPUs this execution holds: `nbos_kernel.grant()` for user code, and binding the grant in this process.

Binding: while CUDA has not started in this process, CUDA_VISIBLE_DEVICES names exactly the granted devices (none
without a grant). Once torch has started CUDA the variable has no effect any more; then the current device is
chosen among those that were visible at that time, and a grant on another device is reported to the user instead
of silently using the wrong one. A slice's share of the memory is bound with torch's own limit.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .capture import parked

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Share:
    """The part of one device: its uuid, index on the host, model, TPC numbers, bytes of device memory."""

    uuid: str
    index: int
    model: str
    tpcs: tuple[int, ...]
    memory: int
    whole: bool
    simulated: bool


@dataclass(frozen=True)
class Grant:
    """What the running cell may use of this host's GPUs; it ends with the cell."""

    id: str
    host: str
    n: int
    shares: tuple[Share, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """UUIDs of the granted devices, in the order CUDA numbers them in this process."""
        return tuple(share.uuid for share in self.shares)

    @property
    def tpcs(self) -> int:
        """TPCs granted, over all devices (1 TPC = 2 SMs)."""
        return sum(len(share.tpcs) for share in self.shares)

    @property
    def memory(self) -> int:
        """Bytes of device memory granted, over all devices."""
        return sum(share.memory for share in self.shares)

    @property
    def whole(self) -> bool:
        return all(share.whole for share in self.shares)

    @property
    def simulated(self) -> bool:
        """True where no real GPU stands behind the grant: the cell runs on the CPU."""
        return any(share.simulated for share in self.shares)


_current: Grant | None = None


def grant() -> Grant | None:
    """The GPUs that the running cell holds, None for a CPU cell and between cells."""
    return _current


def from_wire(raw: Mapping[str, Any] | None) -> Grant | None:
    if not raw:
        return None
    shares = tuple(
        Share(
            uuid=share["uuid"],
            index=share["index"],
            model=share.get("model", ""),
            tpcs=tuple(share.get("tpcs", ())),
            memory=share.get("memory", 0),
            whole=share.get("whole", True),
            simulated=share.get("kind") == "simulated",
        )
        for share in raw.get("shares", ())
    )
    return Grant(raw.get("grant", ""), raw.get("host", ""), raw.get("n", 0), shares)


def bind(granted: Grant | None) -> str:
    """Make `granted` what this process uses; returns what the user must know, or an empty string."""
    global _current
    _current = granted
    real = _real(granted)
    torch = _running_torch()
    if torch is None:
        _watch()
        os.environ[VISIBLE] = ",".join(share.uuid for share in real)
        notice = ""
    else:
        notice = _choose(torch, real) if real else ""
    if real and parked.anything():
        parked.bring_home()
    return notice


def bring_parked() -> None:
    """What was loaded while the cell runs moves to its device too. Raises what torch raises."""
    if parked.anything() and _real(_current):
        parked.bring_home()


def unbind() -> None:
    """The cell is over. What it left on the device stays there until somebody needs the room."""
    global _current
    _current = None


def _real(granted: Grant | None) -> list[Share]:
    return [share for share in granted.shares if not share.simulated] if granted else []


_watched: Any = None
"""The torch.cuda that will call `_started`, or the finder that waits for its import."""


def _watch() -> None:
    """Be called when torch starts CUDA, whenever that is."""
    global _watched
    cuda = sys.modules.get("torch.cuda") or getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None:
        if not isinstance(_watched, _CudaFinder):
            _watched = _CudaFinder()
            sys.meta_path.insert(0, _watched)
    elif _watched is not cuda and hasattr(cuda, "_lazy_call"):
        _watched = cuda
        cuda._lazy_call(_started)


def _started() -> None:
    """Torch starts CUDA, before the user's first use of it."""
    real = _real(_current)
    notice = _choose(sys.modules["torch"], real) if real else ""
    if notice:
        print(notice, file=sys.stderr)


class _CudaFinder(importlib.abc.MetaPathFinder):
    """Finds torch.cuda as everybody does, and watches it as soon as it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch.cuda":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _watch()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _running_torch() -> Any:
    """torch, when it is imported and has started CUDA; it is never imported for this."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None:
        return None
    return torch if cuda.is_initialized() else None


def _choose(torch: Any, shares: list[Share]) -> str:
    count = torch.cuda.device_count()
    found = {f"GPU-{torch.cuda.get_device_properties(i).uuid}": i for i in range(count)}
    numbers = [found[share.uuid] for share in shares if share.uuid in found]
    if len(numbers) < len(shares):
        missing = ", ".join(share.uuid for share in shares if share.uuid not in found)
        return (
            f"NBOS: the grant is on {missing}, but CUDA started in this process on {', '.join(found)} and cannot see "
            "another device any more; restart the kernel to use it."
        )
    torch.cuda.set_device(numbers[0])
    for number, share in zip(numbers, shares, strict=True):
        total = torch.cuda.get_device_properties(number).total_memory
        fraction = 1.0 if share.whole or not share.memory else min(1.0, share.memory / total)
        torch.cuda.set_per_process_memory_fraction(fraction, number)
    return ""
