"""What the import of each module loads and changes, so that it can be taken back and done again module by module.

Guarantees: a module that was loaded within the import of another is known as needed by it, however that was asked for
(an `import`, importlib, compiled code); of modules that were there already, those that Python code imports, and those
that compiled code keeps in its namespace, with all that was loaded below these.
"""

from __future__ import annotations

import builtins
import importlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from types import ModuleType
from typing import Any

_bootstrap: Any = importlib.import_module("_frozen_importlib")

_COMPILED = tuple(EXTENSION_SUFFIXES)

BRIEFLY = 0.005
"""Seconds of work after which a gentle import rests for as long."""


@dataclass
class Effects:
    """What a module's own code changed in the process: filters of warnings, the environment, ways to find modules."""

    filters: list[Any] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)
    finders: list[Any] = field(default_factory=list)


@dataclass
class _Seen:
    filters: list[Any]
    environ: dict[bytes, bytes]
    finders: list[Any]


def _state() -> _Seen:
    return _Seen(list(warnings.filters), dict(os.environ._data), list(sys.meta_path))  # type: ignore[attr-defined]


class Trace:
    """Of the imports within `watching()`. before: modules that were there. gently: rest in between, so that other
    processes get at least half of the core."""

    def __init__(self, gently: bool = False) -> None:
        self.before = frozenset(sys.modules)
        self.first = _state()
        self.needs: dict[str, set[str]] = {}
        self.effects: dict[str, Effects] = {}
        self.loaded: set[str] = set()
        self._gently, self._worked = gently, time.process_time()
        self._stack: list[str] = []
        self._seen = self.first

    @contextmanager
    def watching(self) -> Iterator[None]:
        load, plain = _bootstrap._find_and_load, builtins.__import__

        def find_and_load(name: str, import_: Any) -> Any:
            if name in sys.modules:
                return load(name, import_)  # it is being imported further out
            self._needs(name)
            self._settle()
            self.loaded.add(name)
            self._stack.append(name)
            try:
                return load(name, import_)
            finally:
                self._settle()
                self._compiled(name)
                self._stack.pop()
                self._rest()

        def note(
            name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] | None = (), level: int = 0
        ) -> ModuleType:
            found = plain(name, globals, locals, fromlist or (), level)
            self._imported(name, globals, fromlist or (), level)
            return found

        _bootstrap._find_and_load, builtins.__import__ = find_and_load, note
        try:
            yield
        finally:
            _bootstrap._find_and_load, builtins.__import__ = load, plain

    def _needs(self, name: str) -> None:
        """By the module whose code runs: what it calls may import, too."""
        if self._stack and self._stack[-1] != name:
            self.needs.setdefault(self._stack[-1], set()).add(name)

    def _imported(self, name: str, scope: Any, fromlist: Sequence[str], level: int) -> None:
        """An import statement of Python code has been carried out."""
        if level:
            own = scope.get("__name__", "")
            package = scope.get("__package__") or (own if "__path__" in scope else own.rpartition(".")[0])
            base = package.rsplit(".", level - 1)[0] if level > 1 else package
            name = f"{base}.{name}" if name else base
        self._needs(name)
        for item in fromlist:
            if isinstance(item, str) and f"{name}.{item}" in sys.modules:
                self._needs(f"{name}.{item}")

    def _compiled(self, name: str) -> None:
        """Compiled code imports past `__import__` what is there already; it keeps the modules in its namespace. Which
        parts of a package it uses is not known: all that are there are taken."""
        module = sys.modules.get(name)
        if not (getattr(module, "__file__", None) or "").endswith(_COMPILED):
            return
        held = {value.__name__ for value in list(vars(module).values()) if isinstance(value, ModuleType)} - {name}
        for other in sys.modules.keys() - self.before if held else ():
            if other in held or any(other.startswith(f"{one}.") for one in held):
                self._needs(other)

    def _settle(self) -> None:
        """What changed since is the doing of the module whose code ran last."""
        seen, now = self._seen, _state()
        if seen == now and all(a is b for a, b in zip(seen.filters, now.filters, strict=True)):
            return
        self._seen = now
        if not self._stack:
            return
        known = {id(item) for item in seen.filters}
        effects = self.effects.setdefault(self._stack[-1], Effects())
        effects.filters += reversed([item for item in now.filters if id(item) not in known])
        for key, value in now.environ.items():
            if seen.environ.get(key) != value:
                effects.environ[os.fsdecode(key)] = os.fsdecode(value)
        effects.finders += [finder for finder in now.finders if finder not in seen.finders]

    def _rest(self) -> None:
        worked = time.process_time()
        if self._gently and worked - self._worked > BRIEFLY:
            time.sleep(worked - self._worked)
            self._worked = time.process_time()
