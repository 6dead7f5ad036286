"""What a replica knows of a component that it loaded from the log: it need not be examined to be known.

What was loaded *is* what the log holds: its digest, the addresses of its chunks and its variables are known, and who
refers to it can be found out before the first cell runs here (`Capture.look_ahead`). So a replica that takes over
examines what the cell touched, like the executor before it, and not the whole namespace.

Guarantees: nothing is left out of an examination that was not looked into on this very replica since it was loaded; a
component whose making ran code that may give another value on each replica (classes and reducers of the notebook,
objects that live in a process, classes that have a say in their pickle and whose library was not compared deeply) is
examined once here, and what differs is written.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import hidden, names, rebuilt, witness
from .buffers import Chunk, Marks, marks_of
from .found import Unit

_MAKERS = frozenset({"_make_skeleton_class", "_make_skeleton_enum", "_class_setstate", "set_enum"})
"""They run code of the notebook: metaclasses, `__init_subclass__`, `__set_name__`."""

_COMPARED = frozenset(witness.TRUSTED) | {"cloudpickle", "copyreg", "_codecs"}
_OURS = frozenset(f"nbos_kernel.capture.{name}" for name in ("arrays", "attached", "copyonwrite", "pickling", "scopes"))
_OF_REBUILT = frozenset({"import_modules", "fill_cell", "dict_view"})
"""Parts of the capture that make the same value everywhere: no file, connection or cache."""


COMPILED = "cython_function_or_method"
"""The type of a library's compiled functions: references, judged by their library, though they are met as suspects."""


def is_same_everywhere(module: str, name: str, found: Any) -> bool:
    """Whether making a value with what a stream names so gives the same on every replica. Classes do: one that has a
    say in its own pickle is met as a suspect (`witness.py`)."""
    if name in _MAKERS:
        return False
    if isinstance(found, type):
        return True
    package = module.partition(".")[0]
    if package == "nbos_kernel":
        return module in _OURS or name in _OF_REBUILT
    return package in _COMPARED


@dataclass
class Met:
    """What loading one component came across."""

    mentions: set[str] = field(default_factory=set)
    """Names that functions of the notebook in it use; `globals` where it holds the namespace itself, or the shell."""
    functions: set[int] = field(default_factory=set)
    """Those functions, by identity."""
    same: bool = True
    """Whether every replica makes the same of it."""

    def code(self, function: types.FunctionType, words: frozenset[str]) -> None:
        self.mentions |= words
        self.functions.add(id(function))


@dataclass(frozen=True)
class Loaded:
    """A component that was loaded, with its variables' names."""

    names: tuple[str, ...]
    digest: str
    marks: tuple[Marks, ...]
    met: Met

    @classmethod
    def of(cls, component: Mapping[str, Any], met: Met) -> Loaded:
        marks = tuple(_marks(frame) for frame in component["frames"])
        return cls(tuple(component["names"]), component["digest"], marks, met)

    def unit(self, values: Mapping[str, Any]) -> Unit | None:
        """How it stands among what is examined; None where all of it is compared by value."""
        standing = tuple(name for name in self.names if name in values and not names.is_atom(values[name]))
        if not standing:
            return None
        identities = {name: 0 if hidden.is_pseudo(name) else id(values[name]) for name in standing}
        return Unit(
            standing,
            identities,
            self.digest,
            self.marks,
            mentions=frozenset(self.met.mentions),
            functions=frozenset(self.met.functions),
            compared=self.met.same and not rebuilt.registered,
        )


def _marks(frame: Mapping[str, Any]) -> Marks:
    """Where the marks are not known, the first comparison makes them, and compares addresses."""
    addresses = tuple(frame.get("blobs") or ("",))
    known = marks_of(frame) or (b"",) * len(addresses)
    return Marks(frame["size"], tuple(map(Chunk, known, addresses)))
