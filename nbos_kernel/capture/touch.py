"""Which names a cell could have touched: a superset, found from the text of the cell and the functions it can reach.

Every identifier that stands anywhere in the cell counts, in strings and comments too (magics, `eval`, `query`); so
does every name used by a function of the notebook that is reachable from a touched variable. Code that can reach the
namespace without naming a variable (`globals()`, frames, `gc`, `%run` …) touches everything. docs/state.md has
the reasoning and what it rests on.
"""

from __future__ import annotations

import functools
import re
import types
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

_WORD = re.compile(r"[^\W\d]\w*")

REFLECTIVE = frozenset(
    [
        "globals",
        "locals",
        "vars",
        "eval",
        "exec",
        "compile",
        "execfile",
        "breakpoint",
        "__main__",
        "__globals__",
        "__builtins__",
        "__import__",
        "f_globals",
        "f_locals",
        "f_back",
        "_getframe",
        "currentframe",
        "getmodule",
        "get_objects",
        "get_referrers",
        "_current_frames",
        "settrace",
        "setprofile",
        "user_ns",
        "user_module",
        "user_global_ns",
        "run_cell",
        "run_code",
        "ex",
        "push",
        "gc",
        "ctypes",
        "inspect",
        "runpy",
        "code",
        "pdb",
        "doctest",
        "unittest",
        "dill",
        "importlib",
        "ipytest",
        "get_ipython",
        "_oh",
        "_dh",
        "In",
        "Out",
        "func_globals",
    ]
)
"""Words that give code a way to variables it does not name."""

MAGICS = frozenset(
    [
        "matplotlib",
        "time",
        "timeit",
        "prun",
        "capture",
        "cd",
        "pwd",
        "ls",
        "env",
        "set_env",
        "pip",
        "conda",
        "precision",
        "config",
        "nbos",
        "gpu",
        "cpu",
        "who",
        "whos",
        "who_ls",
        "lsmagic",
        "load_ext",
        "reload_ext",
        "autoreload",
        "pylab",
        "alias",
        "sx",
        "system",
        "bash",
        "sh",
        "html",
        "javascript",
        "js",
        "latex",
        "markdown",
        "svg",
        "writefile",
        "file",
        "replay",
        "xmode",
        "colors",
        "pprint",
        "history",
        "hist",
        "notebook",
        "psearch",
        "pinfo",
        "pinfo2",
        "quickref",
    ]
)
"""Magics that reach no variable but those their line or body names."""

_MAGIC = re.compile(r"^\s*(?:[\w, ]+=\s*)?(%%?|!|\?)([^\W\d]\w*)?", re.MULTILINE)


def words(source: str) -> set[str]:
    """Every identifier in `source`, as Python reads it (NFKC)."""
    if not source.isascii():
        source = unicodedata.normalize("NFKC", source)
    return set(_WORD.findall(source))


def cell_words(source: str) -> set[str]:
    """The identifiers of a cell; with an unknown magic among them also REFLECTIVE ones."""
    found = words(source) | {"__annotations__"}  # written by `x: int = 1`, which does not name it
    for kind, magic in _MAGIC.findall(source):
        if kind.startswith("%") and magic and magic not in MAGICS:
            found.add("get_ipython")
    return found


@functools.lru_cache(maxsize=4096)
def code_words(code: types.CodeType) -> frozenset[str]:
    """What a function's code names: globals, attributes, the words of its strings, and so for functions inside it."""
    found = {*code.co_names}
    for constant in code.co_consts:
        found.update(_constant_words(constant))
    return frozenset(found)


def _constant_words(constant: Any) -> Iterable[str]:
    if isinstance(constant, types.CodeType):
        return code_words(constant)
    if isinstance(constant, str):
        return words(constant)
    if isinstance(constant, tuple | frozenset):
        return {word for item in constant for word in _constant_words(item)}
    return ()


class Mentioning(Protocol):
    names: tuple[str, ...]
    exposed: str
    mentions: frozenset[str] | None


def touched(
    start: Iterable[str], units: Mapping[str, Mentioning], is_reflective: Callable[[str], bool]
) -> set[str] | None:
    """All names that code naming `start` can reach, through units that are exposed too; None means: any name."""
    reached: set[str] = set()
    waiting = list(start)
    waiting += [name for unit in {id(u): u for u in units.values()}.values() if unit.exposed for name in unit.names]
    while waiting:
        word = waiting.pop()
        if word in reached:
            continue
        reached.add(word)
        if word in REFLECTIVE or is_reflective(word):
            return None
        unit = units.get(word)
        if unit is None:
            continue
        if unit.mentions is None:
            return None
        waiting += unit.names
        waiting += unit.mentions
    return reached


REFLECTIVE_MODULES = frozenset({"gc", "ctypes", "inspect", "__main__", "runpy", "dill", "builtins", "pdb", "code"})
_REFLECTIVE_BUILTINS = tuple(id(call) for call in (globals, locals, vars, eval, exec, compile, __import__, breakpoint))


def reflective_value(value: Any) -> bool:
    """Whether a variable's value itself opens the namespace: a module like gc, or eval under another name."""
    if issubclass(type(value), types.ModuleType):  # isinstance asks the value, and a dead proxy raises
        return value.__name__.partition(".")[0] in REFLECTIVE_MODULES
    return id(value) in _REFLECTIVE_BUILTINS
