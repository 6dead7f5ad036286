"""Functions of the notebook that stand in none of its variables: a lambda given to a timer, a thread's target that was
deleted since, a handler that a library keeps.

Guarantees: what such functions name counts as touched by every execution, for as long as they exist. A cell that makes
one names what it names, so those variables are examined until this has looked; nothing is called sealed before.

They are found by counting: a function refers to the namespace, so when the namespace has no more references than the
functions in variables account for, there are none. Otherwise all objects of the process are looked through, in slices.
"""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Collection, Iterator
from typing import Any

from . import touch

BATCH = 50_000
"""Objects looked at between two pauses: about a millisecond."""


class Outside:
    """`words`: what those functions name, as of the latest look that was finished."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._others: int | None = None  # references to the namespace that are no functions': the fewest ever seen
        self.words: frozenset[str] = frozenset()

    def look(self, known: Collection[int]) -> Iterator[None]:
        """`known`: identities of the functions that stand in variables."""
        references = sys.getrefcount(self._namespace)
        if self._others is not None and references - self._others == len(known):
            self.words = frozenset()
            return
        found = 0
        words: set[str] = set()
        objects = gc.get_objects()
        while objects:
            mine = self._functions(objects[-BATCH:])
            del objects[-BATCH:]
            found += len(mine)
            for identity, code in mine:
                # A cell itself, which a traceback may keep, never runs again.
                if identity not in known and code.co_name != "<module>":
                    words |= touch.code_words(code)
            yield
        others = references - found
        self._others = others if self._others is None else min(self._others, others)
        self.words = frozenset(words)

    def _functions(self, objects: list[Any]) -> list[tuple[int, types.CodeType]]:
        """Those of `objects`, without holding them."""
        functions = [each for each in objects if type(each) is types.FunctionType]
        return [(id(each), each.__code__) for each in functions if each.__globals__ is self._namespace]
