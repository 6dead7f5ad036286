"""Standard library objects that pickle refuses, or that cloudpickle replaces by something else, and their honest
reductions.

cloudpickle turns an open file into a StringIO, a memoryview into bytes and `d.keys()` into a copy. Here a value
comes back as what it was, or is refused with a reason: closed files come back closed, files opened for reading are
opened again at their position, those for writing are refused; views look at the same dict again; locks nobody holds
are new locks; an sqlite connection without an open transaction is opened again; an lru_cache comes back empty.

`register_reducer` lets people add their own types.
"""

from __future__ import annotations

import functools
import gc
import importlib
import io
import mmap
import os
import pickle
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable
from typing import Any

from cloudpickle import cloudpickle as cp

from . import callbacks, copyonwrite, readable


def import_modules(name: str, submodules: tuple[str, ...]) -> types.ModuleType:
    """The module, with the submodules that the notebook imported beside it (`import xml.dom.minidom` binds only
    `xml`)."""
    import importlib

    for submodule in submodules:
        importlib.import_module(submodule)
    return importlib.import_module(name)


def reduce_cell(cell: types.CellType) -> Any:
    try:
        contents = cell.cell_contents
    except ValueError:
        return types.CellType, ()
    return types.CellType, (), (contents,), None, None, fill_cell


def fill_cell(cell: types.CellType, state: tuple[Any]) -> None:
    (cell.cell_contents,) = state


def reduce_cached(function: Any) -> Any:
    if cp._lookup_module_and_qualname(function) is not None:
        return NotImplemented  # it belongs to a module: a reference
    attributes = {key: value for key, value in function.__dict__.items() if key != "__wrapped__"}
    return rebuild_cached, (function.__wrapped__, function.cache_parameters(), attributes)


def rebuild_cached(wrapped: Any, parameters: dict[str, Any], attributes: dict[str, Any]) -> Any:
    function = functools.lru_cache(**parameters)(wrapped)
    function.__dict__.update(attributes)
    return function


def reduce_file(file: Any) -> Any:
    name = getattr(file, "name", "")
    if file in (sys.__stdin__, sys.__stdout__, sys.__stderr__):
        return getattr, (sys, {"<stdin>": "__stdin__", "<stdout>": "__stdout__"}.get(name, "__stderr__"))
    if not file.closed:
        return _reduce_open_file(file, name)
    return closed_file, (type(file).__name__, name, getattr(file, "mode", "r"))


def _reduce_open_file(file: Any, name: Any) -> Any:
    mode = getattr(file, "mode", "")
    if file.writable() or not isinstance(name, str) or not os.path.isfile(name):
        raise pickle.PicklingError(f"an open file ({name!r}) that is not only read; close it, or use `with open(...)`")
    try:
        position = file.tell()
    except OSError as err:
        raise pickle.PicklingError(f"an open file ({name!r}) within a loop over its lines: {err}") from None
    text = isinstance(file, io.TextIOWrapper)
    options = (file.encoding, file.errors, None) if text else (None, None, None)
    where = os.path.abspath(name)
    return open_file, (type(file).__name__, name, where, mode, *options, position, os.stat(where).st_size)


def open_file(
    kind: str, name: str, where: str, mode: str, encoding: Any, errors: Any, newline: Any, position: int, size: int
) -> Any:
    """The file, opened for reading at the same position. Raises OSError when it is not there or has another size."""
    found = os.stat(where).st_size
    if found != size:
        raise OSError(f"{where} has {found} bytes here, {size} where it was opened")
    if kind == "FileIO":
        file: Any = io.FileIO(name)
    elif kind == "TextIOWrapper":
        file = open(name, mode, encoding=encoding, errors=errors, newline=newline)  # noqa: SIM115
    else:
        file = open(name, "rb")  # noqa: SIM115
    file.seek(position)
    return file


def closed_file(kind: str, name: Any, mode: str) -> Any:
    """A closed file that still knows its name and mode."""
    binary = kind != "TextIOWrapper"
    if kind == "FileIO":
        file: Any = io.FileIO(os.devnull)
    else:
        file = open(os.devnull, "rb" if binary and kind == "BufferedReader" else "r+b" if binary else "r")  # noqa: SIM115
    raw = getattr(getattr(file, "buffer", file), "raw", file)
    raw.name = name
    if not binary:
        file.mode = mode
    file.close()
    return file


def reduce_memory_file(file: Any) -> Any:
    return (closed_memory_file, (type(file).__name__,)) if file.closed else NotImplemented


def closed_memory_file(kind: str) -> Any:
    file = io.StringIO() if kind == "StringIO" else io.BytesIO()
    file.close()
    return file


def reduce_dict_view(view: Any) -> Any:
    (mapping,) = (held for held in gc.get_referents(view) if isinstance(held, dict))
    return dict_view, (mapping, type(view).__name__.rpartition("_")[2])


def dict_view(mapping: dict[Any, Any], kind: str) -> Any:
    return getattr(mapping, kind)()


