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


class NotReplicatedError(NameError):
    """The variable exists no more: its value could not be replicated, and the replica that held it is gone."""


def message(name: str, reason: str) -> str:
    return f"name {name!r} is not available: its value was not replicated before this kernel failed over ({reason})"


class LostBuiltins(dict[str, Any]):
    """The builtins, and an error for each lost name. Held empty of what IPython swaps for each cell."""

    def __init__(self, lost: dict[str, str]) -> None:
        super().__init__()
        self._lost = lost
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
            reason = self._lost.get(name) or self._lost.get(names.label(name))
            if reason is None:
                raise
            raise NotReplicatedError(message(name, reason), name=name) from None

    def __getattr__(self, name: str) -> Any:
        # `__builtins__` of a `__main__` is a module in plain Python; some code relies on it.
        try:
            return builtins.__dict__[name]
        except KeyError:
            raise AttributeError(f"module 'builtins' has no attribute {name!r}") from None


def install(namespace: dict[str, Any], lost: dict[str, str]) -> None:
    """Let `namespace` raise for the names in `lost` (a live dict) that it does not hold."""
    standing = namespace.get("__builtins__")
    if not any(name not in namespace for name in lost):
        if isinstance(standing, LostBuiltins):
            namespace["__builtins__"] = builtins
    elif isinstance(standing, LostBuiltins):
        standing.refresh()
    else:
        namespace["__builtins__"] = LostBuiltins(lost)


def explain(error: BaseException | None, lost: dict[str, str]) -> None:
    """Add the reason to a plain NameError about a lost name."""
    if isinstance(error, NameError) and not isinstance(error, NotReplicatedError) and error.name in lost:
        error.add_note(message(error.name, lost[error.name]))
