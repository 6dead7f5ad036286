"""Whether the objects of a component can be reached only through its own variables.

A component is *sealed* when every reference to every object in it that could change is accounted for: by another
object of the component, by the namespace, or by IPython's own copies of results. Then only code that names one of
its variables can touch it. A component that somebody else refers to (a library's registry, a running thread, a
frame, a callback) is *exposed*: it is examined after every cell.

The references are counted with what the garbage collector uses: a type that takes part in garbage collection shows
all it refers to. A type that does not is a leaf when it is known to hold nothing that can change apart from its own
bytes, and makes the component exposed otherwise.
"""

from __future__ import annotations

import builtins
import gc
import re
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from cloudpickle import cloudpickle as cp

from . import constants, scopes, touch
from .weak import LoadersReference

BATCH = 4096
"""Objects looked into between two pauses."""

_HAVE_GC = 1 << 14  # Py_TPFLAGS_HAVE_GC, Include/object.h
_HEAP_TYPE = 1 << 9

_LEAVES: frozenset[type] = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis), type(NotImplemented)}
    | {types.CodeType, types.ModuleType, slice, object, re.Pattern}
)
_leaves: set[type] = set(_LEAVES)
"""With those of libraries that are imported by now."""
_LEAF_MODULES = (
    "numpy", "datetime", "decimal", "_decimal", "re", "pyarrow.lib", "polars", "builtins.polars", "zoneinfo", "uuid",
    "_random", "pandas._libs", "torch", "scipy", "sklearn", "PIL._imaging",
)  # fmt: skip

_POLARS = frozenset({"PyDataFrame", "PySeries", "PyLazyFrame", "PyExpr", "PyLazyGroupBy", "PySQLContext"})
"""Extension types that polars puts into `builtins`; their Rust data is shared only as immutable."""

_BASE = next(map(sys.getrefcount, [object()]))
"""What getrefcount says of an object that only the list it is read from holds."""


class Sealed(NamedTuple):
    exposed: str
    """Why not sealed; empty when it is."""
    mentions: frozenset[str]
    """Names that functions of the notebook in the component use."""
    objects: int


def walk(
    values: Callable[[], Iterable[Any]], held_by: Callable[[], Mapping[int, int]], stop: frozenset[int]
) -> Iterator[Sealed | None]:
    """Look at everything reachable from `values()`; yields None at each pause, and the verdict last.

    `held_by()`: how many references the namespace and IPython hold, by identity. `stop`: identities of objects that
    every replica has (the namespace itself).
    """
    seen: dict[int, Any] = {}
    inner: Counter[int] = Counter()
    mentions: set[str] = set()
    exposed = ""
    kinds: dict[type, str] = {}
    roots = stop - STOP
    _leaves.update(constants.leaf_types())
    closed = (types.FunctionType, *constants.generators())
    frontier = _inside(values(), stop)
    while frontier:
        new = {id(value): value for value in frontier}
        for identity in new.keys() & seen.keys():
            del new[identity]
        seen.update(new)
        fresh = list(new.values())
        frontier = []
        for at in range(0, len(fresh), BATCH):
            batch = fresh[at : at + BATCH]
            exposed = exposed or _opaque(batch, kinds)
            plain = [value for value in batch if not issubclass(type(value), closed)]
            referents = list(chain(gc.get_referents(*plain), _unseen_referents(batch, mentions, stop)))
            if not roots.isdisjoint(map(id, referents)):
                mentions.add("globals")  # it holds the namespace, or the shell
            found = _inside(referents, stop)
            inner.update(map(id, found))
            frontier += found
            referents = found = batch = plain = []
            yield None
            fresh, new = [], {}
    held = list(seen.values())
    total = len(held)
    if not exposed:
        weak = {id(value) for value in held if issubclass(type(value), weakref.ref)}
        exposed = _weakly_held(held, weak)
    seen.clear()
    kinds.clear()
    if not exposed:
        exposed = _held_elsewhere(held, inner, held_by())
    yield Sealed(exposed, frozenset(mentions), total)


def _inside(values: Iterable[Any], stop: frozenset[int]) -> list[Any]:
    """Those of `values` that belong to the component and can refer to others, or change."""
    return [
        value
        for value in values
        if (type(value) not in _leaves or (type(value) is types.ModuleType and not scopes.is_importable(value)))
        and id(value) not in stop
        and not (issubclass(type(value), _DEFINED) and _known(value))
    ]


_DEFINED = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)