def reduce_mapping_proxy(proxy: Any) -> Any:
    """A view of a class' attributes, or of a dictionary that others may change."""
    (mapping,) = gc.get_referents(proxy)
    owners = [getattr(value, "__objclass__", None) for value in mapping.values()] if type(mapping) is dict else []
    for owner in owners:
        if isinstance(owner, type) and gc.get_referents(vars(owner)) == [mapping]:
            return vars, (owner,)
    return types.MappingProxyType, (mapping,)


def reduce_lock(lock: Any) -> Any:
    if lock.locked():
        raise pickle.PicklingError("a lock that is held")
    return threading.Lock, ()


def reduce_rlock(lock: Any) -> Any:
    if "count=0" not in repr(lock):
        raise pickle.PicklingError("a lock that is held")
    return threading.RLock, ()


def reduce_local(local: Any) -> Any:
    """What the main thread sees of it: other threads do not outlive the process."""
    return rebuild_local, (dict(vars(local)),)


def rebuild_local(attributes: dict[str, Any]) -> Any:
    local = threading.local()
    vars(local).update(attributes)
    return local


def reduce_weak_reference(reference: Any) -> Any:
    target = reference()
    if reference.__callback__ is not None and type(reference) is weakref.ref:
        return weakref.ref, (target, reference.__callback__)
    return (weakref.ref, (target,)) if target is not None else (dead_reference, ())


def reduce_proxy(proxy: Any) -> Any:
    try:
        target = proxy.__init__.__self__
    except (ReferenceError, AttributeError):
        raise pickle.PicklingError("a weakref.proxy whose object is gone, or hides itself") from None
    return weakref.proxy, (target, None)


def alive(reference: Any) -> bool:
    """Whether a weak reference or proxy still has its object."""
    if type(reference) is weakref.ref:
        return reference() is not None
    try:
        reference.__class__  # noqa: B018 - a dead proxy raises
    except ReferenceError:
        return False
    return True


def reduce_finalizer(finalizer: Any) -> Any:
    raise pickle.PicklingError("a weakref.finalize belongs to the process that made it")


def reduce_lost_builtins(mapping: Any) -> Any:
    """What an `exec` got as its builtins while names were lost (`lost.py`)."""
    return vars, (importlib.import_module("builtins"),)


class _Short:
    pass


def dead_reference() -> Any:
    return weakref.ref(_Short())


def reduce_weak_values(mapping: Any) -> Any:
    return weakref.WeakValueDictionary, (dict(mapping),)


def reduce_weak_keys(mapping: Any) -> Any:
    return weakref.WeakKeyDictionary, (dict(mapping),)


def reduce_connection(connection: Any) -> Any:
    """An sqlite connection to a file, or to memory (whose content goes along)."""
    import sqlite3

    if connection.in_transaction:
        raise pickle.PicklingError("an sqlite connection with an open transaction; commit it")
    names = connection.execute("PRAGMA database_list").fetchall()
    if len(names) > 1:
        raise pickle.PicklingError("an sqlite connection with attached databases")
    if _functions(connection) != _functions(sqlite3.connect(":memory:")):
        raise pickle.PicklingError("an sqlite connection with functions of its own")
    path = names[0][2]
    content = b"" if path else connection.serialize()
    if path and not os.path.isfile(path):
        raise pickle.PicklingError(f"an sqlite connection to {path}, which is gone")
    return open_connection, (path, content, connection.isolation_level, connection.row_factory)


def _functions(connection: Any) -> set[Any]:
    return set(connection.execute("PRAGMA function_list").fetchall())


def open_connection(path: str, content: bytes, isolation: Any, row_factory: Any) -> Any:
    import sqlite3

    if path:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the database {path} is not on this host")
        connection = sqlite3.connect(path, isolation_level=isolation)
    else:
        connection = sqlite3.connect(":memory:", isolation_level=isolation)
        connection.deserialize(content)
    connection.row_factory = row_factory
    return connection


def reduce_memory_map(array: Any) -> Any:
    """numpy.memmap: the same part of the same file."""
    base = array.base
    while base is not None and not isinstance(base, mmap.mmap):
        if type(base) is type(array):
            raise pickle.PicklingError("a part of a numpy.memmap; keep the whole one")
        base = getattr(base, "base", None)
    if array.filename is None or base is None or array.mode == "c":
        raise pickle.PicklingError("a numpy.memmap without a file, or with a private copy of it")
    if array.mode != "r":
        array.flush()
    order = "C" if array.flags.c_contiguous else "F"
    mode = "r" if array.mode == "r" else "r+"
    where, size = str(array.filename), os.stat(array.filename).st_size
    return open_memory_map, (where, array.dtype, mode, array.offset, array.shape, order, size, array.mode)


