"""Standard library objects that pickle refuses, or that cloudpickle replaces by something else, and their honest
reductions.

cloudpickle turns an open file into a StringIO, a memoryview into bytes and `d.keys()` into a copy. Here a value
comes back as what it was, or is refused with a reason: closed files come back closed, open ones are refused;
views look at the same dict again; an lru_cache comes back empty, which nobody can tell but by its speed.
"""

from __future__ import annotations

import functools
import gc
import io
import os
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

from cloudpickle import cloudpickle as cp


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
        raise pickle.PicklingError(f"an open file ({name!r}); close it, or use `with open(...)`")
    return closed_file, (type(file).__name__, name, getattr(file, "mode", "r"))


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


def reduce_memoryview(view: memoryview) -> Any:
    base = view.obj
    whole = memoryview(base)
    if any(getattr(whole, it) != getattr(view, it) for it in ("nbytes", "format", "shape", "readonly")):
        raise pickle.PicklingError("a memoryview of a part of an object, or in another format")
    return memoryview, (base,)


def reduce_dict_view(view: Any) -> Any:
    (mapping,) = (held for held in gc.get_referents(view) if isinstance(held, dict))
    return dict_view, (mapping, type(view).__name__.rpartition("_")[2])


def dict_view(mapping: dict[Any, Any], kind: str) -> Any:
    return getattr(mapping, kind)()


REDUCERS: dict[type, Callable[[Any], Any]] = {
    types.CellType: reduce_cell,
    functools._lru_cache_wrapper: reduce_cached,
    io.TextIOWrapper: reduce_file,
    io.BufferedReader: reduce_file,
    io.BufferedWriter: reduce_file,
    io.BufferedRandom: reduce_file,
    io.FileIO: reduce_file,
    io.StringIO: reduce_memory_file,
    io.BytesIO: reduce_memory_file,
    memoryview: reduce_memoryview,
    **{type(getattr({}, kind)()): reduce_dict_view for kind in ("keys", "values", "items")},
}
