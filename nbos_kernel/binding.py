"""What GPUs this execution holds: `nbos_kernel.grant()` for user code, and binding the grant in this process.

Binding: while CUDA has not started in this process, CUDA_VISIBLE_DEVICES names exactly the granted devices (none
without a grant). Once torch has started CUDA the variable has no effect any more; then the current device is
chosen among those that were visible at that time, and a grant on another device is reported to the user instead
of silently using the wrong one. A slice is held to its TPCs (`gpu.confine`), and torch to the grant's memory
(`gpu.budget`), until `unbind`, which waits for what the cell launched: its TPCs are another's from then on.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

from .capture import parked
from .gpu import budget, leftovers, offload
from .gpu.confine import Confinement, Held
from .gpu.gate import gate
from .gpu.grants import COOPERATIVE, Grant, Share, from_wire, resliced

__all__ = ["Grant", "Share", "bind", "bring_parked", "from_wire", "grant", "held", "release", "unbind"]

VISIBLE = "CUDA_VISIBLE_DEVICES"


_current: Grant | None = None
_confinement = Confinement()
_held: tuple[Held, ...] = ()
_bound: list[int] = []
"""Torch's numbers of the devices that the running cell was bound to."""
_said: set[str] = set()
"""Why slices are not held: said once a process, not under every cell."""


def grant() -> Grant | None:
    """The GPUs that the running cell holds, None for a CPU cell and between cells."""
    return _current


def held() -> tuple[Held, ...]:
    """What holds the running cell to each share of its grant; () while torch has not started CUDA."""
    return _held


def bind(granted: Grant | None) -> str:
    """Make `granted` what this process uses; returns what the user must know, or an empty string."""
    global _current, _held
    _current, _held = granted, ()
    real = _real(granted)
    torch = running_torch()
    if torch is None:
        _watch()
        os.environ[VISIBLE] = ",".join(share.uuid for share in real)
        _confinement.prepare(os.environ, real)
        notice = ""
    else:
        notice = _choose(torch, real) if real else ""
    if real and parked.anything():
        _start_cuda()
        parked.bring_home()
    if granted is not None and granted.simulated and (played := sys.modules.get("nbos_kernel.simgpu")) is not None:
        played.bring_home(granted)
    return notice


def left() -> leftovers.Told:
    """What this process has on its devices now."""
    return leftovers.tell(running_torch())


_moved: dict[str, str] = {}
"""Where the driver restored what this process had on a device, while torch goes on knowing that one's UUID."""


def moved(old: str, new: str) -> None:
    """What this process has on `old` is on `new` from now on, and the other way round. Any thread may say so."""
    known = {now: first for first, now in _moved.items()}
    _moved.update({known.get(old, old): new, known.get(new, new): old})
    leftovers.moved(old, new)


def give_back() -> dict[str, Any]:
    """The daemon asks for the room, and no cell runs. What came of it, for the daemon."""
    return leftovers.give_back(running_torch())


def _start_cuda() -> None:
    """Before tensors come from host memory: bound as it starts, the grant's limit would count them as new."""
    start = getattr(getattr(sys.modules.get("torch"), "cuda", None), "init", None)
    if start is not None:
        start()


def on() -> frozenset[int]:
    """The TPCs that the running cell's work is launched on; of a grant on one device."""
    assert _current is not None
    (share,) = _current.shares
    return frozenset(share.tpcs) if share.simulated or running_torch() is None else _confinement.on(share)


def move(tpcs: Collection[int], lent: int) -> None:
    """The running cell's slice is another one from now on. What it had launched before is over."""
    global _current, _held
    assert _current is not None
    _current = resliced(_current, tpcs, lent)
    torch, (share,) = running_torch(), _current.shares
    if torch is not None and _bound and not share.simulated:
        _held = (_confinement.move(torch, _bound[0], share),)


def settle() -> None:
    """Wait for what was launched on the running cell's devices. Raises what failed there."""
    torch = running_torch()
    for number in _bound if torch is not None else ():
        torch.cuda.synchronize(number)


def cuda_runs() -> bool:
    """Whether torch has started CUDA in this process."""
    return running_torch() is not None


def bring_parked(touched: bool = False) -> None:
    """What was loaded while the cell runs moves to its device too; touched: data of a device is among it, so that a
    cell that may get a GPU gets it now. Raises what torch raises."""
    if touched:
        gate.touch("a variable that it uses lies on a GPU")
    if parked.anything() and _real(_current):
        parked.bring_home()