def open_memory_map(
    where: str, dtype: Any, mode: str, offset: int, shape: Any, order: str, size: int, said: str
) -> Any:
    numpy: Any = importlib.import_module("numpy")
    if os.stat(where).st_size != size:
        raise OSError(f"{where} has another size here")
    array = numpy.memmap(where, dtype, mode, offset, shape, order)
    array.mode = said
    return array


def reduce_exception(error: BaseException) -> Any:
    """An exception of a notebook's class, without running its `__init__` again on arguments that are the message."""
    state = (error.__dict__, error.__cause__, error.__context__, error.__suppress_context__)
    return rebuild_exception, (type(error), error.args), state, None, None, set_exception


def rebuild_exception(kind: Any, arguments: Any) -> Any:
    return kind.__new__(kind, *arguments)


def set_exception(error: BaseException, state: Any) -> None:
    error.__dict__.update(state[0])
    error.__cause__, error.__context__, error.__suppress_context__ = state[1:]


def reduce_type_variable(variable: Any) -> Any:
    if variable.__module__ != "__main__":
        return NotImplemented
    options = (variable.__bound__, variable.__covariant__, variable.__contravariant__)
    return make_type_variable, (variable.__name__, variable.__constraints__, *options, variable.__module__)


def make_type_variable(
    name: str, constraints: Any, bound: Any, covariant: bool, contravariant: bool, module: str
) -> Any:
    made = typing.TypeVar(  # type: ignore[misc]
        name, *constraints, bound=bound, covariant=covariant, contravariant=contravariant
    )
    made.__module__ = module
    return made


def reduce_figure(figure: Any) -> Any:
    """matplotlib's own reduction registers a loaded figure with pyplot under a new number; `%figures` does that."""
    reduced = figure.__reduce_ex__(4)
    state = dict(reduced[2])
    state.pop("_restore_to_pylab", None)
    return (reduced[0], reduced[1], state, *reduced[3:])


REDUCERS: dict[type, Callable[[Any], Any]] = {
    types.CellType: reduce_cell,
    types.MappingProxyType: reduce_mapping_proxy,
    functools._lru_cache_wrapper: reduce_cached,
    io.TextIOWrapper: reduce_file,
    io.BufferedReader: reduce_file,
    io.BufferedWriter: reduce_file,
    io.BufferedRandom: reduce_file,
    io.FileIO: reduce_file,
    io.StringIO: reduce_memory_file,
    io.BytesIO: reduce_memory_file,
    **{type(getattr({}, kind)()): reduce_dict_view for kind in ("keys", "values", "items")},
    type(threading.Lock()): reduce_lock,
    type(threading.RLock()): reduce_rlock,
    threading.local: reduce_local,
    typing.TypeVar: reduce_type_variable,
    weakref.ref: reduce_weak_reference,
    weakref.ProxyType: reduce_proxy,
    weakref.CallableProxyType: reduce_proxy,
    weakref.finalize: reduce_finalizer,
    weakref.WeakValueDictionary: reduce_weak_values,
    weakref.WeakKeyDictionary: reduce_weak_keys,
    **readable.REDUCERS,
}

_BY_NAME: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("sqlite3", "Connection"): reduce_connection,
    ("numpy", "memmap"): reduce_memory_map,
    ("numpy.memmap", "memmap"): reduce_memory_map,
    ("matplotlib.figure", "Figure"): reduce_figure,
    ("nbos_kernel.lost", "LostBuiltins"): reduce_lost_builtins,
    **callbacks.REDUCERS,
    **copyonwrite.REDUCERS,
    **readable.BY_NAME,
}

registered: dict[type, Callable[[Any], Any]] = {}
"""What the user registered; replicated itself (`%reducers`)."""


def reducer_of(kind: type) -> Callable[[Any], Any] | None:
    """How values of exactly this type are reduced, where it is not pickle's own way; subclasses of a type that was
    registered count too."""
    if registered:
        for base in kind.__mro__:
            if base in registered:
                return registered[base]
    found = REDUCERS.get(kind)
    if found is None and issubclass(kind, BaseException) and kind.__module__ == "__main__":
        return reduce_exception
    return found or _BY_NAME.get((kind.__module__, kind.__qualname__))


def register_reducer(kind: type, reduce: Callable[[Any], Any]) -> None:
    """Say how values of `kind` (and its subclasses) are replicated, where pickle cannot or must not do it.

    `reduce(value)` returns what `object.__reduce__` may return: most often `(make, arguments)`, and a standby then
    calls `make(*arguments)`. It raises `pickle.PicklingError(reason)` for a value that cannot be replicated: the user
    is told so. It may return NotImplemented for pickle's own way. Both functions may be of the notebook or of a module
    that every replica has; the registration itself outlives a failover.

        nbos_kernel.register_reducer(Camera, lambda camera: (Camera, (camera.address,)))
    """
    if not isinstance(kind, type) or not callable(reduce):
        raise TypeError("register_reducer takes a type and a function of one value")
    registered[kind] = reduce


def put_registered(value: dict[type, Callable[[Any], Any]]) -> None:
    registered.clear()
    registered.update(value)
