"""NumPy views and torch tensors keep what they share: the base buffer travels once, views are rebuilt on it.

Both libraries lose this under plain pickle, even inside one stream. A library is touched only when the user's
program imported it. Sources: numpy `ndarray.__array_interface__` (arrays.interface), torch `_rebuild_tensor_v2`
in torch/_utils.py.
"""

from __future__ import annotations

import array as std_array
import importlib
import math
import pickle
import sys
from typing import Any

from . import devicedata, parked


class Window:
    """Memory of `base` from `offset` on, seen through other strides; what `numpy.asarray` needs to make a view
    of it."""

    def __init__(self, base: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str) -> None:
        self.base = base
        address = base.__array_interface__["data"][0] + offset
        self.__array_interface__ = {
            "data": (address, not base.flags.writeable),
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "version": 3,
        }


def owner(array: Any) -> Any:
    """The array that stands at the end of the chain of views, `array` itself when it is no view of an array."""
    numpy = sys.modules["numpy"]
    while True:
        base = array.base
        if isinstance(base, Window) or (type(base).__name__ == "DummyArray" and hasattr(base, "base")):
            base = base.base  # the latter is numpy.lib.stride_tricks' way to make a view
        if not isinstance(base, numpy.ndarray):
            return array
        array = base


class Raw:
    """The bytes of an array of a subclass, as a plain array."""

    def __init__(self, array: Any) -> None:
        self.array = array


def reduce_subclass(array: Any) -> Any:
    """matrix, recarray, masked arrays and the user's own: a plain array seen as that class, and its attributes."""
    numpy = sys.modules["numpy"]
    plain = array.view(numpy.ndarray)
    if owner(array) is array:
        plain = Raw(plain)
    return (
        view_as,
        (plain, type(array)),
        vars(array) if hasattr(array, "__dict__") else None,
        None,
        None,
        set_attributes,
    )


def view_as(array: Any, kind: Any) -> Any:
    return array.view(kind)


def set_attributes(array: Any, attributes: dict[str, Any]) -> None:
    array.__dict__.update(attributes)


def reduce_array(array: Any) -> Any:
    """A reduction of a view onto its owner, or NotImplemented for an array that owns its memory."""
    if array.base is None:
        return reduce_owner(array)
    root = owner(array)
    if root is array or root.size == 0 or array.size == 0:
        return _reduce_foreign(array) if root is array and array.size else reduce_owner(array)
    offset = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    dtype = array.dtype
    if dtype.hasobject and dtype != root.dtype:
        return NotImplemented  # a view of other type on object references cannot be made from outside
    return rebuild_view, (root, offset, array.shape, array.strides, dtype, bool(array.flags.writeable))


def _reduce_foreign(array: Any) -> Any:
    """An array on memory of a bytearray or the like stays on it; one on memory that cannot travel is refused."""
    base = array.base
    exporter = base.obj if isinstance(base, memoryview) else base
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "Tensor") and isinstance(exporter, torch.Tensor):
        raise pickle.PicklingError("an array on the memory of a torch tensor; keep x.copy()")
    if type(exporter) not in (bytearray, std_array.array):
        return reduce_owner(array)
    numpy = sys.modules["numpy"]
    start = numpy.frombuffer(exporter, numpy.uint8).__array_interface__["data"][0]
    offset = array.__array_interface__["data"][0] - start
    return rebuild_over, (exporter, offset, array.shape, array.strides, array.dtype, bool(array.flags.writeable))


def rebuild_over(exporter: Any, offset: int, shape: Any, strides: Any, dtype: Any, writeable: bool) -> Any:
    import numpy

    array = numpy.ndarray(shape, dtype, exporter, offset, strides)
    if not writeable:
        array.flags.writeable = False
    return array


def reduce_owner(array: Any) -> Any:
    """An array on memory of its own comes back as one (`base` None, resizable); plain pickle makes it a view of
    the received bytes."""
    flags = array.flags
    if array.dtype.hasobject or not (flags.c_contiguous or flags.f_contiguous):
        return NotImplemented if flags.writeable else (*array.__reduce__()[:3], None, None, set_read_only)
    order = "C" if flags.c_contiguous else "F"
    return rebuild_owner, (_content(array, order), array.dtype, array.shape, order, flags.writeable)


SMALL = 4 * 1024
"""Up to so many bytes are copied into the stream at once: a figure holds thousands of arrays of some numbers."""


def _content(array: Any, order: str) -> Any:
    if array.nbytes <= SMALL:
        return array.tobytes(order)
    numpy = sys.modules["numpy"]
    return pickle.PickleBuffer((array if order == "C" else array.T).reshape(-1).view(numpy.uint8))


def set_read_only(array: Any, state: Any) -> None:
    """NumPy's own pickle forgets it."""
    array.__setstate__(state)
    array.flags.writeable = False


def rebuild_owner(data: Any, dtype: Any, shape: Any, order: str, writeable: bool) -> Any:
    """An array on `data`; when that is fresh memory of the loader (an array of bytes), it becomes the array."""
    numpy: Any = importlib.import_module("numpy")
    if 0 in shape:
        array = numpy.empty(shape, dtype, order)
    elif type(data) is numpy.ndarray and data.flags.owndata and order == "C":
        data.flags.writeable = True
        if data.dtype != dtype:
            data.shape = (-1,)
            data.dtype = dtype
        if data.shape != shape:
            data.shape = shape
        array = data
    elif type(data) is bytes and data:
        array = numpy.frombuffer(data, dtype).reshape(shape, order=order).copy(order)
    else:
        array = numpy.empty(shape, dtype, order)
        flat = array.reshape(-1, order="A") if array.ndim else array.reshape(1)
        flat.view(numpy.uint8)[...] = numpy.frombuffer(data, numpy.uint8)
    if not writeable:
        array.flags.writeable = False
    return array


