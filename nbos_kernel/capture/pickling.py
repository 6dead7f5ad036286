"""Variables to bytes and back: cloudpickle, with the notebook's own namespace as a fixed point.

Guarantees beyond cloudpickle:
- the user's namespace, the user module and the shell are references: they stand for the standby's own;
- a function of the notebook is bound to the standby's namespace itself, not to a copy of the globals it used
  when it was pickled, so that names it calls may be defined later and `global` statements work;
- a class of the notebook keeps one identity within a group, and is made anew whenever its group is loaded: what
  refers to it is in the same group (`groups.py`), and attributes that were deleted are gone;
- NumPy views and torch tensors keep what they share (`arrays.py`);
- buffers of BUFFER bytes and more leave the stream without a copy;
- objects whose class has a say in how it is pickled take a witness along (`witness.py`): what comes back must look
  like what went in, or its variables are lost on that standby, with the reason.

The references are the first entries of the pickler's memo, so they cost nothing per object (a `persistent_id` would be
called for every one); `Roots.prelude` is the stream that fills the unpickler's memo in the same way.
"""

from __future__ import annotations

import builtins
import enum
import io
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import cloudpickle
from cloudpickle import cloudpickle as cp

from . import arrays, attached, constants, devicedata, rebuilt, scopes, seal, touch, weak, witness
from .loaded import COMPILED, Met, is_same_everywhere
from .names import TEXT_LIMIT

BUFFER = 32 * 1024
"""Bytes from which a buffer stands apart from the pickle stream."""

Buffer = bytes | bytearray | memoryview


class Roots:
    """Objects that exist on every replica and are pickled as references to it."""

    def __init__(self, named: dict[str, Any], namespace: dict[str, Any]) -> None:
        self.named = {**named, "builtins": vars(builtins), "namespace": namespace}
        self.namespace = namespace
        self.memo = {id(value): (number, value) for number, value in enumerate(self.named.values())}
        self.prelude = b"\x80\x05" + b"".join(_refer(name) for name in self.named) + b"N."
        self.stop = frozenset(self.memo) | seal.STOP
        self.imported: set[str] = set()
        """Dotted modules that cells imported by name."""

    def held(self) -> int:
        """How many references there are to all but the builtins."""
        return sum(sys.getrefcount(value) for name, value in self.named.items() if name != "builtins")

    def submodules(self, package: str) -> tuple[str, ...]:
        return tuple(sorted(name for name in self.imported if name.startswith(package + ".") and name in sys.modules))


def _refer(name: str) -> bytes:
    """SHORT_BINUNICODE name, BINPERSID, MEMOIZE, POP: puts the root called `name` into the unpickler's memo."""
    return b"\x8c" + bytes([len(name)]) + name.encode() + b"Q\x940"


class Pickled:
    """A pickle stream, its out-of-band buffers, and everything the stream refers to (kept alive by the pickler)."""

    def __init__(self, stream: bytes, pickler: NamespacePickler) -> None:
        self.stream, self.buffers = stream, pickler.buffers
        self._pickler = pickler
        self._memo: dict[int, tuple[int, Any]] | None = None

        self.mentions, self.functions = frozenset(pickler.mentions), frozenset(pickler.functions)
        self.device = pickler.device

    def release(self) -> None:
        """Hold nothing alive: a second pickle of the same objects must find who holds them as the first did."""
        self._pickler.clear_memo()
        self._memo = None

    @property
    def memo(self) -> dict[int, tuple[int, Any]]:
        """What the stream refers to, by identity."""
        if self._memo is None:
            self._memo = self._pickler.memo.copy()
            for identity in self._pickler.roots.memo:
                self._memo.pop(identity, None)
        return self._memo

    def shares(self, identity: int) -> bool:
        """Whether the object with this identity can change, or be told apart by `is`: it has to stay one object."""
        value = self.memo[identity][1]
        kind = type(value)
        if kind in _NEVER_SHARED or (kind in (str, bytes) and len(value) <= TEXT_LIMIT):
            return False
        return identity in self._pickler.by_value or not _by_reference(value)


_NEVER_SHARED = frozenset(
    {
        int,
        float,
        tuple,
        frozenset,
        types.CodeType,
        types.BuiltinFunctionType,
        range,
        slice,
        witness.Tail,
    }
)


