"""CUDA tensors in a process that holds no grant (a standby, or one that gave its device back): kept in host memory,
moved to the device when a cell gets one.

Guarantees: applying the log never touches a GPU, so a standby holds none; tensors that share a storage still share it
after the move, and every tensor and parameter stays the same object (`tensor.data` is exchanged, as
`torch.nn.Module.to` does); a tensor that still waits is captured as one of its own device.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

_homes: dict[int, str] = {}
"""Device of a storage that waits in host memory, by the storage's address."""

_waiting: dict[int, list[weakref.ref[Any]]] = {}
"""The tensors on it."""


def park(storage: Any, home: str, memory: Any) -> None:
    """`storage`, which lies on `memory` (an array), stands in for one on the device `home`."""
    address = storage.data_ptr()
    if address:
        _homes[address] = home
        weakref.finalize(memory, _forget, address).atexit = False  # the address is given to somebody else then


def _forget(address: int) -> None:
    _homes.pop(address, None)
    _waiting.pop(address, None)


def wait(tensor: Any) -> None:
    """`tensor` was rebuilt; when its storage is parked it moves with it."""
    address = tensor.untyped_storage().data_ptr()
    if address in _homes:
        _waiting.setdefault(address, []).append(weakref.ref(tensor))


def send(tensors: list[Any], storage: Any, home: str, memory: Any) -> None:
    """Put `tensors`, which share one storage on the device `home`, on `storage`, a copy of it in host memory."""
    _exchange(tensors, storage)
    park(storage, home, memory)
    for tensor in tensors:
        wait(tensor)


def is_parked(tensor: Any) -> bool:
    """Whether it lies in host memory and belongs on a device."""
    try:
        return tensor.untyped_storage().data_ptr() in _homes
    except (NotImplementedError, RuntimeError):  # sparse and the like, which never wait
        return False


def home_of(storage: Any) -> str:
    """The device that a storage belongs to, wherever it is now."""
    return _homes.get(storage.data_ptr()) or str(storage.device)


def anything() -> bool:
    return bool(_waiting)


def bytes_by_home() -> dict[str, int]:
    """What would come to each device with `bring_home`."""
    found: dict[str, int] = {}
    for address, refs in _waiting.items():
        tensor = next((t for ref in refs if (t := ref()) is not None), None)
        if tensor is not None and tensor.untyped_storage().data_ptr() == address:
            found[_homes[address]] = found.get(_homes[address], 0) + tensor.untyped_storage().nbytes()
    return found


def bring_home(move: Callable[[Any, str], Any] | None = None) -> None:
    """A cell was granted a GPU: move everything that waits. `move(storage, home)` gives the storage on its device.

    Raises what torch raises when the device has no room; what was not moved yet goes on waiting.
    """
    for address in list(_waiting):
        tensors = [tensor for ref in _waiting[address] if (tensor := ref()) is not None]
        tensors = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() == address]
        if tensors:
            _exchange(tensors, (move or _to_device)(tensors[0].untyped_storage(), _homes[address]))
        _forget(address)


def _exchange(tensors: list[Any], storage: Any) -> None:
    torch = sys.modules["torch"]
    for tensor in tensors:
        empty = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        tensor.data = empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _to_device(storage: Any, home: str) -> Any:
    torch = sys.modules["torch"]
    device = torch.device(home)
    if device.index is not None and device.index >= torch.cuda.device_count():
        device = torch.device("cuda")
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    return flat.to(device).untyped_storage()