def memory(size: int) -> Any:
    """Fresh writable memory for a frame: an array of bytes, which an array may take over, where numpy is there."""
    try:
        import numpy
    except ImportError:
        return bytearray(size)
    return numpy.empty(size, numpy.uint8)


def rebuild_view(root: Any, offset: int, shape: Any, strides: Any, dtype: Any, writeable: bool) -> Any:
    import numpy

    if (root.flags.c_contiguous or root.flags.f_contiguous) and not dtype.hasobject:
        view = numpy.ndarray(shape, dtype, root if root.flags.c_contiguous else root.T, offset, strides)
    elif dtype == root.dtype and root.flags.c_contiguous and _packed(shape, strides, dtype.itemsize):
        first, count = offset // dtype.itemsize, math.prod(shape)
        view = root.reshape(-1)[first : first + count].reshape(shape)
    else:
        view = numpy.asarray(Window(root, offset, shape, strides, _typestr(dtype)))
        if view.dtype != dtype:
            view = view.view(dtype)
    if not writeable:
        view.flags.writeable = False
    return view


def _packed(shape: Any, strides: Any, step: int) -> bool:
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if stride != step:
            return False
        step *= length
    return True


def _typestr(dtype: Any) -> str:
    return "|O" if dtype.hasobject else f"|V{dtype.itemsize}" if dtype.fields else str(dtype.str)


class Storages:
    """One stand-in per torch storage for the length of a capture: what shares the storage shares the stand-in."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], Storage] = {}
        self._arrays: list[tuple[int, int]] = []
        self._foreign: list[tuple[int, int]] = []

    def see_array(self, array: Any) -> None:
        """Raises for an array whose memory a tensor of this capture uses (torch.from_numpy)."""
        start = array.__array_interface__["data"][0]
        if any(first < start + array.nbytes and start < last for first, last in self._foreign):
            raise pickle.PicklingError("a torch tensor uses its memory (torch.from_numpy); keep x.copy()")
        self._arrays.append((start, start + array.nbytes))

    def see_storage(self, storage: Any) -> None:
        """Raises for a storage on the memory of an array of this capture."""
        start = storage.data_ptr()
        if storage.device.type != "cpu" or not start or storage.resizable():
            return
        last = start + storage.nbytes()
        if any(first < last and start < end for first, end in self._arrays):
            raise pickle.PicklingError("a tensor on the memory of an array (torch.from_numpy); keep x.clone()")
        self._foreign.append((start, last))

    def of(self, tensor: Any) -> Storage:
        storage = tensor.untyped_storage()
        self.see_storage(storage)
        key = (str(storage.device), storage.data_ptr())
        if not key[1]:
            return Storage(storage)
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = Storage(storage)
        return held


class StorageBytes:
    """The memory of a storage for numpy. `tensor.numpy()` would forbid the user to resize the tensor for ever."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        where = (storage.data_ptr(), False)
        self.__array_interface__ = {"data": where, "shape": (storage.nbytes(),), "typestr": "|u1", "version": 3}


class Storage:
    """The bytes of a torch storage and the device they belong to."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage

    def __reduce__(self) -> Any:
        torch = sys.modules["torch"]
        numpy = sys.modules.get("numpy")
        address = self.storage.data_ptr()
        if self.storage.device.type == "cpu" and address and numpy is not None:
            return rebuild_storage, (numpy.asarray(StorageBytes(self.storage)), parked.home_of(self.storage))
        raw = torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage).cpu()
        if numpy is None or not raw.numel():
            return rebuild_storage, (raw.numpy(), str(self.storage.device))
        return rebuild_storage, (numpy.asarray(StorageBytes(raw.untyped_storage())), str(self.storage.device))


def rebuild_storage(raw: Any, device: str) -> Any:
    import torch

    raw = raw if raw.flags.writeable else raw.copy()
    tensor = torch.from_numpy(raw)
    storage = tensor.untyped_storage()
    if device != "cpu":
        devicedata.note()
        parked.park(storage, device, raw)
    return storage


def reduce_tensor(tensor: Any, storages: Storages) -> Any:
    """A reduction of a plain dense torch tensor or parameter; NotImplemented for every other kind."""
    torch = sys.modules["torch"]
    kind = type(tensor)
    if tensor.device.type != "cpu" or (parked.anything() and parked.is_parked(tensor)):
        devicedata.note()
    if kind not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        return NotImplemented
    if not tensor.is_leaf:
        raise pickle.PicklingError("it belongs to a computation that can still be differentiated; keep x.detach()")
    if tensor.device.type not in ("cpu", "cuda"):
        return NotImplemented
    if tensor._backward_hooks:
        raise pickle.PicklingError("a tensor with hooks of autograd")
    if tensor.is_conj() or tensor.is_neg():
        return NotImplemented
    where = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)
    state = {"grad": tensor.grad, "dict": tensor.__dict__ or None}
    return rebuild_tensor, (kind is not torch.Tensor, storages.of(tensor), *where), state, None, None, set_tensor_state


def rebuild_tensor(
    parameter: bool, storage: Any, offset: int, shape: Any, stride: Any, dtype: Any, requires_grad: bool
) -> Any:
    import torch

    tensor = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)
    if parameter:
        tensor = torch.nn.Parameter(tensor, requires_grad)
    elif requires_grad:
        tensor.requires_grad_()
    parked.wait(tensor)
    return tensor


def set_tensor_state(tensor: Any, state: dict[str, Any]) -> None:
    if state["grad"] is not None:
        tensor.grad = state["grad"]
    if state["dict"]:
        tensor.__dict__.update(state["dict"])