def _by_reference(value: Any) -> bool:
    """Functions and classes of importable modules, and values of which every process has the same one."""
    if isinstance(value, type | types.FunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
        return True
    if isinstance(value, enum.Enum) or type(value).__name__ == COMPILED:
        return True  # a compiled function is pickled by its name, or not at all
    if type(value) is types.ModuleType:
        return scopes.is_importable(value)
    return type(value).__module__ in _IMMUTABLE_MODULES or constants.is_data_type(type(value))


_IMMUTABLE_MODULES = frozenset(
    {"datetime", "decimal", "fractions", "uuid", "pathlib", "re", "zoneinfo", "numpy.dtypes"}
)


def _taker(taken: list[memoryview]) -> Callable[[pickle.PickleBuffer], bool]:
    """Puts large buffers aside. A function of its own: a method would make a cycle of the pickler, which then keeps
    everything it saw alive, and everything would seem to be referred to from elsewhere (`seal.py`)."""

    def take(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous: it stays in the stream
            return True
        if raw.nbytes < BUFFER:
            return True
        taken.append(raw)
        return False

    return take


def _tables() -> Iterable[Mapping[type, Callable[[Any], Any]]]:
    """cloudpickle's own reducers and those that libraries registered with copyreg; the last one counts."""
    return reversed(cloudpickle.Pickler.dispatch_table.maps)


class NamespacePickler(cloudpickle.Pickler):
    """Pickles values of the notebook's namespace. One object per stream; `storages` is shared by one capture."""

    def __init__(self, file: io.BytesIO, roots: Roots, storages: arrays.Storages) -> None:
        self.buffers: list[memoryview] = []
        # cloudpickle's is a ChainMap, written in Python, which is asked once for nearly every object.
        self.dispatch_table: dict[type, Callable[[Any], Any]] = {}
        for table in _tables():
            self.dispatch_table.update(table)
        super().__init__(file, protocol=5, buffer_callback=_taker(self.buffers))
        self.roots = roots
        self.storages = storages
        self.memo = roots.memo
        self.by_value: set[int] = set()
        self.suspects: list[tuple[Any, Any]] = []
        self.mentions: set[str] = set()
        """What the notebook's functions in the stream name."""
        self.functions: set[int] = set()
        """Those functions, by identity."""
        self.device = False
        """Whether something in the stream lies on a GPU, or belongs there."""
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        self._array = getattr(numpy, "ndarray", None)
        self._tensor = getattr(torch, "Tensor", None)
        self._plain: set[type] = set()
        self._dicted: set[type] = set()
        self._instances = attached.Instances()
        self._scopes = scopes.Scopes(roots.namespace)

    def reducer_override(self, obj: Any) -> Any:
        kind: Any = type(obj)
        if kind in self._plain:
            return NotImplemented
        if kind in self._dicted:
            return self._instances.reduce(obj)
        if kind is self._array:
            if self._tensor is not None and obj.base is None:
                self.storages.see_array(obj)
            return arrays.reduce_array(obj)
        if kind is arrays.Raw:
            return arrays.reduce_owner(obj.array)
        if self._tensor is not None and isinstance(obj, self._tensor):
            return arrays.reduce_tensor(obj, self.storages)
        if kind is witness.Tail:
            return list, (tuple(self.suspects),)
        reducer = rebuilt.reducer_of(kind)
        if reducer is not None:
            reduced = reducer(obj)
            if reduced is not NotImplemented:
                if kind in WEAK:
                    self.suspects.append((obj, (kind, None)))
                return reduced
        if self._array is not None and isinstance(obj, self._array):
            return arrays.reduce_subclass(obj)
        if kind is types.BuiltinFunctionType and touch.reflective_value(obj):
            self.mentions.add(obj.__name__)
        if kind is types.ModuleType and not scopes.is_importable(obj):
            return scopes.reduce_module(obj)
        if isinstance(obj, types.ModuleType) and scopes.is_importable(obj):
            return rebuilt.import_modules, (obj.__name__, self.roots.submodules(obj.__name__))
        if isinstance(obj, type | types.FunctionType):
            reduced = super().reducer_override(obj)
            if reduced is not NotImplemented and reduced[0] in _CLASS_MAKERS:
                self.by_value.add(id(obj))
                return _untracked(reduced, obj)
            return reduced
        trust = witness.trust(kind)
        if trust is witness.PLAIN and reducer is None:
            if self._instances.concerns(kind):
                self._dicted.add(kind)
                return self._instances.reduce(obj)
            self._plain.add(kind)
        elif trust is not witness.PLAIN and len(self.suspects) < witness.MOST:
            self.suspects.append((obj, witness.of(obj, trust)))
        return super().reducer_override(obj)

    def _dynamic_function_reduce(self, func: types.FunctionType) -> Any:
        self.by_value.add(id(func))
        self.mentions |= touch.code_words(func.__code__)
        scope: Any = func.__globals__
        if scope is not self.roots.namespace:
            scope = self._scopes.of(scope)
            if scope is None:
                return super()._dynamic_function_reduce(func)
            of_scope = (scope, func.__code__, func.__name__, func.__closure__)
            slots = {name: getattr(func, name) for name in _FUNCTION_SLOTS}
            return scopes.make_function, of_scope, (func.__dict__, slots), None, None, set_function_state
        self.functions.add(id(func))
        slots = {name: getattr(func, name) for name in _FUNCTION_SLOTS}
        # The cells themselves go along, not their contents: functions that share a variable go on sharing it.
        made = (func.__code__, self.roots.namespace, func.__name__, None, func.__closure__)
        return types.FunctionType, made, (func.__dict__, slots), None, None, set_function_state


WEAK = frozenset({weakref.ref, weakref.ProxyType, weakref.CallableProxyType})
_CLASS_MAKERS = frozenset({cp._make_skeleton_class, cp._make_skeleton_enum})
_FUNCTION_SLOTS = ("__qualname__", "__annotations__", "__defaults__", "__kwdefaults__", "__module__", "__doc__")
if sys.version_info >= (3, 12):
    _FUNCTION_SLOTS += ("__type_params__",)


def _untracked(reduced: Any, kind: Any) -> Any:
    """A class's reduction without cloudpickle's tracker id, which would update the live class on the standby in
    place, before the entry is complete, and would leave attributes that were deleted."""
    if reduced[0] is cp._make_skeleton_class:
        reduced[1][3].setdefault("__qualname__", kind.__qualname__)  # cloudpickle forgets where it was defined
        attached.with_slots(reduced, kind)
    else:
        reduced = attached.with_members(reduced, kind)
    arguments = reduced[1]
    return (reduced[0], (*arguments[:-2], None, arguments[-1]), *reduced[2:])


def set_function_state(function: types.FunctionType, state: Any) -> None:
    attributes, slots = state
    function.__dict__ = attributes  # the very one that a variable may hold
    for name, value in slots.items():
        setattr(function, name, value)
    met: Met | None = getattr(_meeting, "met", None)
    if met is not None:
        met.code(function, touch.code_words(function.__code__))


_meeting = threading.local()
"""`met`: what this thread comes across while it is loading."""


def dump(values: dict[str, Any], roots: Roots, storages: arrays.Storages) -> Pickled:
    """`values` as bytes. Raises whatever a value's own reduction raises."""
    with io.BytesIO() as file:
        pickler, before = NamespacePickler(file, roots, storages), devicedata.met()
        pickler.dump((values, witness.TAIL))
        pickler.device = devicedata.met() != before
        return Pickled(file.getvalue(), pickler)


class NamespaceUnpickler(pickle.Unpickler):
    def __init__(self, stream: Buffer, buffers: Iterable[Any], roots: Roots) -> None:
        super().__init__(io.BytesIO(b"".join((roots.prelude, stream))), buffers=buffers)
        self._roots = roots

    def persistent_load(self, name: str) -> Any:
        return self._roots.named[name]


class MeetingUnpickler(NamespaceUnpickler):
    """Also notes builtins that open the namespace, as the pickler does, and code that may make another value here."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        met: Met = _meeting.met
        if type(found) is types.BuiltinFunctionType and touch.reflective_value(found):
            met.mentions.add(found.__name__)
        met.same = met.same and is_same_everywhere(module, name, found)
        return found


def load_meeting(stream: Buffer, buffers: Iterable[Any], roots: Roots, met: Met) -> dict[str, Any]:
    """`load`, and into `met` what it comes across."""
    before = getattr(_meeting, "met", None)  # a value's own code may load another one
    _meeting.met = met
    held = roots.held()
    try:
        values, suspects = _load(stream, buffers, roots, MeetingUnpickler)
    finally:
        _meeting.met = before
    if roots.held() != held + len(met.functions):  # each refers to the namespace; something else does, too
        met.mentions.add("globals")
    met.same = met.same and all(kind.__name__ == COMPILED for _, (kind, _) in suspects)
    witness.check(suspects)
    return _living(values, suspects)


def load(stream: Buffer, buffers: Iterable[Any], roots: Roots) -> dict[str, Any]:
    """The values back. `buffers` should be writable (bytearray) so that arrays on them are.

    Raises witness.Changed when a value came back as something else.
    """
    values, suspects = _load(stream, buffers, roots, NamespaceUnpickler)
    witness.check(suspects)
    return _living(values, suspects)


def _load(stream: Buffer, buffers: Iterable[Any], roots: Roots, kind: type[NamespaceUnpickler]) -> Any:
    unpickler = kind(stream, buffers, roots)
    unpickler.load()  # the prelude
    return unpickler.load()


def _living(values: dict[str, Any], suspects: list[tuple[Any, Any]]) -> dict[str, Any]:
    references = [value for value, _ in suspects if type(value) in WEAK]
    suspects.clear()  # they kept alive what weak references look at
    if not all(map(weak.alive, references)):
        raise witness.Changed("a weak reference to an object that no variable holds")
    return values