def _known(value: Any) -> bool:
    """Functions and classes of importable modules: every replica has them, by name."""
    if isinstance(value, types.BuiltinFunctionType):
        return isinstance(value.__self__, types.ModuleType | type | None) and not touch.reflective_value(value)
    if isinstance(value, types.MethodDescriptorType | types.WrapperDescriptorType):
        return _known(value.__objclass__)
    if isinstance(value, type):
        if not value.__flags__ & _HEAP_TYPE:
            return True
        if value.__module__ == "__main__":
            return False
    if getattr(value, "__module__", None) == "__main__":
        return False
    try:
        return cp._lookup_module_and_qualname(value) is not None
    except Exception:  # noqa: BLE001 - a metaclass or module of the user's may raise anything
        return False


def _opaque(batch: list[Any], kinds: dict[type, str]) -> str:
    for kind in set(map(type, batch)):
        reason = kinds.get(kind)
        if reason is None:
            reason = kinds[kind] = _kind(kind)
        if reason:
            return reason
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "Tensor") and any(issubclass(kind, torch.Tensor) for kind in kinds):
        return _tensors([value for value in batch if issubclass(type(value), torch.Tensor)])
    return ""


def _tensors(tensors: list[Any]) -> str:
    """Tensors refer to each other where Python does not see it: shared storages, and graphs of autograd."""
    torch = sys.modules["torch"]
    users: Counter[int] = Counter()
    storages = {}
    for tensor in tensors:
        if tensor.requires_grad or tensor.layout is not torch.strided:
            return "a tensor with requires_grad: a computation elsewhere may hold it"
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and not storage.resizable():
            return "a tensor whose memory an array may use"
        users[storage._cdata] += 1
        storages[storage._cdata] = storage
    for cdata, count in users.items():
        if torch._C._storage_Use_Count(cdata) > count + 1:
            return "a tensor's memory is shared with something else"
    return ""


def _kind(kind: type) -> str:
    """Why values of this type cannot be looked into; empty when they can."""
    if kind.__flags__ & _HAVE_GC or kind is bytearray:
        return ""
    if kind.__module__ == "builtins" and kind.__name__ in _POLARS and "polars" in sys.modules:
        return ""
    return "" if (kind.__module__ or "").startswith(_LEAF_MODULES) else f"{kind.__qualname__}: cannot be looked into"


def _unseen_referents(batch: list[Any], mentions: set[str], stop: frozenset[int]) -> Iterator[Any]:
    """Referents of functions (without the globals of a module, which belong to no variable), and those that the
    garbage collector is not shown, though we know of them. Collects what the notebook's functions name."""
    generators = constants.generators()
    numpy = sys.modules.get("numpy")
    for value in batch:
        kind = type(value)
        if kind is types.FunctionType:
            yield from value.__closure__ or ()
            yield from (value.__dict__, value.__defaults__, value.__kwdefaults__, value.__annotations__)
            if id(value.__globals__) in stop:
                mentions |= touch.code_words(value.__code__)
            elif "__spec__" not in value.__globals__:
                yield value.__globals__  # no module's: a dictionary that `exec` was given
        elif kind is types.BuiltinFunctionType:
            mentions.add(value.__name__)
        elif kind in (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType):
            code = getattr(value, "gi_code", None) or getattr(value, "cr_code", None) or value.ag_code
            mentions |= touch.code_words(code)
        elif generators and issubclass(kind, generators):
            yield from (each for each in gc.get_referents(value) if type(each).__name__ != "PyCapsule")
        elif numpy is not None and issubclass(kind, numpy.ndarray):
            if value.base is not None:
                yield value.base
            elif value.dtype.hasobject:
                yield from _array_items(value)


def _array_items(array: Any) -> Iterator[Any]:
    """The objects that an array refers to, those in the fields of a structured one too."""
    if array.dtype.fields is None:
        yield from array.ravel("K").tolist()
        return
    for name in array.dtype.names:
        if array.dtype[name].hasobject:
            yield from _array_items(array[name])


def _weakly_held(held: list[Any], weak: set[int]) -> str:
    for value in held:
        referred = (
            type(value).__weakrefoffset__ and not issubclass(type(value), type) and weakref.getweakrefcount(value)
        )
        if referred and any(
            id(ref) not in weak and type(ref) is not LoadersReference for ref in weakref.getweakrefs(value)
        ):
            return f"{type(value).__qualname__}: somebody holds a weak reference"
    return ""


def _held_elsewhere(held: list[Any], inner: Mapping[int, int], namespace: Mapping[int, int]) -> str:
    counts = list(map(sys.getrefcount, held))  # before any variable of this function refers to one of them
    constant, caches = constants.Kept(), constants.Caches(held)
    for value, count in zip(held, counts, strict=True):
        known = inner.get(id(value), 0) + namespace.get(id(value), 0)
        if count - _BASE > known and not constants.is_constant(value, constant) and not caches.holds(value):
            return f"{type(value).__qualname__}: something outside the notebook's variables refers to it"
    return ""


STOP = frozenset({id(builtins.__dict__), id(builtins)})
