"""Giving device memory back without ending the process: tensors move to pinned host memory, the same objects stay.

They wait there as a standby's do (`capture.parked`), and come back before the first line of the next cell that is
granted a GPU. About 0.5 GB of CUDA's context stays on the device.

Guarantees: tensors that share memory go together, or stay together; a storage that something else than a tensor holds
too (an autograd graph, DLPack) stays, since that would go on looking at the old one. Nothing moves where a CUDA graph
was captured, which replays addresses, or a library is loaded that takes torch's memory by its address and keeps only
the tensor alive. What stays is named with its reason. When a copy fails nothing has moved.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..capture import parked

GIB = 1 << 30
HELD = "held by something else too (an autograd graph, another library)"
KIND = "of a kind whose memory cannot be exchanged (sparse, conjugate, inference, …)"
LOOKING = ("cupy", "numba.cuda", "jax", "tensorflow", "cudf", "rmm", "pycuda", "warp", "paddle")
"""Libraries that take a tensor through `__cuda_array_interface__` or DLPack."""
GRAPH = "a CUDA graph was captured, which replays addresses; delete it first"

ToHost = Callable[[Any], tuple[Any, Any]]
"""Begins to copy a storage; gives the one in host memory, and the object that dies with that memory."""


@dataclass
class Moved:
    """tensors, bytes: what went to host memory. left: bytes that stayed, by reason."""

    tensors: int = 0
    bytes: int = 0
    left: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.tensors} tensors ({self.bytes / GIB:.2f} GiB) moved to host memory"
        stays = "".join(f"; {size / GIB:.2f} GiB stay: {reason}" for reason, size in self.left.items())
        return f"{text}{stays}. They are back before the first line of the next cell with a GPU."


def release(torch: Any) -> Moved:
    """Move what is on CUDA devices, and give the allocator's memory back. Raises RuntimeError when copying failed."""
    torch.cuda.synchronize()
    moved = offload(torch, lambda tensor: tensor.is_cuda, _pinned, torch.cuda.synchronize)
    gc.collect()
    torch.cuda.empty_cache()
    return moved


def offload(torch: Any, on_device: Callable[[Any], bool], to_host: ToHost, settle: Callable[[], object]) -> Moved:
    """Move every tensor of this process that is `on_device`. `settle` waits for the copies."""
    moved, copies = Moved(), list[tuple[list[Any], Any, Any, str]]()
    groups = _by_storage(tensor for tensor in _tensors(torch) if on_device(tensor))
    everything = _everything_stays(torch) if groups else ""
    overlapping = _overlapping([storage for storage, _ in groups])
    for storage, tensors in groups:
        reason = everything or (HELD if storage._cdata in overlapping else "") or _stays(torch, storage, tensors)
        if reason:
            moved.left[reason] = moved.left.get(reason, 0) + storage.nbytes()
            continue
        host, memory = to_host(storage)
        copies.append((tensors, host, memory, str(storage.device)))
    settle()
    for tensors, host, memory, home in copies:
        parked.send(tensors, host, home, memory)
        moved.tensors += len(tensors)
        moved.bytes += host.nbytes()
    return moved


def _tensors(torch: Any) -> Iterator[Any]:
    """Every tensor of the process, each once: what Python holds, bases of views, and gradients."""
    seen: set[int] = set()
    wait = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    kept = wait[:]  # by their ids they are told apart while they live
    while wait:
        tensor = wait.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        with torch._C.DisableTorchFunctionSubclass():
            more = [tensor._base, tensor.grad if tensor.is_leaf else None]
        more = [one for one in more if one is not None]
        kept += more
        wait += more
        yield tensor


def _by_storage(tensors: Iterable[Any]) -> list[tuple[Any, list[Any]]]:
    """Tensors by what they lie on."""
    groups: dict[int, tuple[Any, list[Any]]] = {}
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            continue  # sparse and the like: their parts are tensors themselves
        if storage.nbytes():
            groups.setdefault(storage._cdata, (storage, []))[1].append(tensor)
    return list(groups.values())


def _stays(torch: Any, storage: Any, tensors: list[Any]) -> str:
    """Why this storage must stay, '' when it may go."""
    if any(_special(tensor) for tensor in tensors):
        return KIND
    # Each tensor holds the storage once, and Python's own object for it once.
    return HELD if torch._C._storage_Use_Count(storage._cdata) > len(tensors) + 1 else ""


def _special(tensor: Any) -> bool:
    return bool(tensor.is_quantized or tensor.is_inference() or tensor.is_conj() or tensor.is_neg())


def _overlapping(storages: list[Any]) -> set[int]:
    """Storages (by their handle) that lie on the same memory as another: DLPack made one of the other."""
    found: set[int] = set()
    end, last = 0, 0
    for storage in sorted(storages, key=lambda storage: storage.data_ptr()):
        if storage.data_ptr() < end:
            found |= {last, storage._cdata}
        if storage.data_ptr() + storage.nbytes() > end:
            end, last = storage.data_ptr() + storage.nbytes(), storage._cdata
    return found


def _everything_stays(torch: Any) -> str:
    graph = getattr(getattr(torch, "cuda", None), "CUDAGraph", None)
    if graph is not None and any(issubclass(type(value), graph) for value in gc.get_objects()):
        return GRAPH
    looking = next((name for name in LOOKING if name in sys.modules), None)
    return f"{looking} is loaded, and may look at the same memory" if looking else ""


def _pinned(storage: Any) -> tuple[Any, Any]:
    """Begin a copy to pinned memory; to any host memory where no more can be pinned."""
    import torch

    size = storage.nbytes()
    try:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        host = torch.empty(size, dtype=torch.uint8)
    host.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), non_blocking=True)
    # Through NumPy: its array dies with the memory, and can tell.
    memory = host.numpy()
    return torch.from_numpy(memory).untyped_storage(), memory
