"""Random small programs: after every cell a standby equals the executor, and a plain Python run."""

from __future__ import annotations

import types
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from .pair import Pair

NAMES = ["a", "b", "c", "d"]
name = st.sampled_from(NAMES)
small = st.sampled_from(["0", "1", "True", "'x'", "None", "1.5", "(1, 2)", "[]", "[1]", "{}", "{'k': []}", "set()"])


def shape(namespace: dict[str, Any]) -> Any:
    """Values, and which of them are the same object, over the whole namespace at once."""
    seen: dict[int, int] = {}
    kept = []

    def walk(value: Any) -> Any:
        kept.append(value)
        if isinstance(value, list | dict | set | types.FunctionType | type):
            if id(value) in seen:
                return ("same", seen[id(value)])
            seen[id(value)] = len(seen)
        if isinstance(value, list | tuple):
            return (type(value).__name__, [walk(item) for item in value])
        if isinstance(value, dict):
            return ("dict", [(key, walk(item)) for key, item in value.items()])
        if isinstance(value, types.FunctionType):
            cells = [walk(cell.cell_contents) for cell in value.__closure__ or ()]
            return ("function", value.__code__.co_code, walk(value.__defaults__), cells)
        if isinstance(value, type):
            return ("class", {k: walk(v) for k, v in vars(value).items() if k.startswith("x")})
        if type(value).__module__ == "__main__":
            return ("instance", walk(type(value)), walk(vars(value)))
        return (type(value).__name__, repr(value))

    return [(key, walk(namespace[key])) for key in NAMES if key in namespace]


class Programs(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.pair = Pair()
        self.plain: dict[str, Any] = {"__name__": "__main__"}

    def cell(self, code: str) -> None:
        guarded = f"try:\n    {code}\nexcept Exception: pass"
        exec(guarded, self.plain)
        self.pair.cell(guarded)

    @rule(to=name, value=small)
    def assign(self, to: str, value: str) -> None:
        self.cell(f"{to} = {value}")

    @rule(to=name, source=name)
    def alias(self, to: str, source: str) -> None:
        self.cell(f"{to} = {source}")

    @rule(to=name, one=name, two=name)
    def nest(self, to: str, one: str, two: str) -> None:
        self.cell(f"{to} = [{one}, {{'v': {two}}}]")

    @rule(to=name, item=name)
    def append(self, to: str, item: str) -> None:
        self.cell(f"{to}.append({item})")

    @rule(to=name, item=name)
    def put(self, to: str, item: str) -> None:
        self.cell(f"{to}['n'] = {item}")

    @rule(to=name)
    def delete(self, to: str) -> None:
        self.cell(f"del {to}")

    @rule(to=name, used=name)
    def define(self, to: str, used: str) -> None:
        self.cell(f"{to} = lambda v={used}: v")

    @rule(to=name, kept=name)
    def close_over(self, to: str, kept: str) -> None:
        self.cell(f"{to} = (lambda cell: lambda: cell)({kept})")

    @rule(to=name, value=name)
    def make_class(self, to: str, value: str) -> None:
        self.cell(f"{to} = type('K', (), {{'x1': {value}, '__module__': '__main__'}})")

    @rule(to=name, cls=name)
    def make_instance(self, to: str, cls: str) -> None:
        self.cell(f"{to} = {cls}() if isinstance({cls}, type) else {to}")

    @rule(to=name, value=name)
    def set_attribute(self, to: str, value: str) -> None:
        self.cell(f"{to}.x2 = {value}")

    @rule()
    def fail_over(self) -> None:
        self.pair.switch()

    @invariant()
    def all_agree(self) -> None:
        if not hasattr(self, "pair"):
            return
        expected = shape(self.plain)
        assert shape(self.pair.executor.ns) == expected
        assert shape(self.pair.standby.ns) == expected
        assert self.pair.standby.replica.lost == {}


TestPrograms = Programs.TestCase
TestPrograms.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
