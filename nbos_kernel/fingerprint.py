"""What a cell does, in 16 hex digits: by this the daemon knows that it has seen the cell before (right-sizing).

Two cells have the same fingerprint when they do the same to things of the same size. So it is made of the code's
structure, with local names numbered, texts and comments left out and numbers rounded; of the functions it calls, those
of the notebook by their code; and of the types and sizes of the variables it reads. Whole arrays are never looked at.
Nothing here runs the user's code: only attributes of types that are known are read.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

ARRAYS = frozenset({"numpy", "torch", "pandas", "jax", "jaxlib", "cupy", "cudf", "polars"})
"""Packages whose values are asked for shape and dtype."""

DEPTH = 3
"""How far functions are followed that call functions of the notebook."""

MOST_PARAMETERS = 2000
MOST_CODE = 100_000
"""Characters; a longer cell has no fingerprint."""

_MAGIC = re.compile(r"^([ \t]*)[%!].*$", re.MULTILINE)

# In what order a node's parts happen, where that is not the order of its fields: values before the names they get.
_ORDER: dict[type[ast.AST], tuple[str, ...]] = {
    ast.Assign: ("value", "targets"),
    ast.AnnAssign: ("value", "target"),
    ast.For: ("iter", "target", "body", "orelse"),
    ast.AsyncFor: ("iter", "target", "body", "orelse"),
    ast.ListComp: ("generators", "elt"),
    ast.SetComp: ("generators", "elt"),
    ast.GeneratorExp: ("generators", "elt"),
    ast.DictComp: ("generators", "key", "value"),
    ast.comprehension: ("iter", "target", "ifs"),
}


def fingerprint(code: str, namespace: Mapping[str, Any]) -> str:
    """'' where the code is no Python (`%%bash`) or very long. Lines of magics count as nothing: running IPython's input
    transformers twice could run code of the user's."""
    if len(code) > MOST_CODE:
        return ""
    try:
        tree = ast.parse(_MAGIC.sub(r"\1pass", code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    words = list(_Reader(namespace).read(tree))
    return hashlib.blake2b("\x1f".join(words).encode("utf-8", "replace"), digest_size=8).hexdigest()


class _Reader:
    def __init__(self, namespace: Mapping[str, Any]) -> None:
        self._namespace = namespace
        self._local: dict[str, str] = {}
        self._seen: set[int] = set()

    def read(self, node: ast.AST) -> Iterator[str]:
        yield type(node).__name__
        if isinstance(node, ast.Name):
            yield from self._name(node.id, isinstance(node.ctx, ast.Load))
            return
        if isinstance(node, ast.Constant):
            yield _number(node.value, 2)
            return
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield from self._name(node.target.id, True)
        if isinstance(node, ast.alias):
            yield node.name
            self._local[node.asname or node.name.partition(".")[0]] = node.name
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler):
            yield self._bind(node.name or "")
        if isinstance(node, ast.arg):
            yield self._bind(node.arg)
            return
        for field in _ORDER.get(type(node), node._fields):
            value = getattr(node, field, None)
            if field in ("name", "type_comment", "kind", "ctx"):
                continue
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST):
                    yield from self.read(part)
                elif part is not None:
                    yield str(part)  # the name of an attribute, a module, a keyword

    def _name(self, name: str, read: bool) -> Iterator[str]:
        if not read:
            yield self._bind(name)
        elif name in self._local:
            yield self._local[name]
        elif name in self._namespace:
            yield from self._describe(self._namespace[name], DEPTH)
        else:
            yield name if hasattr(builtins, name) else self._bind(name)

    def _bind(self, name: str) -> str:
        return self._local.setdefault(name, f"v{len(self._local)}")

    def _describe(self, value: Any, depth: int) -> Iterator[str]:
        kind = type(value)
        yield kind.__qualname__
        if isinstance(value, bool | int | float | complex | None):
            yield _number(value, 1)
        elif kind in (list, tuple, dict, set, frozenset):
            yield _rounded(len(value), 1)
        elif isinstance(value, ModuleType):
            yield value.__name__
        elif isinstance(value, FunctionType):
            yield from self._function(value, depth)
        elif kind is MethodType:
            yield from self._describe(value.__func__, depth)
        elif kind is BuiltinFunctionType:
            yield f"{value.__module__}.{value.__qualname__}"
        elif isinstance(value, type):
            yield from self._class(value, depth)
        elif kind.__module__.partition(".")[0] in ARRAYS:
            yield from _sizes(value)
        elif kind.__module__ == "__main__":
            yield from self._class(kind, depth)
            yield from _sizes(value)

    def _function(self, function: FunctionType, depth: int) -> Iterator[str]:
        yield function.__module__ or ""
        yield function.__qualname__
        if function.__module__ != "__main__" or not depth or id(function) in self._seen:
            return
        self._seen.add(id(function))
        yield from _code(function.__code__)
        for name in function.__code__.co_names:
            found = self._namespace.get(name)
            if isinstance(found, FunctionType | type):
                yield from self._describe(found, depth - 1)

    def _class(self, cls: type, depth: int) -> Iterator[str]:
        yield f"{cls.__module__}.{cls.__qualname__}"
        if cls.__module__ != "__main__" or not depth or id(cls) in self._seen:
            return
        self._seen.add(id(cls))
        for name, member in list(vars(cls).items()):
            if isinstance(member, FunctionType):
                yield name
                yield from self._function(member, depth)


def _code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield _number(constant, 2)


def _sizes(value: Any) -> Iterator[str]:
    """Shape and type of an array, parameters of a torch model, batch size of its data loader."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.nn.Module):
            parameters = [p for _, p in zip(range(MOST_PARAMETERS), value.parameters(), strict=False)]
            yield f"{len(parameters)} {_rounded(sum(p.numel() for p in parameters), 2)} {value.training}"
            yield str(parameters[0].dtype) if parameters else ""
        elif torch is not None and isinstance(value, torch.utils.data.DataLoader):
            yield str(value.batch_size)
        elif type(value).__module__ == "__main__":
            return
        elif type(value).__name__ == "ufunc":
            yield value.__name__
        elif hasattr(value, "shape"):
            yield " ".join(_rounded(side, 2) for side in value.shape)
            yield str(getattr(value, "dtype", ""))
    except Exception as err:  # noqa: BLE001 - a library's own attributes may raise anything; the type alone is known then
        yield type(err).__name__


def _number(value: Any, digits: int) -> str:
    """Whole numbers are sizes and counts and stand rounded; other numbers (a learning rate) and texts do not matter."""
    if value is None or isinstance(value, bool):
        return str(value)
    return _rounded(value, digits) if isinstance(value, int) else type(value).__name__


def _rounded(value: int, digits: int) -> str:
    return f"{value:.{digits - 1}e}" if abs(value) < 1 << 60 else str(abs(value).bit_length())