def peak() -> int:
    """Bytes that torch had on the running cell's devices at most, until now."""
    torch = running_torch()
    return 0 if torch is None else sum(budget.peak(torch, number) for number in _bound)


def unbind() -> str:
    """The cell is over, and with it what it launched. What it left on the device stays there until somebody needs the
    room. Returns what the user must know, or an empty string."""
    global _current, _held
    _current, _held = None, ()
    torch, bound = running_torch(), list(_bound)
    _bound.clear()
    if torch is None:
        return ""
    try:
        for number in bound:
            torch.cuda.synchronize(number)
            budget.lift(torch, number)
        _confinement.leave(torch)
    except RuntimeError as err:
        return (
            f"NBOS: what this cell launched on the GPU failed after its last line: {err}\nCUDA in this process may be "
            "broken by it; if the next cell with a GPU fails too, restart the kernel."
        )
    return ""


def release() -> str:
    """Give back what this process has on its devices, between cells that hold one. What came of it, for the user."""
    torch = running_torch()
    if _real(_current):
        return "This cell holds a GPU: what it has there stays. Run this in a cell without one (%%cpu)."
    if torch is None:
        return "Torch has not used a GPU in this process: there is nothing to give back."
    with gate.aside():
        return str(offload.release(torch))


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
    _confinement.started()
    try:
        notice = _choose(sys.modules["torch"], real) if real else ""
    except Exception as err:  # noqa: BLE001 - raised here it would end torch's start of CUDA, for every later cell too
        notice = f"NBOS: the grant could not be bound in this process: {err}"
    if notice:
        print(notice, file=sys.stderr)


def torch_is_there() -> None:
    """torch.cuda came into this process without being looked for: it had been imported ahead (nbos_kernel.warm)."""
    if isinstance(_watched, _CudaFinder):
        if _watched in sys.meta_path:
            sys.meta_path.remove(_watched)
        _watch()


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
                gate.imported(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def running_torch() -> Any:
    """torch, when it is imported and has started CUDA; it is never imported for this."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None:
        return None
    return torch if cuda.is_initialized() else None


def _choose(torch: Any, shares: list[Share]) -> str:
    seen = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    granted = {share.uuid.partition("-")[2]: share.uuid for share in shares}  # torch tells no prefix: GPU-, MIG-
    found = {granted.get(uuid, f"GPU-{uuid}"): number for number, uuid in enumerate(seen)}
    found = {_moved.get(uuid, uuid): number for uuid, number in found.items()}
    leftovers.know(list(found))
    numbers = [found[share.uuid] for share in shares if share.uuid in found]
    if len(numbers) < len(shares):
        missing = ", ".join(share.uuid for share in shares if share.uuid not in found)
        return (
            f"NBOS: the grant is on {missing}, but CUDA started in this process on {', '.join(found)} and cannot see "
            "another device any more; restart the kernel to use it."
        )
    torch.cuda.set_device(numbers[0])
    if parked.anything():
        # Before the limit: the room for them is reserved, also where the cell asked for less than they take.
        parked.bring_home()
    return _hold(torch, numbers, shares)


def _hold(torch: Any, numbers: list[int], shares: list[Share]) -> str:
    """Bind memory and TPCs of each share, on torch's device of that number."""
    global _held
    _bound[:] = numbers
    for number, share in zip(numbers, shares, strict=True):
        budget.bind(torch, number, share)
    _held = tuple(_confinement.enter(torch, number, share) for number, share in zip(numbers, shares, strict=True))
    return "\n".join(
        text for one, share in zip(_held, shares, strict=True) if (text := _shortfall(one, share)) and _new(text)
    )


def _shortfall(held: Held, share: Share) -> str:
    """What the user must know of a slice that is not held to its TPCs."""
    if share.whole and not held.reason:
        return ""
    if held.mechanism == COOPERATIVE:
        why = f": {held.reason}" if held.reason else ""
        return f"NBOS: nothing holds this cell to the TPCs of its slice; it is cooperative here{why}."
    return f"NBOS: {held.reason}." if held.reason else ""


def _new(text: str) -> bool:
    new = text not in _said
    _said.add(text)
    return new
