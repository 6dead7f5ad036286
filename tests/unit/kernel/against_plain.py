"""One program on a pair of replicas and in plain Python, cell by cell, and what differs after a failover."""

from __future__ import annotations

import collections
import contextlib
import io
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

from tests.fidelity import programs
from tests.fidelity.describe import Describer

from .pair import Pair

OUTSIDE = ("kept", "gate", "over")
"""What the programs keep in a module: one for each side, and gone after a failover (docs/state.md says so)."""


class Against:
    def __init__(self) -> None:
        self.pair = Pair()
        self.module = types.ModuleType("__main__")
        self.plain = vars(self.module)
        self._kept: tuple[dict[str, Any], dict[str, Any]] = ({}, {})

    def cell(self, code: str) -> None:
        with _silent():
            with _as_main(self.module), _keeping(self._kept[0]), contextlib.suppress(Exception):
                exec(compile(code, "<cell>", "exec", dont_inherit=True), self.plain)
            with _as_main(self.pair.executor.shell.user_module), _keeping(self._kept[1]):
                self.pair.cell(code)

    def fail_over(self) -> dict[str, str]:
        """What was lost then, with the reason: it is gone in the plain run too."""
        lost = dict(self.pair.standby.replica.lost)
        for name in lost:
            self.plain.pop(name, None)
            self.pair.executor.ns.pop(name, None)
        self._kept = ({}, {})
        self.pair.switch()
        return lost

    def difference(self) -> str:
        """Where the new executor differs from the plain run; empty when nowhere."""
        return differ(described(self.pair.executor.ns), described(self.plain))


def described(namespace: dict[str, Any]) -> Any:
    """Values, and which of them are the same object, over the whole namespace at once."""
    describer = Describer(namespace)
    found = []
    for name in programs.NAMES:
        if name in namespace:
            try:
                found.append((name, describer.of(namespace[name])))
            except Exception as err:  # noqa: BLE001 - a half-made object fails on both sides
                found.append((name, type(err).__name__))
    return found


def differ(got: Any, wanted: Any, path: tuple[Any, ...] = ()) -> str:
    """The first difference of two descriptions, and the way there."""
    if got == wanted:
        return ""
    if type(got) is type(wanted) and isinstance(got, list | tuple) and len(got) == len(wanted):
        at = next(i for i, (one, other) in enumerate(zip(got, wanted, strict=True)) if one != other)
        label = got[at][0] if isinstance(got[at], list | tuple) and got[at] else at
        return differ(got[at], wanted[at], (*path, str(label)[:30]))
    return f"{'.'.join(map(str, path))}: got {str(got)[:300]}, wanted {str(wanted)[:300]}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _as_main(module: types.ModuleType) -> Iterator[None]:
    before, sys.modules["__main__"] = sys.modules["__main__"], module
    try:
        yield
    finally:
        sys.modules["__main__"] = before


@contextlib.contextmanager
def _keeping(kept: dict[str, Any]) -> Iterator[None]:
    vars(collections).update(kept)
    try:
        yield
    finally:
        kept.clear()
        kept.update({name: vars(collections).pop(name) for name in OUTSIDE if name in vars(collections)})
