"""Which names of the namespace are the user's, and which values are cheap to compare.

IPython keeps names of its own in the user's namespace. They count as the user's only once the user put another
value there. Of IPython's caches the results (`_`, `__`, `___`, `_<n>`) are state; `Out`, `In`, `_i…` are rebuilt
from the log.
"""

from __future__ import annotations

import hashlib
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

_RESULT = re.compile(r"^_{1,3}$|^_[0-9]+$")
_NUMBERED = re.compile(r"^_([0-9]+)$")

MACHINERY = frozenset(
    {"__name__", "__doc__", "__builtins__", "__builtin__", "__loader__", "__package__", "__spec__", "__session__"}
)
LATEST = ("_", "__", "___")
_ABSENT = object()

_ATOMS = frozenset({type(None), bool, int, float, complex, type(Ellipsis), type(NotImplemented)})
_TEXTS = frozenset({str, bytes})
TEXT_LIMIT = 64 * 1024
"""Longer strings are state like any object: two variables may share one."""


def user_variables(namespace: Mapping[str, Any], hidden: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything the user put there. `hidden`: what IPython put there (`shell.user_ns_hidden`)."""
    for name, value in list(namespace.items()):
        if type(name) is str and not is_ipythons(name, value, hidden):
            yield name, value


def is_ipythons(name: str, value: Any, hidden: Mapping[str, Any]) -> bool:
    """Whether IPython or Python put this value there, not the user."""
    if name in MACHINERY or (hidden.get(name, _ABSENT) is value and not _RESULT.match(name)):
        return True
    return type(value) is str and not value and name in LATEST  # IPython's way to say that there is no result yet


def copies(shell: Any) -> Iterator[Any]:
    """What IPython itself holds of the user's values, besides the namespace."""
    yield from shell.user_ns_hidden.values()
    yield from shell.user_ns["_oh"].values()
    yield from vars(shell.displayhook).values()
    last = shell.last_execution_result
    if last is not None:
        yield last.result


def result_number(name: str) -> int | None:
    """7 for `_7`, the cached result of cell 7; None for every other name."""
    match = _NUMBERED.match(name)
    return int(match[1]) if match else None


def is_atom(value: Any, depth: int = 3) -> bool:
    """True for values that can neither change nor share anything that can: identity proves that they are the
    same."""
    kind = type(value)
    if kind in _ATOMS:
        return True
    if kind is types.ModuleType:
        return sys.modules.get(value.__name__) is value
    if kind in _TEXTS:
        return len(value) <= TEXT_LIMIT
    if kind is tuple and depth and len(value) <= 16:
        return all(is_atom(item, depth - 1) for item in value)
    return False


NAME_LIMIT = 4096
"""Characters of a name that the log takes."""


def writable(name: str) -> bool:
    """Whether the log can hold a text as a name or path."""
    if len(name) > NAME_LIMIT:
        return False
    return name.isascii() or encodable(name)


def encodable(text: str) -> bool:
    """Whether it is text in UTF-8 (no lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def label(name: str) -> str:
    """What stands for a name that is not writable, itself otherwise; different names have different labels."""
    if writable(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{ascii(name[:40])[1:-1]}… ({len(name)} characters, {digest})"


def why_not_writable(text: str) -> str:
    if len(text) > NAME_LIMIT:
        return f"a name of {len(text)} characters; NBOS replicates names of up to {NAME_LIMIT}"
    return "a name that cannot be encoded as UTF-8"
