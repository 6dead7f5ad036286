"""Functions whose globals are not the notebook's namespace, and modules that were made by hand.

Guarantees: a function of a module goes on using that module's own globals, not a copy of those it named; one that was
made with `exec(code, ns)` goes on using `ns` where that is a variable; a module made with `types.ModuleType` keeps one
identity with its functions, so that setting its attributes still changes what they see.

Globals that are no variable and no module's (a namedtuple's, those of `sympy.lambdify`) are left to cloudpickle, which
takes along only what its functions name: such a dictionary may hold anything.
"""

from __future__ import annotations

import gc
import sys
import types
from typing import Any


def is_importable(module: types.ModuleType) -> bool:
    """Whether every replica has it by name."""
    return sys.modules.get(module.__name__) is module


class Scopes:
    """For one pickle: what the globals of its functions belong to. `namespace`: the notebook's variables."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._found: dict[int, types.ModuleType | dict[str, Any] | None] = {}
        self._variables: set[int] | None = None

    def of(self, scope: dict[str, Any]) -> types.ModuleType | dict[str, Any] | None:
        """The module it is the `__dict__` of; itself when it is a variable; None when it is neither."""
        if id(scope) not in self._found:
            self._found[id(scope)] = self._look(scope)
        return self._found[id(scope)]

    def _look(self, scope: dict[str, Any]) -> types.ModuleType | dict[str, Any] | None:
        module = sys.modules.get(str(scope.get("__name__")))
        if type(module) is types.ModuleType and vars(module) is scope:
            return module
        if "__spec__" in scope:  # every module has it, but few dictionaries; the search looks at all objects there are
            for holder in gc.get_referrers(scope):
                if type(holder) is types.ModuleType and vars(holder) is scope:
                    return holder
        if self._variables is None:
            self._variables = {id(value) for value in self._namespace.values() if type(value) is dict}
        return scope if id(scope) in self._variables else None


def make_function(scope: Any, code: types.CodeType, name: str, closure: Any) -> types.FunctionType:
    """`scope`: what `Scopes.of` said."""
    return types.FunctionType(code, scope if type(scope) is dict else vars(scope), name, None, closure)


def reduce_module(module: types.ModuleType) -> Any:
    """A module made by hand."""
    return types.ModuleType, (module.__name__,), dict(vars(module)), None, None, set_module


def set_module(module: types.ModuleType, state: dict[str, Any]) -> None:
    vars(module).update(state)
