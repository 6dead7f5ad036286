"""Modules that were imported ahead are out of sight until the replica's own code imports them.

Guarantees: until then they are in no `sys.modules`, no attribute of a package, and what they changed in the process
when they were imported is undone; an import of one finds what it would find in a process that was started for this
replica: the user's own module of that name where `sys.path` has it first, nothing where it was uninstalled, else the
module imported ahead, together with the modules that its import would have brought, and the changes they make.

Where what is found has changed on the disk since, or a variable that the import reads has, the module stays what it
was (compiled code cannot be loaded twice), and a warning says so.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

from .tracing import Effects, Trace

Spec = importlib.machinery.ModuleSpec

OURS = ("nbos_kernel", "nbos_cluster")


class Ahead(importlib.abc.MetaPathFinder):
    """given: called with each module that was handed over, by its name. reads: whether an import looks up this name in
    the environment."""

    def __init__(self, trace: Trace, reads: Callable[[str], bool] = lambda name: False) -> None:
        self.given: Callable[[str, ModuleType], None] = lambda name, module: None
        self._needs, self._effects, self._reads = trace.needs, trace.effects, reads
        self._written = {name for effects in trace.effects.values() for name in effects.environ}
        self._environ: dict[str, str] | None = None
        self._before = trace.before
        self._attributes = set[str]()
        """Of the modules, those that were attributes of their package: its code may have put something else there."""
        self._modules = {name: module for name, module in list(sys.modules.items()) if self._hides(name, trace)}
        self._stamps = {name: _stamp(_spec(module)) for name, module in self._modules.items()}
        self._adopt_unfound(trace)

    def _hides(self, name: str, trace: Trace) -> bool:
        top, spec = name.partition(".")[0], _spec(sys.modules[name])
        if name in trace.before or top in OURS:
            return False
        # What no finder finds (the code of others makes such modules) is out of sight only with the package it is in.
        return "." in name or (spec is not None and (spec.loader is not None or spec.origin is not None))

    def _adopt_unfound(self, trace: Trace) -> None:
        """Modules that were put into sys.modules by the code of another: they come and go with their package."""
        for name in self._modules:
            package = name.rpartition(".")[0]
            if name not in trace.loaded and package in self._modules:
                self._needs.setdefault(package, set()).add(name)

    @property
    def names(self) -> list[str]:
        return list(self._modules)

    def get(self, name: str) -> ModuleType | None:
        """The module, whether it is in sight or not."""
        return sys.modules.get(name) or self._modules.get(name)

    def hide(self, first: Any) -> None:
        """Once, after the imports. first: the process's state before them."""
        for name, module in self._modules.items():
            sys.modules.pop(name, None)
            package, _, child = name.rpartition(".")
            parent = self.get(package) if package else None
            if parent is not None and vars(parent).get(child) is module:
                delattr(parent, child)
                self._attributes.add(name)
        if "__mp_main__" not in self._before:
            sys.modules.pop("__mp_main__", None)  # multiprocessing's name for the module that will be another
        _put_filters(first.filters)
        sys.meta_path[:] = [self, *first.finders]
        for name in self._written:
            os.environ.pop(name, None)
        os.environ.update({os.fsdecode(key): os.fsdecode(value) for key, value in first.environ.items()})

    def begun(self) -> None:
        """The replica is set up; what is in its environment from now on was put there by its user."""
        self._environ = dict(os.environ)

    # -- an import ----------------------------------------------------------------------------------------------------

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Spec | None:
        module = self._modules.get(fullname)
        if module is None or target is not None:
            return None
        found = self._found(fullname, path)
        own = _spec(module)
        if found is None or own is None or not _same(found, own):
            return found
        if _stamp(found) != self._stamps[fullname]:
            self._say(
                f"{fullname} has changed on the disk since this process imported it; restart the kernel to use "
                "what is there now"
            )
        spec = Spec(fullname, _Given(self, module, own), origin=found.origin, is_package=None)
        spec.submodule_search_locations = found.submodule_search_locations
        spec.cached = found.cached
        spec.has_location = found.has_location
        return spec

    def _found(self, fullname: str, path: Sequence[str] | None) -> Spec | None:
        for finder in list(sys.meta_path):
            if finder is not self and (found := finder.find_spec(fullname, path, None)) is not None:
                return found
        return None

    def hand_over(self, name: str) -> None:
        """In sight from now on: the module, what its import brings, and what it changes, in the order of then."""
        wanted = self._closure(name)
        new = [(each, module) for each, module in list(self._modules.items()) if each in wanted]
        for each, module in new:
            self._modules.pop(each, None)
            sys.modules.setdefault(each, module)
        for each, module in new:
            package, _, child = each.rpartition(".")
            parent = sys.modules.get(package) if package else None
            if parent is not None and each in self._attributes and sys.modules[each] is module:
                setattr(parent, child, module)
        for each, _ in new:
            self._do_again(self._effects.get(each))
        self._compare_environment()
        for each, module in new:
            self.given(each, module)

    def _closure(self, name: str) -> set[str]:
        found, left = set[str](), [name]
        while left:
            one = left.pop()
            if one in found or one not in self._modules:
                continue
            found.add(one)
            left += self._needs.get(one, ())
            left.append(one.rpartition(".")[0])
        return found

    def _do_again(self, effects: Effects | None) -> None:
        if effects is None:
            return
        if effects.filters:
            filters = list(warnings.filters)
            for item in effects.filters:
                filters = [item, *(other for other in filters if other != item)]
            _put_filters(filters)
        for name, value in effects.environ.items():
            os.environ.setdefault(name, value)
        sys.meta_path += [finder for finder in effects.finders if finder not in sys.meta_path]

    def _compare_environment(self) -> None:
        now, then = dict(os.environ), self._environ
        if then is None:
            return
        self._environ = now
        changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
        late = [name for name in changed if name not in self._written and self._reads(name)]
        if late:
            self._say(
                f"{', '.join(late)} was set after this process had imported modules that read it, and may have no "
                "effect on them; set it in the kernel's environment (kernel.json), or use the library's own function"
            )

    def _say(self, text: str) -> None:
        warnings.warn(f"NBOS: {text}", stacklevel=2)


class _Given(importlib.abc.Loader):
    """Loads by handing over. Everything else (get_source, …) is asked of the module's real loader."""

    def __init__(self, ahead: Ahead, module: ModuleType, spec: Spec) -> None:
        self._ahead, self._module, self._spec = ahead, module, spec

    def create_module(self, spec: Spec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
        self._ahead.hand_over(self._spec.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._spec.loader, name)


def _spec(module: Any) -> Spec | None:
    return getattr(module, "__spec__", None)


def _same(found: Spec, own: Spec) -> bool:
    if found.origin != own.origin:
        return False
    # Folders without __init__.py: the same if they are made of the same folders.
    places = [list(spec.submodule_search_locations or ()) for spec in (found, own)]
    return found.origin is not None or places[0] == places[1]


def _stamp(spec: Spec | None) -> tuple[int, int, int] | None:
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    try:
        found = os.stat(spec.origin)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _put_filters(filters: Sequence[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    getattr(warnings, "_filters_mutated", getattr(warnings, "_filters_mutated_lock_held", lambda: None))()


current: Ahead | None = None
"""Of this process; None where nothing was imported ahead."""


def get(name: str) -> ModuleType | None:
    """A module that was imported, in sight or not."""
    return current.get(name) if current is not None else sys.modules.get(name)


def tops(names: Collection[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in names})


def begun() -> None:
    if current is not None:
        current.begun()
