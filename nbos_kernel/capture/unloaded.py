"""Components that a replica has not loaded, and which of them a piece of code needs. No IO.

Guarantees: a name stands with at most one component, the newest; `needed` is a superset of the names that the code
can look up, found as the capture finds what it can change (`touch.py`), with two differences: code that only reaches
objects (`gc`), or runs text, needs nothing beforehand, and a text variable may hold names (a query).
"""

from __future__ import annotations

import builtins
import re
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import hidden, names, touch

OFF = 0
"""The threshold of a kernel whose replicas load everything; 1 leaves every component unloaded."""


@dataclass(eq=False)
class Unloaded:
    """A component as the log has it. names: those of its variables that still count."""

    component: Mapping[str, Any]
    payload: bytes
    names: set[str]
    size: int
    loading: bool = field(default=False)

    @classmethod
    def of(cls, component: Mapping[str, Any], payload: bytes) -> Unloaded:
        """`payload` is the whole entry's: only what belongs to the component is kept of it."""
        frames, kept = [], bytearray()
        for frame in component["frames"]:
            if "at" in frame:
                frames.append({"size": frame["size"], "at": len(kept)})
                kept += payload[frame["at"] : frame["at"] + frame["size"]]
            else:
                frames.append(frame)
        return cls({**component, "frames": frames}, bytes(kept), set(component["names"]), size_of(component))


def size_of(component: Mapping[str, Any]) -> int:
    return sum(frame["size"] for frame in component["frames"])


def may_wait(component: Mapping[str, Any], threshold: int) -> bool:
    """Whether it may stay unloaded: it is large enough, and each of its names is a variable whose absence Python
    notices (a name of a builtin would show the builtin)."""
    if threshold <= OFF or size_of(component) < threshold:
        return False
    return not any(hidden.is_pseudo(name) or name in vars(builtins) for name in component["names"])


class Table:
    """What is not loaded now, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Unloaded] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._by_name))

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Unloaded | None:
        return self._by_name.get(name)

    def put(self, unloaded: Unloaded) -> None:
        self.forget(unloaded.names)
        self._by_name.update(dict.fromkeys(unloaded.names, unloaded))

    def forget(self, some: Iterable[str]) -> None:
        """These names have other values now, or none."""
        for name in some:
            unloaded = self._by_name.pop(name, None)
            if unloaded is not None:
                unloaded.names.discard(name)

    def clear(self) -> None:
        self._by_name.clear()

    def of(self, some: Iterable[str]) -> list[Unloaded]:
        """The components that hold any of these names, the largest last: what fails early fails cheaply."""
        found = {id(each): each for name in some if (each := self._by_name.get(name)) is not None}
        return sorted(found.values(), key=lambda each: each.size)


_BY_OTHER_WORDS = frozenset(
    {
        *("gc", "ctypes", "get_objects", "get_referrers"),  # they reach objects, and no names
        *("In", "_dh", "Out", "_oh"),  # IPython's own; results are found below
        # Only with another word of the list, or by running text, whose lookups load by themselves.
        *("code", "pdb", "push", "ex", "compile", "inspect", "importlib", "runpy"),
    }
)

ANY_NAME = touch.REFLECTIVE - _BY_OTHER_WORDS
"""Words that give code a way to look up variables it does not name."""

_RESULTS = frozenset({"Out", "_oh"})
_LISTING = re.compile(
    r"\bdir\s*\(\s*\)"
    r"|^\s*%{0,2}(?:whos|psearch|reset|reset_selective|xdel)\b(?!\s*[.(=\[,])"
    r"|^\s*\?.*\*|\*.*\?\s*$",  # a*?
    re.MULTILINE,
)
_MODULES = frozenset({"__main__", "dill"})


def words_of(code: str) -> set[str]:
    """The identifiers of a cell, for `needed`."""
    found = touch.cell_words(code)
    if _LISTING.search(code):
        found.add("globals")
    return found


def needed(
    start: Iterable[str],
    table: Collection[str],
    namespace: Mapping[str, Any],
    mentions: Callable[[str], Iterable[str] | None],
) -> set[str]:
    """Which names in `table` code that names `start` can look up.

    mentions(name): what the functions in that variable's component name; None when nobody knows.
    """
    waiting, reached, found = list(start), set(), set[str]()
    while waiting:
        word = waiting.pop()
        if word in reached:
            continue
        reached.add(word)
        if word in ANY_NAME:
            return set(table)
        if word in _RESULTS:
            waiting += [name for name in table if name in names.LATEST or names.result_number(name) is not None]
        if word in namespace:
            value = namespace[word]
            if _opens_names(value):
                return set(table)
            if type(value) is str:
                found |= touch.words(value[: names.TEXT_LIMIT]) & set(table)
                continue
            said = mentions(word)
            if said is None:
                return set(table)
            waiting += said
    return (reached | found) & set(table)


def _opens_names(value: Any) -> bool:
    if issubclass(type(value), types.ModuleType):
        return value.__name__.partition(".")[0] in _MODULES
    return touch.reflective_value(value)
