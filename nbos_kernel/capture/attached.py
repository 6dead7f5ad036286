"""Objects of which a pickle keeps the content but not what they are attached to.

Guarantees: an instance whose `__dict__` somebody else holds too (`self.__dict__ = self`, the attributes that all
instances of a class share, `d = vars(x)`) still shares it afterwards; a library's constant that has no state of its own
(`dataclasses.MISSING`) is the standby's own constant, because programs compare it with `is`; classes with `__slots__`
still have them, enumerations their aliases and what their members hold.
"""

from __future__ import annotations

import copyreg
import sys
import types
import typing
from typing import Any

from cloudpickle import cloudpickle as cp

from . import constants


class _Sample:
    pass


def _alone() -> int:
    sample = _Sample()
    held = sample.__dict__
    return sys.getrefcount(held)


_ALONE = _alone()
"""What getrefcount says of a `__dict__` that only its instance and one variable hold."""


class Instances:
    """For one pickle: how instances of classes that leave pickling to Python are reduced."""

    def __init__(self) -> None:
        self._constants: dict[type, dict[int, str]] = {}

    def concerns(self, kind: Any) -> bool:
        """Whether instances of this type have to be looked at one by one."""
        if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
            return False
        if kind in copyreg.dispatch_table or hasattr(kind, "__setstate__") or _chooses(kind):
            return False
        return bool(kind.__dictoffset__) or bool(self._constants_of(kind))

    def reduce(self, value: Any) -> Any:
        """The reduction of such an instance, NotImplemented for Python's own."""
        kind = type(value)
        if kind.__dictoffset__:
            try:
                held = object.__getattribute__(value, "__dict__")
            except AttributeError:
                return NotImplemented
            # A library's constant is no part of one pickle alone: another one, made just before, may hold it as well.
            if type(held) is dict and (sys.getrefcount(held) == _ALONE or id(value) in constants.fixed()):
                return NotImplemented if held else self._constant(value)
            return _with_dict(value)
        return self._constant(value)

    def _constant(self, value: Any) -> Any:
        name = self._constants_of(type(value)).get(id(value))
        if name is None or value.__reduce_ex__(4)[2:] not in ((None, None, None), ()):
            return NotImplemented
        return getattr, (sys.modules[type(value).__module__], name)

    def _constants_of(self, kind: type) -> dict[int, str]:
        """The type's module's names of its instances, by identity."""
        found = self._constants.get(kind)
        if found is None:
            module = sys.modules.get(kind.__module__) if kind.__module__ not in ("__main__", "builtins") else None
            held = list(getattr(module, "__dict__", {}).items())
            found = self._constants[kind] = {id(value): name for name, value in held if type(value) is kind}
        return found


def _chooses(kind: Any) -> bool:
    """Whether the class itself says what its pickle holds."""
    return getattr(kind, "__getstate__", None) is not getattr(object, "__getstate__", None)


def _with_dict(value: Any) -> Any:
    reduced = value.__reduce_ex__(4)
    state = reduced[2] if len(reduced) > 2 else None
    own, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if own is None:  # an empty one
        own = object.__getattribute__(value, "__dict__")
    items = tuple(reduced[3:5]) + (None,) * (2 - len(reduced[3:5]))
    return (reduced[0], reduced[1], (own, slots), *items, attach)


def attach(value: Any, state: Any) -> None:
    own, slots = state
    object.__setattr__(value, "__dict__", own)
    for name, held in (slots or {}).items():
        object.__setattr__(value, name, held)


def with_slots(reduced: Any, kind: type) -> None:
    """cloudpickle (3.1) makes a class without the slots it had: its instances would take any attribute."""
    slots = kind.__dict__.get("__slots__")
    arguments, attributes = reduced[1], reduced[2][0]
    if slots is None or typing.NamedTuple in arguments[2]:  # which sets them itself, and takes nobody else's
        return
    arguments[3].setdefault("__slots__", slots if isinstance(slots, str | dict) else tuple(slots))
    for name in [name for name, value in attributes.items() if type(value) is types.MemberDescriptorType]:
        if attributes[name].__objclass__ is kind:
            del attributes[name]  # one that was mangled (`__slots__ = ("__x",)`); the class makes it itself


_ENUMS_OWN = ("_name_", "_value_", "_sort_order_", "__objclass__")


def with_members(reduced: Any, kind: Any) -> Any:
    """cloudpickle (3.1) forgets aliases, flags of several bits, and what a member got besides its value."""
    arguments, state = reduced[1], reduced[2]
    members = kind.__members__
    for name in members:
        state[0].pop(name, None)
    own = {
        name: {key: held for key, held in vars(member).items() if key not in _ENUMS_OWN}
        for name, member in members.items()
        if member._name_ == name
    }
    values = {name: member._value_ for name, member in members.items()}
    made = (*arguments[:3], values, *arguments[4:])
    return (reduced[0], made, (state, {name: held for name, held in own.items() if held}), None, None, set_enum)


def set_enum(kind: Any, state: Any) -> None:
    attributes, own = state
    cp._class_setstate(kind, attributes)
    for name, held in own.items():
        vars(kind.__members__[name]).update(held)
