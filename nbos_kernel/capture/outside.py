"""Functions of the notebook that stand in none of its variables: a lambda given to a timer, a thread's target that was
deleted since, a handler that a library keeps.

Guarantees: what such functions name counts as touched by every execution, for as long as they exist. A cell that makes
one names what it names, so those variables are examined until this has looked; nothing is called sealed before.

They are found by counting: a function refers to the namespace, so when the namespace has no more references than the
functions in variables, and those found before, account for, there are no others. Otherwise all objects of the process
are looked through, in slices.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Collection, Iterator
from typing import Any

from . import touch

BATCH = 50_000
"""Objects looked at between two pauses: about a millisecond."""


CELL = "<module>"
"""What the function of a cell itself is called. It never runs again, so its words do not count."""


class Outside:
    """`words`: what those functions name, as of the latest look that was finished."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._others: int | None = None  # references to the namespace that are no functions': the fewest ever seen
        self._met: list[weakref.ref[types.FunctionType]] = []  # by the latest look, in no variable
        self.words: frozenset[str] = frozenset()

    def look(self, known: Collection[int]) -> Iterator[None]:
        """`known`: identities of the functions that stand in variables."""
        references = sys.getrefcount(self._namespace)
        if self._others is not None and references - self._others == len(known) + self._still(known):
            return
        met: list[weakref.ref[types.FunctionType]] = []
        found = 0
        objects = gc.get_objects()
        while objects:
            mine = self._functions(objects[-BATCH:])
            del objects[-BATCH:]
            found += len(mine)
            met += [ref for identity, ref in mine if identity not in known]
            del mine
            yield
        self._met = met
        # A traceback that somebody keeps holds a cell's frame: the frame refers to the namespace, and to its function.
        others = references - found - self._count(CELL)
        self._others = others if self._others is None else min(self._others, others)
        self._still(known)

    def _functions(self, objects: list[Any]) -> list[tuple[int, weakref.ref[types.FunctionType]]]:
        """Those of `objects`, without holding them."""
        functions = [each for each in objects if type(each) is types.FunctionType]
        return [(id(each), weakref.ref(each)) for each in functions if each.__globals__ is self._namespace]

    def _still(self, known: Collection[int]) -> int:
        """How many references those have that were met and stand in no variable now; `words` becomes theirs."""
        words: set[str] = set()
        left = []
        for ref in self._met:
            function = ref()
            if function is not None and id(function) not in known:
                left.append(ref)
                if function.__code__.co_name != CELL:
                    words |= touch.code_words(function.__code__)
        function = None
        self._met = left
        self.words = frozenset(words)
        return len(left) + self._count(CELL)

    def _count(self, name: str) -> int:
        functions = [ref() for ref in self._met]
        return sum(each is not None and each.__code__.co_name == name for each in functions)
