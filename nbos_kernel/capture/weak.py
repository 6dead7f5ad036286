"""Weak references, proxies and the dictionaries made of them, and their honest reductions.

Guarantees: they look at the same object again; one whose object is gone, or that belongs to this process (a finalizer),
is refused with a reason or comes back dead.
"""

from __future__ import annotations

import pickle
import weakref
from typing import Any


class LoadersReference(weakref.ref[Any]):
    """To memory that the loader may use again: it is given to nobody, so it exposes nothing."""


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


class _Short:
    pass


def dead_reference() -> Any:
    return weakref.ref(_Short())


def reduce_weak_values(mapping: Any) -> Any:
    return weakref.WeakValueDictionary, (dict(mapping),)


def reduce_weak_keys(mapping: Any) -> Any:
    return weakref.WeakKeyDictionary, (dict(mapping),)
