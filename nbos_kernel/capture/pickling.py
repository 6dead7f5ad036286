"""Variables to bytes and back: cloudpickle, with the notebook's own namespace as a fixed point.

Guarantees beyond cloudpickle:
- the user's namespace, the user module and the shell are references: they stand for the standby's own;
- a function of the notebook is bound to the standby's namespace itself, not to a copy of the globals it used
  when it was pickled, so that names it calls may be defined later and `global` statements work;
- a class of the notebook keeps one identity within a group, and is made anew whenever its group is loaded: what
  refers to it is in the same group (`groups.py`), and attributes that were deleted are gone;
- NumPy views and torch tensors keep what they share (`arrays.py`);
- buffers of BUFFER bytes and more leave the stream without a copy.
"""

from __future__ import annotations

import enum
import io
import pickle
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
from cloudpickle import cloudpickle as cp

from . import arrays, rebuilt
from .names import TEXT_LIMIT

BUFFER = 32 * 1024
"""Bytes from which a buffer stands apart from the pickle stream."""

Buffer = bytes | bytearray | memoryview


class Roots:
    """Objects that exist on every replica and are pickled as references to it."""

    def __init__(self, named: dict[str, Any], namespace: dict[str, Any]) -> None:
        self.named = {**named, "namespace": namespace}
        self.namespace = namespace
        self.by_identity = {id(value): name for name, value in self.named.items()}
        self.imported: set[str] = set()
        """Dotted modules that cells imported by name."""

    def submodules(self, package: str) -> tuple[str, ...]:
        return tuple(sorted(name for name in self.imported if name.startswith(package + ".") and name in sys.modules))


class Pickled(typing.NamedTuple):
    """A pickle stream, its out-of-band buffers, and everything the stream refers to (kept alive by `memo`)."""

    stream: bytes
    buffers: list[memoryview]
    memo: dict[int, tuple[int, Any]]
    by_value: set[int]

    def shareable(self) -> set[int]:
        """Identities of the objects in the stream that can change, or be told apart by `is`."""
        by_value = self.by_value
        return {
            identity
            for identity, (_, value) in self.memo.items()
            if type(value) not in _NEVER_SHARED
            and (identity in by_value or not _by_reference(value))
            and not (type(value) in (str, bytes) and len(value) <= TEXT_LIMIT)
        }


_NEVER_SHARED = frozenset(
    {int, float, tuple, frozenset, types.CodeType, types.ModuleType, types.BuiltinFunctionType, range, slice}
)


def _by_reference(value: Any) -> bool:
    """Functions and classes of importable modules, and values of which every process has the same one."""
    if isinstance(value, type | types.FunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
        return True
    if isinstance(value, enum.Enum):
        return True
    module = type(value).__module__
    shared_type = type(value).__name__ in ("dtype", "device") and module in ("numpy", "torch")
    return shared_type or module in _IMMUTABLE_MODULES


_IMMUTABLE_MODULES = frozenset(
    {"datetime", "decimal", "fractions", "uuid", "pathlib", "re", "zoneinfo", "numpy.dtypes"}
)


class NamespacePickler(cloudpickle.Pickler):
    """Pickles values of the notebook's namespace. One object per stream; `storages` is shared by one capture."""

    def __init__(self, file: io.BytesIO, roots: Roots, storages: arrays.Storages) -> None:
        self.buffers: list[memoryview] = []
        super().__init__(file, protocol=5, buffer_callback=self._take_buffer)
        self.roots = roots
        self.storages = storages
        self.by_value: set[int] = set()
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        self._array = getattr(numpy, "ndarray", None)
        self._tensor = getattr(torch, "Tensor", None)
        # Called by the pickler for every single object: a closure over one dict is the cheapest form there is.
        known = roots.by_identity
        self.persistent_id: Callable[[Any], str | None] = lambda value: known.get(id(value))

    def _take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous: it stays in the stream
            return True
        if raw.nbytes < BUFFER:
            return True
        self.buffers.append(raw)
        return False

    def reducer_override(self, obj: Any) -> Any:
        kind: Any = type(obj)
        if kind is self._array:
            return arrays.reduce_array(obj)
        if self._tensor is not None and isinstance(obj, self._tensor):
            return arrays.reduce_tensor(obj, self.storages)
        reducer = rebuilt.REDUCERS.get(kind)
        if reducer is not None:
            return reducer(obj)
        if isinstance(obj, types.ModuleType) and sys.modules.get(obj.__name__) is obj:
            return rebuilt.import_modules, (obj.__name__, self.roots.submodules(obj.__name__))
        reduced = super().reducer_override(obj)
        if reduced is not NotImplemented and reduced[0] in _CLASS_MAKERS:
            self.by_value.add(id(obj))
            return _untracked(reduced)
        return reduced

    def _dynamic_function_reduce(self, func: types.FunctionType) -> Any:
        self.by_value.add(id(func))
        if func.__globals__ is not self.roots.namespace:
            return super()._dynamic_function_reduce(func)
        slots = {name: getattr(func, name) for name in _FUNCTION_SLOTS}
        # The cells themselves go along, not their contents: functions that share a variable go on sharing it.
        made = (func.__code__, self.roots.namespace, func.__name__, None, func.__closure__)
        return types.FunctionType, made, (func.__dict__, slots), None, None, set_function_state


_CLASS_MAKERS = frozenset({cp._make_skeleton_class, cp._make_skeleton_enum})
_FUNCTION_SLOTS = ("__qualname__", "__annotations__", "__defaults__", "__kwdefaults__", "__module__", "__doc__")
if sys.version_info >= (3, 12):
    _FUNCTION_SLOTS += ("__type_params__",)


def _untracked(reduced: Any) -> Any:
    """A class's reduction without cloudpickle's tracker id, which would update the live class on the standby in
    place, before the entry is complete, and would leave attributes that were deleted."""
    arguments = reduced[1]
    return (reduced[0], (*arguments[:-2], None, arguments[-1]), *reduced[2:])


def set_function_state(function: types.FunctionType, state: Any) -> None:
    attributes, slots = state
    function.__dict__.update(attributes)
    for name, value in slots.items():
        setattr(function, name, value)


def dump(value: Any, roots: Roots, storages: arrays.Storages) -> Pickled:
    """`value` as bytes. Raises whatever the value's own reduction raises."""
    with io.BytesIO() as file:
        pickler = NamespacePickler(file, roots, storages)
        pickler.dump(value)
        return Pickled(file.getvalue(), pickler.buffers, pickler.memo.copy(), pickler.by_value)


class NamespaceUnpickler(pickle.Unpickler):
    def __init__(self, stream: Buffer, buffers: Sequence[Buffer], roots: Roots) -> None:
        super().__init__(io.BytesIO(stream), buffers=buffers)
        self._roots = roots

    def persistent_load(self, name: str) -> Any:
        return self._roots.named[name]


def load(stream: Buffer, buffers: Sequence[Buffer], roots: Roots) -> Any:
    """The value back. `buffers` should be writable (bytearray) so that arrays on them are."""
    return NamespaceUnpickler(stream, buffers, roots).load()
