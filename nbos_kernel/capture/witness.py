"""Values whose pickle lies do not pass: what comes back is compared with a witness of what went in.

Containers, arrays and instances that leave pickling to Python cannot lie. Only objects whose class has a say in it
(`__reduce__`, `__getstate__`, `__setstate__`, `__new__` …) take a witness along: its class, and for classes of the
notebook each attribute's type, length or value. It travels in the same stream, behind the values, and refers to the
objects themselves, so the standby needs no second search for them.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Iterable
from typing import Any

PLAIN, BY_CLASS, BY_CONTENT = "plain", "by class", "by content"

MOST = 10_000
"""Objects of one component that take a witness along."""

_HOOKS = frozenset(
    {"__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__", "__new__"}
)  # fmt: skip

TRUSTED = (
    "numpy", "pandas", "polars", "pyarrow", "datetime", "decimal", "fractions", "uuid", "pathlib", "re", "zoneinfo",
    "collections", "torch", "sympy", "array", "itertools", "builtins", "types", "functools", "operator", "random",
    "matplotlib", "enum", "scipy", "networkx", "mpmath", "ipaddress", "typing", "nbos_kernel",
)  # fmt: skip
"""Libraries whose pickles were compared deeply (docs/fidelity.md); sympy and matplotlib drop caches on purpose."""


class Changed(ValueError):
    """A value came back from its pickle as something else."""


class Tail:
    """Stands behind the values and is reduced last, when all suspects are known."""


TAIL = Tail()

_trust: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


def trust(kind: type) -> str:
    """How far a value of this type has to be looked at after loading."""
    found = _trust.get(kind)
    if found is None or kind.__module__ == "__main__":  # a class of the notebook may get a hook at any time
        found = _trust[kind] = _judge(kind)
    return found


def _judge(kind: type) -> str:
    if kind in copyreg.dispatch_table:
        return PLAIN
    makers = {base.__module__ or "" for base in kind.__mro__ if base is not object and _HOOKS & vars(base).keys()}
    if "__main__" in makers:
        return BY_CONTENT
    return PLAIN if all(module.partition(".")[0] in TRUSTED for module in makers) else BY_CLASS


def of(value: Any, how: str) -> tuple[type, dict[str, Any] | None]:
    """The witness of `value`."""
    return type(value), _content(value) if how is BY_CONTENT else None


def check(suspects: Iterable[tuple[Any, tuple[type, dict[str, Any] | None]]]) -> None:
    """Compare what was loaded with the witnesses. Raises Changed."""
    for value, (kind, content) in suspects:
        if type(value) is not kind:
            raise Changed(f"a {kind.__qualname__} comes back from its pickle as {type(value).__qualname__}")
        if content is None:
            continue
        now = _content(value)
        for attribute in content.keys() | now.keys():
            if content.get(attribute) != now.get(attribute):
                raise Changed(f"{kind.__qualname__}.{attribute} comes back changed from its pickle")


def _content(value: Any) -> dict[str, Any]:
    found = {name: _brief(held) for name, held in getattr(value, "__dict__", {}).items() if isinstance(name, str)}
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            try:
                found[slot] = _brief(object.__getattribute__(value, slot))
            except AttributeError:
                continue  # never set, or mangled: nothing to compare
    for base in _CONTENTS:
        if isinstance(value, base):
            found["its content"] = _brief(base(value))
    return found


_CONTENTS: tuple[Any, ...] = (list, tuple, dict, set, frozenset, str, bytes, int, float)


def _brief(value: Any) -> Any:
    kind = type(value)
    if kind in (bool, int, float, complex, type(None)):
        return kind.__name__, repr(value)
    if kind in (str, bytes):
        return kind.__name__, len(value), value[:64]
    if kind in (list, tuple, dict, set, frozenset, bytearray):
        return kind.__name__, len(value)
    return kind.__module__, kind.__qualname__
