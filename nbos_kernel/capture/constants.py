"""Objects without a state of their own, of which libraries keep one: to be held by a library exposes no variable.

Guarantees: what passes for a constant cannot change, or its library never changes it (matplotlib's marker paths, the
values of its settings, which the setting's name stands for). A library is looked at only when it is imported.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Collection, Container, Iterator, Mapping
from typing import Any

from . import touch

_MODULES = ("pandas.core.dtypes", "numpy.dtypes", "sklearn._loss")

_DEPTH = 4

_UNSEEN_STATE = (("matplotlib.backends.backend_agg", "RendererAgg"),)
"""Types whose objects a figure makes anew whenever it is drawn, and leaves out of its pickle."""


def is_data_type(kind: type) -> bool:
    """Whether its objects are types of data: of an array, a tensor, a column. They never change, and are compared by
    value, though frames that have nothing else in common hold the same one."""
    package = (kind.__module__ or "").partition(".")[0]
    if package == "pandas":
        return kind.__name__.endswith("Dtype")
    return package in ("numpy", "torch") and kind.__name__ in ("dtype", "device")


class Caches:
    """What pandas' indexes among `values` keep of what they have worked out: views of an index share it, and no pickle
    holds it."""

    def __init__(self, values: Collection[Any]) -> None:
        self._values = values
        self._found: frozenset[int] | None = None

    def holds(self, value: Any) -> bool:
        pandas: Any = sys.modules.get("pandas")
        if type(value) is not dict or not hasattr(pandas, "Index"):
            return False
        if self._found is None:
            indexes = [each for each in self._values if isinstance(each, pandas.Index)]
            self._found = frozenset(id(getattr(each, "_cache", None)) for each in indexes)
        return id(value) in self._found


def is_constant(value: Any, kept: Container[int]) -> bool:
    """`kept`: what libraries keep one of."""
    if isinstance(value, types.BuiltinFunctionType):
        return touch.reflective_value(value)
    if id(value) in kept:
        return True
    if isinstance(value, enum.Enum):
        return type(value).__module__ != "__main__"
    numpy: Any = sys.modules.get("numpy")
    if hasattr(numpy, "generic") and isinstance(value, numpy.generic):
        return not isinstance(value, numpy.void | numpy.object_)
    kind = type(value)
    return is_data_type(kind) or (kind.__module__ or "").startswith(_MODULES) or _plain_tuple(value, _DEPTH)


def _plain_tuple(value: Any, depth: int) -> bool:
    """A tuple of nothing but numbers, text and the like: library's names of parameters, sizes, colours."""
    if type(value) is not tuple or not depth:
        return False
    return all(type(item) in _ATOMS or _plain_tuple(item, depth - 1) for item in value)


_ATOMS: frozenset[type] = frozenset({type(None), bool, int, float, complex, str, bytes})


class Kept:
    """Identities of what imported libraries keep as constants, found when the first one is looked up. `but`: values
    that do not pass for one, since the notebook has got hold of them."""

    def __init__(self, but: Collection[Any] = ()) -> None:
        self._but = but
        self._found: frozenset[int] | None = None

    def __contains__(self, identity: object) -> bool:
        if self._found is None:
            self._found = frozenset(map(id, _settings())).union(fixed()).difference(map(id, self._but))
        return identity in self._found


def _settings() -> Iterator[Any]:
    package: Any = sys.modules.get("matplotlib")
    for settings in ("rcParams", "rcParamsDefault", "rcParamsOrig"):
        yield from (value for value in dict.values(getattr(package, settings, {})) if type(value) not in _ATOMS)


_fixed: dict[int, Any] = {}
_fixed_of: list[bool] = []


def fixed() -> Mapping[int, Any]:
    """By identity what the libraries that are imported by now keep for as long as they are there."""
    markers: Any = sys.modules.get("matplotlib.markers")
    colours: Any = sys.modules.get("matplotlib._cm_listed")
    transforms: Any = sys.modules.get("matplotlib.transforms")
    complete = [hasattr(markers, "MarkerStyle"), hasattr(colours, "cmaps"), hasattr(transforms, "IdentityTransform")]
    if complete != _fixed_of:
        found: list[Any] = []
        for owner in (markers, markers.MarkerStyle, markers.Path) if complete[0] else ():
            for path in [each for each in vars(owner).values() if type(each) is markers.Path]:
                found += (path, vars(path), *vars(path).values())
        for table in [each for each in vars(colours).values() if type(each) is list] if complete[1] else ():
            found += (table, *table)
        found += [transforms.IdentityTransform._mtx] if complete[2] else []
        _fixed.update((id(value), value) for value in found)
        _fixed_of[:] = complete
    return _fixed


def leaf_types() -> set[type]:
    """Types of imported libraries whose objects hold nothing that is replicated."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _UNSEEN_STATE)
    return {kind for kind in found if isinstance(kind, type)}


def generators() -> tuple[type, ...]:
    """NumPy's bit generators: their state is their own memory, reached through a lock and capsules of their own."""
    random: Any = sys.modules.get("numpy.random")
    return (random.BitGenerator,) if hasattr(random, "BitGenerator") else ()
