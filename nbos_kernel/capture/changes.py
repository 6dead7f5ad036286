"""What a cell changed in the namespace, against what the log holds.

Guarantees: `Capture.changes()` finds every change of a variable that the cell, or anything that ran since, could have
made, whatever way it was made; it neither prints nor raises, however the values behave; a value that cannot be
pickled costs its own name only, with the reason. Nothing is remembered until `accept()`, so that a capture whose
execution was not claimed is simply forgotten.

Cost: values that can neither change nor share are compared by identity. Of the other components only those are
pickled again that the code could have touched (`touch.py`) or that somebody outside the notebook refers to
(`seal.py`); large buffers in them are recognised chunk by chunk (`buffers.py`). docs/state.md has the reasoning.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Generator, Iterable
from typing import Any

from . import hidden, seal, touch
from .compare import Comparison, identity_of
from .found import NOT_COMPARED, NOT_LOOKED_INTO, Changes, Packed, Unit, why_not
from .known import Known
from .outside import Outside
from .pickling import Roots
from .quiet import quiet

__all__ = ["Capture", "Changes", "Packed", "why_not"]


class Capture(Known):
    """`variables()` gives the user's (name, value) pairs at this moment; `copies()` what else IPython itself holds
    of them (its own caches of results)."""

    def __init__(
        self,
        roots: Roots,
        variables: Callable[[], Iterable[tuple[str, Any]]],
        settings: hidden.Hidden | None = None,
        copies: Callable[[], Iterable[Any]] = lambda: (),
    ) -> None:
        super().__init__(roots.namespace, settings)
        self._roots, self._variables, self._copies = roots, variables, copies
        self.outside = Outside(roots.namespace)

    def note_source(self, code: str) -> None:
        """Code that runs now, or ran: what it names may be changed. Also remembers which submodules it imports by
        name: the variable it binds is only the package."""
        self.words |= touch.cell_words(code)
        if "import" not in code or "." not in code:
            return
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
            return  # the cell says so itself; SystemError: Python before 3.11.5 where another thread parses (gh-106905)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._roots.imported.update(alias.name for alias in node.names if "." in alias.name)

    def before_other_code(self) -> None:
        """Code that is no cell is about to run. Where nobody has looked ahead, everything is examined after it."""
        if self.from_log:
            self.words.add("globals")

    def examine_all(self) -> None:
        """Trust nothing at the next capture."""
        self.everything = True

    def changes(self) -> Changes:
        """Compare the namespace with what the log holds."""
        found = Changes()
        absent = set(self.absent)  # before the namespace: what another thread loads meanwhile is in neither
        if self._hidden is not None:
            found.settings = self._hidden.values()  # not within quiet(), which changes what warnings are shown
        with quiet():
            current = self._namespace()
            labels = Comparison(self, self._roots, found, self.outside.words).run(current)
        known = (self.digests.keys() | self.lost.keys()) - absent
        found.deleted = sorted(known - current.keys() - found.settings.keys() - labels)
        return found

    def packed(self, values: dict[str, Any]) -> Packed:
        """A component of values that are no variables."""
        return Comparison(self, self._roots, Changes()).packed(values)

    # Looking into components, while the user thinks --------------------------------------------------------------

    def settle(self, in_vain: int = 0) -> Generator[None, None, None]:
        """Find out which components are sealed. A step takes about a millisecond; the namespace may change between
        two runs of this, not during one: close it before a cell runs. `in_vain`: only into those that were examined
        so often since anybody named them."""
        standing = list({id(unit): unit for unit in self.units.values()}.values())
        pending = [unit for unit in standing if unit.exposed == NOT_LOOKED_INTO and unit.in_vain >= in_vain]
        if in_vain and not pending:
            return
        yield from self.outside.look(self._functions())
        for unit in pending:
            if any(self.units.get(name) is not unit for name in unit.names):
                continue  # a part of it was written again since
            values = self._values_of(unit)
            if values is None:
                continue
            for step in seal.walk(values, self._held, self._roots.stop):
                if step is not None:
                    unit.exposed = step.exposed or ("" if unit.compared else NOT_COMPARED)
                    unit.mentions = step.mentions
                    unit.skip = unit.patience if step.exposed else 0
                    unit.patience = min(64, 2 * unit.patience)
                yield

    def look_ahead(self) -> Generator[None, None, None]:
        """On a standby, or before the first code runs on a replica that was one: look into what was loaded, so that the
        next capture may leave it out. What is not known when this is closed is examined."""
        if self.from_log:
            yield from self.outside.look(self._functions())
            self.from_log = False
        yield from self.settle()

    def _functions(self) -> set[int]:
        return {function for unit in self.units.values() for function in unit.functions}

    def _values_of(self, unit: Unit) -> Callable[[], list[Any]] | None:
        def values() -> list[Any]:
            now = self._namespace()
            return [now[name] for name in unit.names]

        namespace = self._namespace()
        if any(identity_of(name, namespace.get(name)) != identity for name, identity in unit.identities.items()):
            return None  # rebound since
        del namespace
        return values

    def _namespace(self) -> dict[str, Any]:
        current = dict(self._variables())
        if self._hidden is not None:
            current.update(self._hidden.linked())
        return current

    def _held(self) -> dict[int, int]:
        held: dict[int, int] = {}
        for mapping in (self._roots.namespace.values(), self._copies()):
            for value in mapping:
                held[id(value)] = held.get(id(value), 0) + 1
        return held
