"""Objects without a state of their own, of which libraries keep one: to be held by a library exposes no variable.

Guarantees: what passes for a constant cannot change, or its library never changes it (matplotlib's marker paths, the
values of its settings, which the setting's name stands for). A library is looked at only when it is imported.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Collection, Iterator
from typing import Any

from . import touch

_MODULES = ("pandas.core.dtypes", "numpy.dtypes", "sklearn._loss")

_DEPTH = 4

_UNSEEN_STATE = (("matplotlib.backends.backend_agg", "RendererAgg"),)
"""Types whose objects a figure makes anew whenever it is drawn, and leaves out of its pickle."""


def is_constant(value: Any, held_by_libraries: Collection[int]) -> bool:
    """`held_by_libraries`: from `of_libraries`, which is worth asking once for many values."""
    if isinstance(value, types.BuiltinFunctionType):
        return touch.reflective_value(value)
    if id(value) in held_by_libraries:
        return True
    if isinstance(value, enum.Enum):
        return type(value).__module__ != "__main__"
    numpy: Any = sys.modules.get("numpy")
    if hasattr(numpy, "generic") and isinstance(value, numpy.generic):
        return not isinstance(value, numpy.void | numpy.object_)
    return (type(value).__module__ or "").startswith(_MODULES) or _plain_tuple(value, _DEPTH)


def _plain_tuple(value: Any, depth: int) -> bool:
    """A tuple of nothing but numbers, text and the like: library's names of parameters, sizes, colours."""
    if type(value) is not tuple or not depth:
        return False
    return all(type(item) in _ATOMS or _plain_tuple(item, depth - 1) for item in value)


_ATOMS: frozenset[type] = frozenset({type(None), bool, int, float, complex, str, bytes})


def of_libraries() -> frozenset[int]:
    """Identities of the objects that imported libraries keep as constants."""
    return frozenset(id(value) for value in _of_matplotlib())


def _of_matplotlib() -> Iterator[Any]:
    package: Any = sys.modules.get("matplotlib")
    for settings in ("rcParams", "rcParamsDefault", "rcParamsOrig"):
        yield from dict.values(getattr(package, settings, {}))
    markers: Any = sys.modules.get("matplotlib.markers")
    if hasattr(markers, "MarkerStyle"):
        for owner in (markers, markers.MarkerStyle, markers.Path):
            for path in [each for each in vars(owner).values() if type(each) is markers.Path]:
                yield from (path, vars(path), *vars(path).values())
    for colours in vars(sys.modules.get("matplotlib._cm_listed", object)).values():
        if type(colours) is list:
            yield from (colours, *colours)
    transforms: Any = sys.modules.get("matplotlib.transforms")
    if hasattr(transforms, "IdentityTransform"):
        yield transforms.IdentityTransform._mtx


def leaf_types() -> set[type]:
    """Types of imported libraries whose objects hold nothing that is replicated."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _UNSEEN_STATE)
    return {kind for kind in found if isinstance(kind, type)}


def generators() -> tuple[type, ...]:
    """NumPy's bit generators: their state is their own memory, reached through a lock and capsules of their own."""
    random: Any = sys.modules.get("numpy.random")
    return (random.BitGenerator,) if hasattr(random, "BitGenerator") else ()
