"""Names whose values could not be replicated: touching one says so, instead of a plain NameError.

A lost name is absent from the namespace, so that `del`, assignment, `globals()` and completion see the truth.
Python then looks into the namespace's `__builtins__`, which on a replica with lost names is a LostBuiltins: it
raises NotReplicatedError. Without lost names the real builtins stand there, at full speed. Functions made
earlier keep the builtins they were made with; for those the plain NameError gets a note (`explain`).
"""

from __future__ import annotations

import builtins
from typing import Any

from .capture import names
from .lazy import Lazy, NotLoadedError


class NotReplicatedError(NameError):
    """The variable exists no more: its value could not be replicated, and the replica that held it is gone."""


def message(name: str, reason: str) -> str:
    return f"name {name!r} is not available: its value was not replicated before this kernel failed over ({reason})"


class LostBuiltins(dict[str, Any]):
    """The builtins, each variable that is not loaded yet, and an error for each lost name. Held empty of what IPython
    swaps for each cell."""

    def __init__(self, lost: dict[str, str], lazy: Lazy | None = None) -> None:
        super().__init__()
        self._lost, self._lazy = lost, lazy
        self.refresh()

    def refresh(self) -> None:
        """Take the builtins as they are now; called before each cell. `input` is swapped during a cell: always
        live."""
        self.clear()
        self.update(builtins.__dict__)
        self.pop("input", None)

    def __missing__(self, name: str) -> Any:
        try:
            return builtins.__dict__[name]
        except KeyError:
            if self._lazy is not None and name in self._lazy.table:
                return self._fetched(self._lazy, name)
            reason = self._lost.get(name) or self._lost.get(names.label(name))
            if reason is None:
                raise
            raise NotReplicatedError(message(name, reason), name=name) from None

    def _fetched(self, lazy: Lazy, name: str) -> Any:
        try:
            return lazy.fetch(name)
        except KeyError:
            reason = self._lost.get(name)
            if reason is None:
                raise
            raise NotReplicatedError(message(name, reason), name=name) from None

    def __getattr__(self, name: str) -> Any:
        # `__builtins__` of a `__main__` is a module in plain Python; some code relies on it.
        try:
            return builtins.__dict__[name]
        except KeyError:
            raise AttributeError(f"module 'builtins' has no attribute {name!r}") from None


def install(namespace: dict[str, Any], lost: dict[str, str], lazy: Lazy | None = None) -> None:
    """Let `namespace` raise for the names in `lost` (a live dict) that it does not hold, and load those of `lazy`."""
    standing = namespace.get("__builtins__")
    if not any(name not in namespace for name in lost) and not (lazy is not None and lazy.guard):
        if isinstance(standing, LostBuiltins):
            namespace["__builtins__"] = builtins
    elif isinstance(standing, LostBuiltins):
        standing.refresh()
    else:
        namespace["__builtins__"] = LostBuiltins(lost, lazy)


def explain(error: BaseException | None, lost: dict[str, str], lazy: Lazy | None = None) -> None:
    """Add the reason to a plain NameError about a name that is lost, or was not loaded (a function made before)."""
    if not isinstance(error, NameError) or isinstance(error, NotReplicatedError | NotLoadedError):
        return
    if error.name in lost:
        error.add_note(message(error.name, lost[error.name]))
    elif lazy is not None and error.name in lazy.table:
        error.add_note(f"{error.name!r} was not loaded on this replica yet; it is when a cell names it: run it again")
