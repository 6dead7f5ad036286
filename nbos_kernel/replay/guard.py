"""What a replay changes in place in values that are replicated is undone.

Guarantees: afterwards every replicated variable that the replayed cell's text, or a function of the notebook that it
reaches, names has the value it had before; one that did not change is still the same object. Variables that share
objects are put back together, so that they still share them; they stay instances of the same classes. Beyond COPIES
bytes no copy is kept: what is too large is only found out, and named. Attributes of classes and functions themselves
are left as they are: what a replay made refers to these very objects.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..capture import arrays, buffers, hidden, names, touch
from ..capture.changes import Capture
from ..capture.pickling import Roots, dump, load
from ..capture.quiet import quiet

_FIXED = (type, types.FunctionType)

COPIES = 512 << 20
"""Bytes of copies that are kept while a marked cell runs."""


@dataclass(frozen=True)
class _Kept:
    """Variables of one component: what their pickle was, and the pickle itself where there was room for it."""

    names: tuple[str, ...]
    mark: bytes
    copy: tuple[bytes, ...] | None


class Guard:
    """`results(values)`: IPython's own copies of results that were put back have to be these."""

    def __init__(
        self, capture: Capture, roots: Roots, results: Callable[[Mapping[str, Any]], None], source: str
    ) -> None:
        self._namespace, self._results = roots.namespace, results
        made = [value for value in roots.namespace.values() if isinstance(value, _FIXED) and _of_notebook(value)]
        fixed = {f"fixed {number}": value for number, value in enumerate(made)}
        self._roots = Roots({**{k: v for k, v in roots.named.items() if k != "namespace"}, **fixed}, roots.namespace)
        self._room = COPIES
        self._kept: list[_Kept] = []
        members: dict[str, list[str]] = {}
        for name, digest in capture.digests.items():
            if not hidden.is_pseudo(name):
                members.setdefault(digest, []).append(name)
        waiting, seen = list(touch.words(source)), set[str]()
        with quiet():
            while waiting:
                digest = capture.digests.get(waiting.pop(), "")
                if digest and digest not in seen:
                    seen.add(digest)
                    waiting += self._keep(members[digest])

    def put_back(self) -> list[str]:
        """The variables that changed in place and could not be put back."""
        left: list[str] = []
        with quiet():
            for kept in self._kept:
                if self._mark_now(kept.names) != kept.mark:
                    left += [] if self._restored(kept) else kept.names
        return left

    def _keep(self, component: Iterable[str]) -> Iterable[str]:
        """Remember how these are; what functions among them name."""
        namespace = self._namespace
        values = {name: namespace[name] for name in sorted(component) if name in namespace}
        if not values or all(names.is_atom(value) for value in values.values()):
            return ()
        said = {word for value in values.values() for word in _said(value)}
        try:
            pickled = dump(values, self._roots, arrays.Storages())
        except Exception:  # noqa: BLE001 - the user's __reduce__ may raise anything; the next capture says so
            return said
        frames: list[bytes | memoryview] = [pickled.stream, *pickled.buffers]
        size = sum(memoryview(frame).nbytes for frame in frames)
        copy = tuple(bytes(frame) for frame in frames) if size <= self._room else None
        self._room -= size if copy is not None else 0
        self._kept.append(_Kept(tuple(values), _mark(frames), copy))
        return said | pickled.mentions

    def _mark_now(self, some: Iterable[str]) -> bytes:
        namespace = self._namespace
        try:
            pickled = dump({name: namespace[name] for name in some}, self._roots, arrays.Storages())
        except Exception:  # noqa: BLE001 - it holds something now that cannot be pickled: so it did change
            return b""
        return _mark([pickled.stream, *pickled.buffers])

    def _restored(self, kept: _Kept) -> bool:
        if kept.copy is None:
            return False
        stream, *large = (bytearray(frame) for frame in kept.copy)
        try:
            values = load(stream, large, self._roots)
        except Exception:  # noqa: BLE001 - as a standby may find it
            return False
        self._namespace.update(values)
        self._results(values)
        return True


def _of_notebook(value: Any) -> bool:
    return getattr(value, "__module__", None) == "__main__"


def _said(value: Any) -> Iterable[str]:
    """What a function, or the methods of a class, name."""
    if isinstance(value, types.FunctionType):
        return touch.code_words(value.__code__)
    if not isinstance(value, type):
        return ()
    inner = [getattr(each, "__func__", getattr(each, "fget", each)) for each in vars(value).values()]
    return {word for each in inner if isinstance(each, types.FunctionType) for word in touch.code_words(each.__code__)}


def _mark(frames: Iterable[bytes | memoryview]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for frame in frames:
        digest.update(buffers.frame(frame, None).marks.identity().encode())
    return digest.digest()
